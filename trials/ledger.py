"""What a trial leaves for analysis: a row per device and round, and the links second by second.

Knows the columns and Parquet; the values are the coordinator's records and the emulated links'.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from coordinator.ledger_files import LedgerFileError, read_parquet
from coordinator.ledger_types import NOTHING_HEARD, Contribution
from coordinator.phases import PHASES, DeviceTime, device_times
from coordinator.store.records import Records
from coordinator.store.rows import AssignmentRecord, DeviceRecord, RoundRecord
from profiles.errors import SketchfleetError
from profiles.trace import LinkState
from trials.emulation import EmulatedLink

PLANNED = ("fetch", "load", "train", "evaluate", "push")  # phases that a plan foresees
LOSSES = (("global", "received"), ("slice", "received"), ("slice", "trained"),
          ("personal", "trained"), ("local", "trained"))  # fmt: skip
SAMPLE_S = 1.0

_TEXT, _WHOLE, _REAL, _FLAG = pa.string(), pa.int64(), pa.float64(), pa.bool_()
LEDGER = pa.schema([
    ("run", _TEXT), ("method", _TEXT), ("round", _WHOLE), ("evaluate_only", _FLAG),
    ("device", _TEXT), ("board", _TEXT), ("outcome", _TEXT), ("message", _TEXT),
    ("late", _FLAG), ("share", _REAL), ("weight", _REAL), ("alignment", _REAL),
    ("reason", _TEXT),
    ("rank", _WHOLE), ("k", _WHOLE), ("encoding", _TEXT), ("density", _REAL), ("group", _WHOLE),
    ("compressed", _FLAG), ("precision", _TEXT), ("local_steps", _WHOLE),
    ("opened_at", _REAL), ("closed_at", _REAL), ("merged_at", _REAL), ("begun_at", _REAL),
    ("received_at", _REAL), ("deadline_s", _REAL),
    *((f"planned_{phase}_s", _REAL) for phase in PLANNED), ("planned_p90_s", _REAL),
    ("planned_up_bytes", _WHOLE), ("planned_down_bytes", _WHOLE), ("planned_peak_bytes", _WHOLE),
    *((f"{phase}_s", _REAL) for phase in PHASES), ("merge_s", _REAL),
    ("up_bytes", _WHOLE), ("down_bytes", _WHOLE), ("resent_bytes", _WHOLE), ("resumes", _WHOLE),
    ("up_goodput_bps", _REAL), ("down_goodput_bps", _REAL),
    ("link_up_bps", _REAL), ("link_down_bps", _REAL),
    *((f"{kind}_{subject}_{stage}", _REAL) for kind in ("loss", "accuracy")
      for subject, stage in LOSSES),
    ("train_loss", _REAL), ("train_examples", _WHOLE), ("train_tokens", _WHOLE),
    ("trained_parameters", _WHOLE), ("peak_bytes", _WHOLE), ("temperature_c", _REAL),
    ("joules", _REAL),
])  # fmt: skip
LINKS = pa.schema([
    ("at", _REAL), ("device", _TEXT), ("up_bps", _REAL), ("down_bps", _REAL), ("delay_s", _REAL),
    ("loss", _REAL), ("up_bytes", _WHOLE), ("down_bytes", _WHOLE), ("packets_lost", _WHOLE),
    ("packets_dropped", _WHOLE),
])  # fmt: skip

Row = dict[str, Any]


class LedgerError(SketchfleetError):
    """A folder holds no trial, or one that another version wrote."""


def read_rows(path: Path, schema: pa.Schema) -> list[Row]:
    """Rows as they were written. Raises `LedgerError`."""
    if not path.exists():
        raise LedgerError(f"{path.parent} holds no trial: {path.name} is missing")
    try:
        return read_parquet(path, schema)
    except LedgerFileError as error:
        raise LedgerError(str(error)) from error


def ledger_rows(records: Records, run_id: str, links: Sequence[Row] = ()) -> list[Row]:
    """A row per device and round, by round and device; `links`: rows of `LINKS`, if emulated."""
    run = records.run(run_id)
    if run is None:
        return []
    history = records.all_rounds(run_id)
    given, gave = records.assignments(run_id), records.contributions(run_id)
    profiles = {d.device_id: d.profile for d in records.all_devices() if d.profile is not None}
    times = {(t.round, t.device_id): t for t in device_times(given, history)}
    by_round = {r.round: r for r in history}
    samples: dict[str, list[Row]] = {}
    for row in links:
        samples.setdefault(row["device"], []).append(row)
    rows = []
    for record in given:
        a = record.assignment
        if a.round not in by_round:
            continue
        profile = profiles.get(a.device_id)
        time_ = times.get((a.round, a.device_id))
        link: tuple[float | None, float | None] = (None, None)
        if time_ is not None and a.device_id in samples:
            link = link_during(time_, samples[a.device_id])
        elif profile is not None and profile.link is not None:
            link = (profile.link.up_bps, profile.link.down_bps)
        rows.append({
            "run": run_id, "method": a.method, "rank": run.spec.rank,
            "board": "" if profile is None else profile.board,
            **_of_round(by_round[a.round], record), **_of_plan(record), **_of_report(record),
            **_of_contribution(gave.get(a.assignment_id)),
            **({} if time_ is None else _of_time(time_)),
            "link_up_bps": link[0], "link_down_bps": link[1],
        })  # fmt: skip
    return rows


def _of_round(round_: RoundRecord, record: AssignmentRecord) -> Row:
    a, detail = record.assignment, round_.detail
    return {
        "round": a.round, "evaluate_only": round_.evaluate_only, "device": a.device_id,
        "late": record.merged_in is not None and record.merged_in > a.round,
        "reason": a.reason,
        "opened_at": round_.opened_at, "closed_at": round_.closed_at,
        "merged_at": round_.merged_at, "received_at": record.received_at,
        "deadline_s": a.deadline_s, "merge_s": detail.get("merge_s"),
    }  # fmt: skip


def _of_contribution(gave: Contribution | None) -> Row:
    if gave is None:
        return {"share": 0.0}
    return {"share": gave.share, "weight": gave.weight, "alignment": gave.alignment}


def _of_plan(record: AssignmentRecord) -> Row:
    a, plan = record.assignment, record.predicted
    cost = plan.get("predicted", {})
    return {
        "k": a.rank, "encoding": a.update.encoding, "density": a.update.density,
        "group": a.update.group, "compressed": a.update.compressed, "precision": a.precision,
        "local_steps": a.local_steps, "planned_peak_bytes": plan.get("predicted_peak_bytes"),
        **{f"planned_{key}": cost.get(key) for key in
           (*(f"{phase}_s" for phase in PLANNED), "p90_s", "up_bytes", "down_bytes")},
    }  # fmt: skip


def _of_report(record: AssignmentRecord) -> Row:
    report = record.report
    if report is None:
        return {"outcome": NOTHING_HEARD, "message": ""}
    row: Row = {
        key: getattr(report, key)
        for key in ("outcome", "message", "train_loss", "train_examples", "train_tokens",
                    "trained_parameters", "peak_bytes", "temperature_c", "joules")
    }  # fmt: skip
    for subject, stage in LOSSES:
        found = report.evaluation(subject, stage)  # type: ignore[arg-type]
        if found is not None:
            row[f"loss_{subject}_{stage}"] = found.loss
            row[f"accuracy_{subject}_{stage}"] = found.token_accuracy
    return row


def _of_time(time_: DeviceTime) -> Row:
    return {
        "begun_at": time_.begun_at,
        **{f"{phase}_s": time_.seconds[phase] for phase in PHASES},
        "up_bytes": time_.up_bytes, "down_bytes": time_.down_bytes,
        "resent_bytes": time_.resent_bytes, "resumes": time_.resumes,
        "up_goodput_bps": time_.up_bps, "down_goodput_bps": time_.down_bps,
    }  # fmt: skip


def times_of(rows: Sequence[Row]) -> tuple[DeviceTime, ...]:
    """The phases of rows that have any: what `ledger_rows` was given."""
    return tuple(
        DeviceTime(
            r["device"], r["round"], r["begun_at"], {p: r[f"{p}_s"] or 0.0 for p in PHASES},
            r["up_bytes"] or 0, r["down_bytes"] or 0, r["resent_bytes"] or 0, r["resumes"] or 0,
        )
        for r in rows
        if r["begun_at"] is not None
    )  # fmt: skip


def link_during(
    time_: DeviceTime, samples: Sequence[Mapping[str, Any]]
) -> tuple[float | None, float | None]:
    """Mean rates (up, down) of the link while this device pushed and fetched, bit/s.

    Outages count as they were: 0. None where nothing moved in that direction.
    """
    fetch = (time_.begun_at, time_.begun_at + time_.seconds["fetch"])
    after = sum(s for phase, s in time_.seconds.items() if phase not in ("wait", "push"))
    push = (time_.begun_at + after, time_.begun_at + after + time_.seconds["push"])
    return (
        _mean_rate(samples, "up_bps", push) if time_.up_bytes else None,
        _mean_rate(samples, "down_bps", fetch) if time_.down_bytes else None,
    )


def _mean_rate(
    samples: Sequence[Mapping[str, Any]], key: str, span: tuple[float, float]
) -> float | None:
    """Mean over a span; the nearest sample when it is shorter than the time between two."""
    inside = [s[key] for s in samples if span[0] <= s["at"] <= span[1]]
    if not inside and samples:
        middle = sum(span) / 2
        inside = [min(samples, key=lambda s: abs(s["at"] - middle))[key]]
    return sum(inside) / len(inside) if inside else None


def estimated_links(devices: Sequence[DeviceRecord], at: float) -> list[Row]:
    """Rows of `LINKS` for links that nobody emulates: as their devices estimate them now."""
    return [
        {"at": at, "device": d.device_id, "up_bps": d.profile.link.up_bps,
         "down_bps": d.profile.link.down_bps, "delay_s": d.profile.link.rtt_s / 2}
        for d in devices
        if d.profile is not None and d.profile.link is not None
    ]  # fmt: skip


class LinkRecorder:
    """Samples emulated links into `rows` once a second, in a thread; use as a context manager."""

    def __init__(self, links: Mapping[str, EmulatedLink], rows: list[Row]) -> None:
        self._links, self._rows = dict(links), rows
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="link-recorder", daemon=True)

    def __enter__(self) -> LinkRecorder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(5)

    def _run(self) -> None:
        while True:
            self._sample()
            if self._stopping.wait(SAMPLE_S):
                return

    def _sample(self) -> None:
        at = time.time()
        for device, link in self._links.items():
            now: LinkState = link.now
            up, down = link.up, link.down
            self._rows.append({
                "at": at, "device": device, "up_bps": now.up_bps, "down_bps": now.down_bps,
                "delay_s": now.delay_s, "loss": now.loss, "up_bytes": up.bytes,
                "down_bytes": down.bytes, "packets_lost": up.lost + down.lost,
                "packets_dropped": up.dropped + down.dropped,
            })  # fmt: skip
