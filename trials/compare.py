"""Several methods on the same devices, data, seed and links: one table and one picture.

Every run is a whole fleet of processes, one after another. Rounds are as long as the planner needs
for the same coverage of the rank, so a method that asks more of a slow device takes longer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from coordinator.methods import METHODS, MethodOptions, make
from coordinator.report import RunReport, build_report
from coordinator.serve import open_state
from coordinator.store.records import Records
from coordinator.tables import table
from trials.demo import PATIENCE_S, devices, own_data, run_sections
from trials.fleet import DeviceSetup, FleetError, LocalFleet, fresh_folder
from trials.picture import compare_picture

COVERAGE = 3.5  # devices that train each row, on average, of four


@dataclass(frozen=True)
class Outcome:
    """What one method's run came to. Losses in nats per token on devices' own held-out code."""

    method: str
    personal: bool  # devices keep part of the model: losses are of their own models
    devices: int  # that took part in every training round
    loss_before: float
    loss_after: float
    worst_after: float
    gap_before: float  # worst less best
    gap_after: float
    up_bytes: int
    down_bytes: int
    round_s: float  # mean length of a training round
    merge_s: float  # mean of a merge
    aggregation_error: float | None  # of the last training round
    peak_bytes: int  # of the device that needed most
    curve: tuple[tuple[int, float], ...]  # (rounds merged, fleet mean)


def compare(out: Path, methods: Sequence[str], rounds: int, chosen: Sequence[str]) -> int:
    """Runs the methods (all when none is named); returns the exit code. Raises `FleetError`."""
    names = list(dict.fromkeys(methods)) or list(METHODS)
    for name in names:
        make(name, MethodOptions(rank=1))
    console = Console() if _wide() else Console(width=140)
    folder = fresh_folder(out).resolve()
    setups = own_data(devices(), chosen)
    console.print(
        f"[bold]Comparing {len(names)} methods[/]: {len(setups)} devices, {rounds} rounds each. "
        f"Logs and state in {escape(str(out))}."
    )
    (folder / "run.toml").write_text("# marks this folder as one that may be replaced\n")
    found: list[Outcome] = []
    failed: list[str] = []
    for number, name in enumerate(names, 1):
        began = time.monotonic()
        try:
            last = _run(folder / name, name, rounds, setups)
        except FleetError as error:  # the others are still worth having
            failed.append(name)
            console.print(f"[dim]{number}/{len(names)}[/]  {name}: [red]{escape(str(error))}[/]")
            continue
        found.append(last)
        console.print(
            f"[dim]{number}/{len(names)}[/]  {name}: fleet mean {last.loss_before:.3f} -> "
            f"{last.loss_after:.3f}, worst {last.worst_after:.3f} "
            f"[dim]({time.monotonic() - began:.0f} s)[/]"
        )
        (folder / "compare.json").write_text(json.dumps([asdict(o) for o in found], indent=1))
    if not found:
        raise FleetError(f"no run came to an end; see the logs in {out}")
    console.print(table(COLUMNS, [_cells(o) for o in found], "Methods"))
    if any(o.personal for o in found):
        console.print("* Devices keep part of the model: losses are of their own models.")
    (folder / "compare.md").write_text(markdown(found))
    picture = compare_picture(found, folder / "compare.png")
    console.print(f"\nPicture: [bold]{escape(str(out / picture.name))}[/]   Table: "
                  f"[bold]{escape(str(out / 'compare.md'))}[/]")  # fmt: skip
    return 1 if failed else 0


def sections_for(method: str, rounds: int) -> dict[str, dict[str, Any]]:
    """run.toml of one run: the demo's, with rounds as long as the method needs."""
    sections = run_sections(rounds)
    sections["run"] = {**sections["run"], "name": "compare"}
    sections["method"] = {"name": method}
    shape = {k: v for k, v in sections["round"].items() if k != "round_s"}
    # Every round waits for everybody: who is late differs from run to run.
    sections["round"] = {**shape, "quorum": 1.0, "coverage": COVERAGE, "max_round_s": 300}
    return sections


def _run(folder: Path, method: str, rounds: int, setups: Sequence[DeviceSetup]) -> Outcome:
    patience_s = PATIENCE_S + 120 * rounds
    with LocalFleet(folder, sections_for(method, rounds), setups) as fleet:
        fleet.start()
        records, _ = open_state(fleet.state)
        try:
            fleet.await_finish(records, patience_s)
            report = build_report(records, fleet.run_id)
            return _outcome(method, report, records)
        finally:
            records.close()


def _outcome(method: str, report: RunReport, records: Records) -> Outcome:
    if report.before is None or report.after is None:
        raise FleetError(f"the run of {method} has no losses to compare; see its logs")
    given = records.assignments(report.run.run_id)
    reports = [a.report for a in given if a.report is not None]
    trained = [r for r in report.rounds if not r["evaluate_only"] and r["seconds"] is not None]
    means: dict[int, list[float]] = {}
    for point in report.curve:
        if point.subject == "global":
            means.setdefault(point.round, []).append(point.loss)
    errors = [r["aggregation_error"] for r in trained if r["aggregation_error"] is not None]
    return Outcome(
        method=method,
        personal=not make(method, MethodOptions(rank=1)).has_global,
        devices=sum(row.rounds_joined == len(trained) for row in report.rows),
        loss_before=report.before.mean,
        loss_after=report.after.mean,
        worst_after=report.after.worst,
        gap_before=report.before.range,
        gap_after=report.after.range,
        up_bytes=sum(r.pushed_bytes for r in reports),
        down_bytes=sum(r.fetched_bytes for r in reports),
        round_s=_mean([r["seconds"] for r in trained]),
        merge_s=_mean([r["merge_s"] for r in trained if r["merge_s"] is not None]),
        aggregation_error=errors[-1] if errors else None,
        peak_bytes=max(r.peak_bytes for r in reports),
        curve=tuple((round_, _mean(losses)) for round_, losses in sorted(means.items())),
    )


COLUMNS = (
    "method", "loss\nbefore, after", "worst\ndevice", "gap\nbefore, after", "MB\nup, down",
    "round s", "merge s", "aggregation\nerror", "peak MB",
)  # fmt: skip


def _cells(o: Outcome) -> list[str]:
    error = "-" if o.aggregation_error is None else f"{o.aggregation_error:.1e}"
    return [
        o.method + ("*" if o.personal else ""),
        f"{o.loss_before:.3f}, {o.loss_after:.3f}",
        f"{o.worst_after:.3f}",
        f"{o.gap_before:.3f}, {o.gap_after:.3f}",
        f"{o.up_bytes / 1e6:.2f}, {o.down_bytes / 1e6:.2f}",
        f"{o.round_s:.0f}",
        f"{o.merge_s:.3f}",
        error,
        f"{o.peak_bytes / 1e6:.0f}",
    ]


def markdown(found: Sequence[Outcome]) -> str:
    """The table for a document."""
    rows = [[c.replace("\n", " ") for c in COLUMNS], ["---"] * len(COLUMNS)]
    rows += [_cells(o) for o in found]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _wide() -> bool:
    import sys

    return sys.stdout.isatty()
