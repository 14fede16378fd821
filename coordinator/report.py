"""The report of a run: the per-device table, fairness, and rounds, as plain values and as text.

Reads the database, decides nothing. A loss "of the global adapter" and a loss "of the slice" are
never mixed: tables show the former, the slice's only where it says so.
"""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

from coordinator.association import spearman
from coordinator.device_figures import DeviceFigures, device_figures
from coordinator.fairness import FairnessSummary, summarise
from coordinator.ledger import NOTHING_HEARD, ledger_rows
from coordinator.phases import DevicePhases, DeviceTime, device_phases, device_times
from coordinator.store.records import Records
from coordinator.store.rows import AssignmentRecord, RunRecord
from coordinator.store.screenings import QuarantineRecord, Screenings
from profiles.device import DeviceProfile
from profiles.errors import SketchfleetError


class ReportError(SketchfleetError):
    """There is nothing to report."""


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation of one device."""

    device_id: str
    round: int  # rounds merged into what was evaluated
    subject: str
    stage: str
    loss: float
    token_accuracy: float


@dataclass(frozen=True)
class RunReport:
    """Everything known about how a run served its devices."""

    run: RunRecord
    rounds_merged: int
    rows: tuple[DeviceFigures, ...]  # of devices that reported
    before: FairnessSummary | None  # of the global adapter as first received
    after: FairnessSummary | None
    ratio_against_gain: float | None  # Spearman of sketch ratio and loss fall
    curve: tuple[CurvePoint, ...]
    rounds: tuple[dict[str, Any], ...]
    links: dict[str, str]
    times: tuple[DeviceTime, ...]  # by round and device
    phases: tuple[DevicePhases, ...]  # by device
    quarantines: tuple[QuarantineRecord, ...] = ()  # that began in this run

    def plain(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "run_id": self.run.run_id,
            "finished": self.run.finished_at is not None,
            "rounds_merged": self.rounds_merged,
            "devices": [
                {**dataclasses.asdict(r), "link": self.links.get(r.device_id, "")}
                for r in self.rows
            ],
            "fairness_before": self.before and dataclasses.asdict(self.before),
            "fairness_after": self.after and dataclasses.asdict(self.after),
            "spearman_ratio_and_gain": self.ratio_against_gain,
            "curve": [dataclasses.asdict(p) for p in self.curve],
            "rounds": list(self.rounds),
            "phases": [p.plain() for p in self.phases],
            "quarantines": [dataclasses.asdict(q) for q in self.quarantines],
            "timeline": [dataclasses.asdict(t) for t in self.times],
        }


def build_report(records: Records, run_id: str) -> RunReport:
    """The report of a run so far. Raises `ReportError` on an unknown run."""
    run = records.run(run_id)
    if run is None:
        known = ", ".join(r.run_id for r in records.all_runs()) or "none"
        raise ReportError(f"no run {run_id!r} here; runs kept: {known}")
    history = records.all_rounds(run_id)
    given = [a for a in records.assignments(run_id) if a.report is not None]
    profiles = {d.device_id: d.profile for d in records.all_devices() if d.profile is not None}
    trained = sum(1 for r in history if r.phase == "merged" and not r.evaluate_only)
    times = device_times(given, history)
    ledger = ledger_rows(records, run_id)
    heard = {row.device_id for row in ledger if row.outcome != NOTHING_HEARD}
    rows = tuple(d for d in device_figures(ledger) if d.device_id in heard)
    weights = {a.assignment.device_id: float(a.report.train_examples)
               for a in given if a.report is not None and a.report.train_examples}  # fmt: skip
    # Only devices measured at both ends, or the two summaries would be of different fleets.
    both = [r for r in rows if r.gain is not None]
    before = {r.device_id: r.loss_first for r in both if r.loss_first is not None}
    after = {r.device_id: r.loss_last for r in both if r.loss_last is not None}
    return RunReport(
        run=run,
        rounds_merged=trained,
        rows=rows,
        before=summarise(before, {d: weights.get(d, 1.0) for d in before}) if before else None,
        after=summarise(after, {d: weights.get(d, 1.0) for d in after}) if after else None,
        ratio_against_gain=spearman([r.ratio for r in both], [r.gain or 0.0 for r in both]),
        curve=tuple(_curve(given)),
        rounds=tuple(
            {
                "round": r.round,
                "phase": r.phase,
                "evaluate_only": r.evaluate_only,
                "opened_at": r.opened_at,
                "seconds": None if r.closed_at is None else r.closed_at - r.opened_at,
                "late": r.detail.get("late", []),
                "aggregation_error": r.detail.get("aggregation_error"),
                "aggregation_errors": r.detail.get("aggregation_errors", {}),
                "aggregation_error_exact": r.detail.get("aggregation_error_exact"),
                "merge_s": r.detail.get("merge_s"),
                "not_merged": r.detail.get("dropped", {}),
                "robust": r.detail.get("robust"),
            }
            for r in history
        ),
        links={d: _link(p) for d, p in profiles.items()},
        times=times,
        phases=device_phases(times, profiles),
        quarantines=tuple(q for q in Screenings(records).quarantines() if q.run_id == run_id),
    )


def _curve(given: list[AssignmentRecord]) -> list[CurvePoint]:
    return [
        CurvePoint(
            a.assignment.device_id, a.assignment.round, e.subject, e.stage, e.loss,
            e.token_accuracy,
        )
        for a in given
        if a.report is not None
        for e in a.report.evaluations
    ]  # fmt: skip


def _link(profile: DeviceProfile) -> str:
    link = profile.link
    return "" if link is None else f"{_megabits(link.up_bps)} / {_megabits(link.down_bps)}"


def _megabits(bps: float) -> str:
    return f"{bps / 1e6:.0f}" if bps >= 1e8 else f"{bps / 1e6:.3g}"


DEVICE_COLUMNS = (
    "device", "code", "Mbit/s\nup / down", "k", "sent of\ndense fp32", "busy",
    "loss\nbefore, after", "gap", "share",
)  # fmt: skip


def device_table(report: RunReport) -> list[list[str]]:
    """The per-device table as text cells, one row a device, columns as `DEVICE_COLUMNS`.

    Losses are of the global adapter on the device's own held-out code, nats per token; gap is to
    the fleet's mean; share is of the merged change.
    """
    rank = report.run.spec.rank
    return [
        [
            f"{r.device_id}\n{r.board}",
            r.language,
            report.links.get(r.device_id, ""),
            f"{r.rank}/{rank}",
            f"{r.up_bytes / 1e6:.2f} of {r.dense_bytes / 1e6:.2f} MB\n{_saved(r)}",
            f"{r.seconds:.0f} s",
            f"{_number(r.loss_first)}, {_number(r.loss_last)}",
            _number(r.gap, "+.3f"),
            f"{r.share or 0.0:.0%}",
        ]
        for r in report.rows
    ]


def _saved(row: DeviceFigures) -> str:
    return f"{row.compression:.1f}x fewer" if row.compression else "nothing sent"


def fairness_lines(report: RunReport) -> list[str]:
    """The fairness summary in sentences."""
    if report.before is None or report.after is None:
        return ["The whole adapter has not been measured twice yet: no fairness to report."]
    a, b = report.before, report.after
    lines = [
        f"Fleet mean loss {a.mean:.3f} -> {b.mean:.3f} nats per token "
        f"({(b.mean - a.mean) / a.mean:+.1%}); worst device {a.worst:.3f} -> {b.worst:.3f}.",
        f"Range between devices {a.range:.3f} -> {b.range:.3f}, standard deviation "
        f"{a.std:.3f} -> {b.std:.3f}, Jain index {a.jain:.3f} -> {b.jain:.3f}.",
    ]
    if report.ratio_against_gain is not None:
        lines.append(
            f"Spearman correlation of sketch ratio and loss fall over {len(report.rows)} devices: "
            f"{report.ratio_against_gain:+.2f} (too few devices for a conclusion)."
            if len(report.rows) < 10
            else f"Spearman correlation of sketch ratio and loss fall: "
            f"{report.ratio_against_gain:+.2f}."
        )
    return lines + _alone(report)


def _alone(report: RunReport) -> list[str]:
    """Whether taking part was worth it; nothing where no device trained alone beside it."""
    gains = {r.device_id: r.loss_local - r.loss_last for r in report.rows
             if r.loss_local is not None and r.loss_last is not None}  # fmt: skip
    if not gains:
        return []
    least, better = min(gains, key=gains.__getitem__), sum(gain > 0 for gain in gains.values())
    return [
        f"Against an adapter trained alone on the same budget, {better} of {len(gains)} devices "
        f"have a lower loss with the fleet's. The fleet's is better by "
        f"{statistics.median(gains.values()):+.3f} nats per token in the median and by "
        f"{gains[least]:+.3f} on {least}, which gains least."
    ]


ERROR_COLUMNS = ("projection", "layers", "median", "largest", "in")


def error_table(report: RunReport) -> list[list[str]]:
    """Aggregation error of the last merged round by kind of projection, as text cells.

    ||merged - ideal|| / ||ideal||, the ideal being the weighted mean of the devices' products.
    Empty for methods that have no global model. Every layer stands in the JSON form.
    """
    merged = [r["aggregation_errors"] for r in report.rounds if r["aggregation_errors"]]
    kinds: dict[str, dict[str, float]] = {}
    for module, error in (merged[-1] if merged else {}).items():
        kinds.setdefault(module.rpartition(".")[2], {})[module] = error
    rows = []
    for kind, errors in kinds.items():
        worst = max(errors, key=errors.__getitem__)
        middle = statistics.median(errors.values())
        rows.append([kind, str(len(errors)), f"{middle:.2e}", f"{errors[worst]:.2e}", worst])
    return rows


def reason_lines(report: RunReport) -> list[str]:
    """Why each device was asked for its k."""
    return [f"{r.device_id}: {r.reason}" for r in report.rows]


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)
