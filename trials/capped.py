"""Four boards whose memory and processors the kernel caps: planned, and all at the smallest rank.

The first run lets the planner give each board what it affords. The second gives everybody the
rank of the board that affords least, with all else as it was planned. Both are compared at the
same wall time. Everything is a real process; no board is told of the other run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from coordinator.issuing import recorded_plans
from coordinator.report import build_report
from coordinator.serve import open_state
from coordinator.store.records import Records
from coordinator.tables import table
from trials.caps import KernelCap
from trials.demo import NANO_CODE, devices
from trials.fleet import DeviceSetup, LocalFleet, fresh_folder

RANK = 192  # as wide as the model, so that memory for its rows is worth planning
MIB = 2**20
BOARDS = (
    # name, code of the demo's device, memory, share of a processor
    ("gateway", "field-board", 560 * MIB, 0.5),
    ("small-board", "lab-board", 575 * MIB, 0.5),
    ("large-board", "laptop", 600 * MIB, 0.5),
    ("workstation", "workstation", 680 * MIB, 0.5),
)
MORE_ROUNDS = 2.0  # of the second run: smaller ranks train faster, and time is to be equal


@dataclass(frozen=True)
class BoardOutcome:
    """What one board had and used in the planned run."""

    name: str
    cap_bytes: int
    peak_bytes: int  # of its trainer, in any round
    k: int  # in the last round
    kills: int

    @property
    def used(self) -> float:
        """Share of the cap."""
        return self.peak_bytes / self.cap_bytes


@dataclass(frozen=True)
class CappedOutcome:
    """Both runs. Curves are (seconds since the first round opened, fleet mean in nats per token)
    of the whole adapter on boards' own held-out code.
    """

    boards: tuple[BoardOutcome, ...]
    enforced_by: str
    smallest_k: int
    planned: tuple[tuple[float, float], ...]
    smallest: tuple[tuple[float, float], ...]

    @property
    def equal_s(self) -> float:
        """The wall time at which both are compared: the end of the shorter run."""
        return min(self.planned[-1][0], self.smallest[-1][0])


def sections(rounds: int) -> dict[str, dict[str, Any]]:
    """run.toml of both runs."""
    return {
        "run": {"name": "capped", "seed": 11, "rounds": rounds},
        "model": {"base": str(NANO_CODE)},
        "adapter": {"rank": RANK, "alpha": 64.0},
        "method": {"name": "fed-plora"},
        "training": {
            "precision": "nf4", "sequence_tokens": 128, "micro_batch": 1, "accumulation": 8,
            "local_steps": 12, "learning_rate": 3e-4, "checkpointing": False,
        },
        "round": {"min_devices": 4, "gather_s": 1, "quorum": 1.0, "round_s": 120,
                  "max_round_s": 120, "min_rank": 4, "rank_multiple": 4},
        "wire": {"update": "int8", "slice": "bfloat16", "global_adapter": "bfloat16"},
        "evaluation": {"every_rounds": 1, "sequences": 16, "held_out_share": 0.2},
    }  # fmt: skip


def capped(out: Path, rounds: int) -> int:
    """Runs both; returns 1 when a board was killed. Raises `FleetError`, `CapError`."""
    console = Console()
    folder = fresh_folder(out).resolve()
    (folder / "run.toml").write_text("# marks this folder as one that may be replaced\n")
    console.print(
        f"[bold]Capped boards[/]: {len(BOARDS)} boards, {rounds} rounds planned, then the same "
        f"with everybody at the smallest rank. Logs in {escape(str(out))}."
    )
    with _boards() as setups:
        planned = _run(folder / "planned", rounds, setups, None)
        boards = tuple(
            BoardOutcome(name, setup.cap.memory_bytes, planned.peaks.get(name, 0),
                         planned.ks.get(name, 0), setup.cap.kills)
            for setup in setups
            if (name := setup.name) and setup.cap is not None
        )  # fmt: skip
        smallest_k = min(planned.ks.values())
        more = round(MORE_ROUNDS * rounds)
        replay = folder / "smallest-plans.json"
        replay.write_text(json.dumps(at_rank(planned.plans, smallest_k, rounds, more)))
        smallest = _run(folder / "smallest", more, setups, replay)
        means = {setup.cap.means for setup in setups if setup.cap is not None}
    found = CappedOutcome(
        boards, ", ".join(sorted(means)), smallest_k, planned.curve, smallest.curve
    )
    (folder / "capped.json").write_text(json.dumps(asdict(found), indent=1))
    _show(console, found)
    return 1 if any(board.kills for board in boards) else 0


@contextlib.contextmanager
def _boards() -> Iterator[list[DeviceSetup]]:
    code = {device.name: device for device in devices()}
    made: list[DeviceSetup] = []
    try:
        for name, like, memory_bytes, cpus in BOARDS:
            cap = KernelCap(f"sketchfleet-{name}", memory_bytes, cpus)
            made.append(dataclasses.replace(
                code[like], name=name, board=name, memory_mb=None, up="", down="", cap=cap
            ))  # fmt: skip
        yield made
    finally:
        for setup in made:
            assert setup.cap is not None
            setup.cap.close()


@dataclass(frozen=True)
class _Run:
    """What is compared of a run: its curve, its plans, and by board the highest peak and last k."""

    curve: tuple[tuple[float, float], ...]
    plans: list[dict[str, Any]]
    peaks: dict[str, int]
    ks: dict[str, int]


def _run(folder: Path, rounds: int, setups: Sequence[DeviceSetup], replay: Path | None) -> _Run:
    with LocalFleet(folder, sections(rounds), setups) as fleet:
        fleet.start_coordinator(*([] if replay is None else ["--replay", str(replay)]))
        fleet.await_token()
        for setup in setups:
            fleet.start_agent(setup)
        records: Records = open_state(fleet.state)[0]
        try:
            fleet.await_finish(records, 300 + 150 * rounds)
            given = records.assignments(fleet.run_id)
            peaks: dict[str, int] = {}
            for a in given:
                device, peak = a.assignment.device_id, a.report.peak_bytes if a.report else 0
                peaks[device] = max(peak, peaks.get(device, 0))
            ks = {a.assignment.device_id: a.assignment.rank for a in given if a.assignment.trains}
            return _Run(_curve(records, fleet.run_id), recorded_plans(given), peaks, ks)
        finally:
            records.close()


def at_rank(
    plans: Sequence[dict[str, Any]], k: int, rounds: int, more: int
) -> list[dict[str, Any]]:
    """Plans of `rounds` rounds and a last evaluation, with every device at k, for `more` rounds.

    Rounds beyond those planned are like the last one.
    """
    found = []
    for round_ in range(more + 1):
        like = rounds if round_ == more else min(round_, rounds - 1)
        for number, entry in enumerate(p for p in plans if p["round"] == like):
            plan = {**entry["plan"], "rank": k, "sketch_offset": number * k % RANK,
                    "reason": f"k={k}: what the smallest board affords"}  # fmt: skip
            found.append({**entry, "round": round_, "plan": plan})
    return found


def _curve(records: Records, run_id: str) -> tuple[tuple[float, float], ...]:
    """(seconds from the first round's opening until a version was merged, its fleet mean)."""
    history = records.all_rounds(run_id)
    began = history[0].opened_at
    ends = {r.round + 1: r.merged_at - began for r in history if r.merged_at is not None}
    losses: dict[int, list[float]] = {}
    for point in build_report(records, run_id).curve:
        if (point.subject, point.stage) == ("global", "received"):
            losses.setdefault(point.round, []).append(point.loss)
    return tuple(
        (ends.get(version, 0.0), sum(found) / len(found))
        for version, found in sorted(losses.items())
        if version == 0 or version in ends
    )


def loss_at(curve: Sequence[tuple[float, float]], seconds: float) -> float:
    """The loss at a time, on straight lines between evaluations."""
    before = curve[0]
    for after in curve:
        if after[0] >= seconds:
            span = after[0] - before[0]
            share = (seconds - before[0]) / span if span else 1.0
            return before[1] + share * (after[1] - before[1])
        before = after
    return before[1]


def _show(console: Console, found: CappedOutcome) -> None:
    cells = [
        [b.name, f"{b.cap_bytes / 1e6:.0f}", f"{b.peak_bytes / 1e6:.0f}", f"{b.used:.0%}",
         str(b.k), str(b.kills)]
        for b in found.boards
    ]  # fmt: skip
    columns = ("board", "cap MB", "peak MB", "used", "k", "killed")
    console.print(table(columns, cells, f"Planned within caps ({found.enforced_by})"))
    at = found.equal_s
    planned, smallest = loss_at(found.planned, at), loss_at(found.smallest, at)
    console.print(
        f"After {at:.0f} s: fleet mean {planned:.3f} nats per token as planned, {smallest:.3f} "
        f"with k={found.smallest_k} everywhere (from {found.planned[0][1]:.3f})."
    )
