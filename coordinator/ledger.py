"""The fairness ledger of a run, from what the coordinator keeps: a row per device and round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from coordinator.ledger_types import NOTHING_HEARD, Contribution, LedgerRow
from coordinator.store.records import Records
from coordinator.store.rows import AssignmentRecord, DeviceRecord, RoundRecord, RunRecord
from profiles.device import DeviceProfile
from protos.contract import AdapterSpec, Evaluation, LocalReport, Payload, Stage, Subject

LEDGER_PHASES = ("wait", "fetch", "train", "evaluate", "pack", "push")
DENSE_BYTES_PER_VALUE = 4  # a dense float32 adapter, as other frameworks send it

__all__ = ["NOTHING_HEARD", "LedgerRow", "dense_bytes", "ledger_rows", "rows_of"]


def ledger_rows(records: Records, run_id: str) -> tuple[LedgerRow, ...]:
    """A row per device and round that it was given work in, by round and device.

    Empty for an unknown run. Board and tier are as the device last described itself.
    """
    run = records.run(run_id)
    if run is None:
        return ()
    return rows_of(
        run, records.all_rounds(run_id), records.all_devices(), records.assignments(run_id),
        records.contributions(run_id),
    )  # fmt: skip


def rows_of(
    run: RunRecord,
    rounds: Iterable[RoundRecord],
    devices: Iterable[DeviceRecord],
    assignments: Iterable[AssignmentRecord],
    given: Mapping[str, Contribution],
) -> tuple[LedgerRow, ...]:
    """The same of records that are read already; assignments by round."""
    history = {r.round: r for r in rounds}
    profiles = {d.device_id: d.profile for d in devices if d.profile is not None}
    rows, local = [], dict[str, Evaluation]()  # the newest of each device
    for record in assignments:
        device, round_ = record.assignment.device_id, history.get(record.assignment.round)
        if round_ is None:
            continue
        facts: dict[str, Any] = _of_local(local.get(device), "")
        if record.report is not None:
            facts |= _of_report(record.report)
            if (trained := record.report.evaluation("local", "trained")) is not None:
                facts |= _of_local(trained, "_trained")
                local[device] = trained
        if (gave := given.get(record.assignment.assignment_id)) is not None:
            facts |= _of_contribution(gave)
        rows.append(_row(record, run.spec, round_, profiles.get(device), facts))
    return tuple(rows)


def dense_bytes(spec: AdapterSpec) -> int:
    """Bytes of the whole adapter as dense float32: what a round costs without compression."""
    whole = sum(t.out_features * t.in_features for t in spec.dense)
    return (spec.rank * spec.parameters_per_rank + whole) * DENSE_BYTES_PER_VALUE


def _row(
    record: AssignmentRecord,
    spec: AdapterSpec,
    round_: RoundRecord,
    profile: DeviceProfile | None,
    facts: Mapping[str, Any],
) -> LedgerRow:
    a, report = record.assignment, record.report
    received = _found(report, "received", "global")
    trained = _found(report, "trained", "personal", "slice")
    sent = (None if report is None else report.sent) or a.update
    update_bytes = record.update_bytes or 0
    return LedgerRow(
        round=a.round,
        device_id=a.device_id,
        board="" if profile is None else profile.board,
        tier="" if profile is None else profile.known_board or profile.board,
        language="" if report is None else report.main_language,
        method=a.method,
        rank=a.rank,
        global_rank=spec.rank,
        ratio=a.rank / spec.rank,
        encoding=sent.encoding,
        bits_per_value=8 * update_bytes / _values(spec, a.update) if update_bytes else None,
        density=sent.density,
        outcome=NOTHING_HEARD if report is None else report.outcome,
        message="" if report is None else report.message,
        reason=a.reason,
        loss_received=None if received is None else received.loss,
        accuracy_received=None if received is None else received.token_accuracy,
        loss_trained=None if trained is None else trained.loss,
        accuracy_trained=None if trained is None else trained.token_accuracy,
        up_bytes=update_bytes,
        dense_bytes=dense_bytes(spec) if update_bytes else 0,
        nats=() if received is None else tuple(n / 1000 for n in received.example_millinats),
        tokens=() if received is None else received.example_tokens,
        merged=record.merged_in is not None,
        evaluate_only=round_.evaluate_only,
        **facts,
    )


def _of_local(found: Evaluation | None, when: Literal["", "_trained"]) -> dict[str, Any]:
    if found is None:
        return {}
    return {f"loss_local{when}": found.loss, f"accuracy_local{when}": found.token_accuracy}


def _of_contribution(gave: Contribution) -> dict[str, Any]:
    return {
        "weight": gave.weight,
        "update_share": gave.share,
        "alignment": gave.alignment,
        "update_norm": gave.norm,
        "components": tuple(level / 255 for level in gave.components),
    }


def _of_report(report: LocalReport) -> dict[str, Any]:
    return {
        "examples": report.train_examples or None,
        "down_bytes": report.fetched_bytes,
        **{f"{phase}_s": getattr(report, f"{phase}_s") for phase in LEDGER_PHASES},
        "joules": report.joules,
        "temperature_c": report.temperature_c,
    }


def _found(report: LocalReport | None, stage: Stage, *subjects: Subject) -> Evaluation | None:
    """The evaluation of the first of these subjects that was made."""
    if report is None:
        return None
    found = (report.evaluation(subject, stage) for subject in subjects)
    return next((evaluation for evaluation in found if evaluation is not None), None)


def _values(spec: AdapterSpec, payload: Payload) -> int:
    """Values that an update stands for, those left out among them."""
    count = 0
    for m in spec.modules:
        widths = {"up": m.out_features, "down": m.in_features, "core": payload.rank}
        count += payload.rank * sum(widths.get(part, 0) for part in payload.parts)
    if "dense" in payload.parts:
        count += sum(t.out_features * t.in_features for t in spec.dense)
    return count
