"""The demo: four devices with different code, memory and links fine-tune the shipped nano model.

Everything runs as separate processes on loopback; nothing is downloaded. Ends with the table, the
fairness summary, a picture, two completions, and where the adapter lies.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from coordinator.export import export_run
from coordinator.report import (
    DEVICE_COLUMNS,
    RunReport,
    build_report,
    device_table,
    fairness_lines,
    reason_lines,
)
from coordinator.serve import open_state
from coordinator.store.records import Records
from coordinator.tables import table
from protos.export_options import Wanted
from trials.fleet import (
    DeviceSetup,
    FleetError,
    LocalFleet,
    environment,
    free_port,
    fresh_folder,
)
from trials.picture import loss_picture

NANO_CODE = Path(__file__).resolve().parent / "nano_code"
PATIENCE_S = 300.0  # and a minute for each round
PROMPT = "    def diff(self, "


def devices() -> list[DeviceSetup]:
    """Four emulated devices over code that every installation holds and the base never saw."""
    site = sysconfig.get_paths()["purelib"]
    return [
        DeviceSetup(
            "workstation", [f"{site}/sympy"], board="workstation, 2 GB",
            exclude=["*/tests/*"], languages=["python"], max_files=160,
            memory_mb=2000, up="50M", down="50M", delay_ms=2,
        ),
        DeviceSetup(
            "laptop", [f"{site}/networkx/**/tests/*.py"], board="laptop, 1.2 GB",
            languages=["python"], max_files=120,
            memory_mb=1200, up="4M", down="16M", delay_ms=10,
        ),
        DeviceSetup(
            "lab-board", [f"{site}/torch/include/torch", f"{site}/torch/include/ATen/core"],
            board="board, 0.9 GB",
            languages=["c-header"], max_files=160,
            memory_mb=900, up="800k", down="3M", delay_ms=25,
        ),
        DeviceSetup(
            "field-board", [f"{site}/numpy"], board="board, 0.8 GB",
            languages=["python-stub"], max_files=160,
            memory_mb=800, up="300k", down="1200k", delay_ms=60,
        ),
    ]  # fmt: skip


def run_sections(rounds: int) -> dict[str, dict[str, Any]]:
    """run.toml of the demo."""
    return {
        "run": {"name": "demo", "seed": 7, "rounds": rounds},
        "model": {"base": str(NANO_CODE)},
        "adapter": {"rank": 32, "alpha": 64.0},
        "method": {"name": "fslora"},
        "training": {
            "precision": "nf4", "sequence_tokens": 128, "micro_batch": 4, "local_steps": 30,
            "min_local_steps": 15, "learning_rate": 3e-3, "checkpointing": False,
        },
        "round": {"min_devices": 4, "gather_s": 1, "quorum": 0.75, "round_s": 30,
                  "max_round_s": 120, "min_rank": 8},
        "wire": {"update": "int8", "slice": "bfloat16", "global_adapter": "bfloat16"},
        "evaluation": {"every_rounds": 2, "sequences": 24, "held_out_share": 0.2},
    }  # fmt: skip


def own_data(setups: Sequence[DeviceSetup], chosen: Sequence[str]) -> list[DeviceSetup]:
    """The devices with the folders a user pointed them at. Raises `FleetError`."""
    by_name = {d.name: d for d in setups}
    for choice in chosen:
        name, separator, folder = choice.partition("=")
        if not separator or name not in by_name:
            raise FleetError(
                f"--data {choice!r} is not NAME=FOLDER with NAME one of {', '.join(by_name)}"
            )
        by_name[name] = dataclasses.replace(
            by_name[name], include=[str(Path(folder).expanduser().resolve())], languages=(),
            exclude=(), max_files=None,
        )  # fmt: skip
    return list(by_name.values())


def demo(out: Path, rounds: int, chosen: Sequence[str], *, local_only: bool = False) -> int:
    """Runs it; returns the exit code. `local_only`: every device also trains alone beside it."""
    console = Console() if sys.stdout.isatty() else Console(width=120)
    folder = fresh_folder(out).resolve()
    setups = own_data(devices(), chosen)
    console.print(
        f"[bold]Sketchfleet demo[/]: one coordinator and {len(setups)} agents on loopback, "
        f"{rounds} rounds. Logs and state in {escape(str(out))}."
    )
    started, sections = time.monotonic(), run_sections(rounds)
    if local_only:
        sections["evaluation"]["local_only"] = True
        sections["round"]["round_s"] *= 2
    with LocalFleet(folder, sections, setups, web_port=free_port(), secured=True) as fleet:
        console.print(f"Watch it in a browser: [bold]http://127.0.0.1:{fleet.web_port}/[/]")
        fleet.start()
        records, blobs = open_state(fleet.state)
        _watch(fleet, records, console, started, rounds)
        report = build_report(records, fleet.run_id)
    seconds = time.monotonic() - started
    model = records.model(fleet.run_id)
    assert model is not None
    exported = folder / "adapter"
    export_run(report.run, *model, blobs, Wanted(exported))
    picture = loss_picture(report, folder / "loss.png")
    records.close()
    _show(console, report, seconds)
    _completions(console, exported)
    console.print(f"\nLoss per device over rounds: [bold]{escape(str(out / picture.name))}[/]")
    console.print(f"Adapter (PEFT folder):       [bold]{escape(str(out / exported.name))}[/]")
    console.print(
        "Every device above trained on its own files; only adapter rows crossed the links."
    )
    return 0


def _watch(
    fleet: LocalFleet, records: Records, console: Console, started: float, rounds: int
) -> None:
    """Shows progress until the run is finished. Raises `FleetError` when a process fails."""
    told: set[str] = set()
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        while True:
            for name in fleet.processes:
                fleet.check(name)
            run = records.run(fleet.run_id)
            history = records.all_rounds(fleet.run_id)
            live.update(_progress(fleet, records, len(history), rounds, started))
            for r in history:
                mark = f"{r.round}.{r.phase}"
                if r.phase == "merged" and mark not in told:
                    told.add(mark)
                    console.print(_round_line(records, fleet.run_id, r.round, r.evaluate_only,
                                              time.monotonic() - started))  # fmt: skip
            if run is not None and run.finished_at is not None:
                return
            patience_s = PATIENCE_S + 60 * rounds
            if time.monotonic() - started > patience_s:
                raise FleetError(f"the demo did not finish within {patience_s:.0f} s; see "
                                 f"{fleet.log('coordinator')}")  # fmt: skip
            time.sleep(0.25)


def _round_line(records: Records, run_id: str, round_: int, final: bool, at_s: float) -> str:
    given = records.assignments(run_id, round_)
    losses = []
    for a in given:
        for subject, stage in (("global", "received"), ("slice", "trained")):
            e = a.report and a.report.evaluation(subject, stage)  # type: ignore[arg-type]
            if e:
                losses.append(f"{a.assignment.device_id} {subject} {e.loss:.3f}")
                break
    name = "final evaluation" if final else f"round {round_ + 1} merged"
    return f"[dim]{at_s:5.0f} s[/]  {name}: {'  '.join(losses)}"


def _progress(
    fleet: LocalFleet, records: Records, opened: int, rounds: int, started: float
) -> Panel:
    doing = Table("device", "board", "doing", "k", "step", "loss", box=box.SIMPLE, expand=True)
    for device in fleet.devices:
        s = fleet.status(device.name)
        step = f"{s['step']}/{s['steps']}" if "step" in s else ""
        loss = f"{s['loss']:.3f}" if "loss" in s else ""
        doing.add_row(device.name, device.board, s.get("phase", "starting"),
                      str(s.get("k", "")), step, loss)  # fmt: skip
    shown = min(opened, rounds)
    title = f"round {shown} of {rounds}" if opened <= rounds else "final evaluation"
    return Panel(doing, title=f"{title}, {time.monotonic() - started:.0f} s", box=box.ROUNDED)


def _show(console: Console, report: RunReport, seconds: float) -> None:
    console.print(table(DEVICE_COLUMNS, device_table(report), "Per device"))
    for line in reason_lines(report):
        console.print(f"  {escape(line)}", highlight=False)
    console.print()
    for line in fairness_lines(report):
        console.print(escape(line))
    console.print(f"{report.rounds_merged} rounds in {seconds:.0f} s.")


def _complete(adapter: Path | None, folder: Path) -> str:
    """What `sketchfleet-agent generate` prints: stock PEFT on the stock base."""
    words = [] if adapter is None else ["--adapter", str(adapter)]
    with (folder / "completion.log").open("ab") as log:
        done = subprocess.run(
            [sys.executable, "-m", "edge_agent.cli", "generate", "--base", str(NANO_CODE),
             "--max-new-tokens", "56", *words, PROMPT],
            stdout=subprocess.PIPE, stderr=log, env=environment(), check=False, text=True,
        )  # fmt: skip
    if done.returncode:
        raise FleetError(f"the completion failed; see {folder / 'completion.log'}")
    return done.stdout.rstrip()


def _completions(console: Console, exported: Path) -> None:
    base, tuned = (_complete(adapter, exported.parent) for adapter in (None, exported))
    shown = Table(
        "base model", "tuned by the fleet", box=box.SIMPLE_HEAD,
        title=f"Completions of {escape(repr(PROMPT))}",
    )  # fmt: skip
    shown.add_row(Text(base), Text(tuned))
    console.print(Group(Text(""), shown))
