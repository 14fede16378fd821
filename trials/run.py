"""`sketchfleet-trial run`: a fleet under its links and caps on this machine, or one out there.

Starts what fleet.toml describes (or waits for it, with --remote), follows the run to its end, and
leaves a folder with everything. What is in the folder: `ledger`, `results`, `trial_report`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from coordinator.ledger_files import write_parquet
from coordinator.report import build_report, fairness_lines
from coordinator.serve import open_state
from coordinator.store.records import Records
from trials.bulk import bulk_tcp
from trials.caps import CapError, KernelCap
from trials.emulation import EmulatedLink, Emulation, choose, free_number
from trials.fleet import DeviceSetup, FleetError, LocalFleet, write_toml
from trials.fleet_file import Trial, TrialDevice, read_trial
from trials.ledger import (
    LEDGER,
    LINKS,
    LinkRecorder,
    Row,
    estimated_links,
    ledger_rows,
)
from trials.remote import RemoteFleet
from trials.results import Facts, versions, write_facts
from trials.trial_report import write_report

LOOK_EVERY_S = 0.5
ESTIMATES_EVERY_S = 5.0  # of links that are not emulated
GRACE_S = 20.0  # for agents to hear that the run is over


@dataclass
class _Tried:
    """What is known of a trial so far: kept whatever ends it."""

    trial: Trial
    folder: Path
    facts: dict[str, Any]
    state: Path | None = None  # of the coordinator
    links: list[Row] = field(default_factory=list)


def run_trial(fleet_toml: Path, out: Path, remote: bool) -> int:
    """Runs it; returns the exit code: 0 finished, 1 not, 130 ended by Ctrl-C.

    Raises `SketchfleetError` when it cannot begin, or a process fails; what is there is kept.
    """
    trial = read_trial(fleet_toml, remote=remote)
    folder = _new_folder(out)
    console = Console(highlight=False)
    shutil.copy(fleet_toml, folder / "fleet.toml")
    write_toml(folder / "run.toml", trial.sections)
    facts: dict[str, Any] = {
        "fleet": fleet_toml.name, "run": trial.run.run.name, "began_at": time.time(),
        "remote": remote, "devices": {}, "bulk_tcp": {}, "outcome": "ended by an error",
    }  # fmt: skip
    tried = _Tried(trial, folder, facts)
    (folder / "versions.json").write_text(json.dumps(versions(), indent=1))
    try:
        if remote:
            _over_there(tried, console)
        else:
            _here(tried, console)
    except KeyboardInterrupt:
        facts["outcome"] = "ended by Ctrl-C"
        console.print("Ended; what is there is kept.")
    finally:
        _gather_logs(folder)
        _write(tried)
        words = write_report(folder)
    console.print(f"\n{escape(words)}\n")
    console.print(f"[bold]{escape(str(out))}[/]: report.md, ledger.parquet, links.parquet, logs")
    return {"finished": 0, "ended by Ctrl-C": 130}.get(facts["outcome"], 1)


def _new_folder(out: Path) -> Path:
    """An empty folder: results of an earlier trial are never replaced. Raises `FleetError`."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FleetError(f"{out} is there already and not empty; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    return out.resolve()


# --- on this machine ---


def _here(tried: _Tried, console: Console) -> None:
    trial, emulation = tried.trial, choose()
    shaped = [d for d in trial.devices if d.link is not None]
    told = emulation.words if shaped else "no links are emulated: devices dial loopback"
    console.print(f"{len(trial.devices)} devices on this machine; {told}.")
    tried.facts["emulation"] = told
    if emulation.means == "proxy" and any(d.link and d.link.lossy for d in shaped):
        console.print("[yellow]Some links lose packets in fleet.toml, and do not here.[/]")
    if trial.settings.bulk_tcp_s:
        _time_bulk(tried, shaped, emulation, console)
    fleet = LocalFleet(tried.folder / "fleet", trial.sections, [])
    with contextlib.ExitStack() as stack:
        setups, links = [], {}
        taken: list[int] = []
        for seed, device in enumerate(trial.devices):
            link = None
            if device.link is not None:
                taken.append(free_number(taken))
                name = f"{fleet.port}-{device.name}"
                made = emulation.link(name, taken[-1], fleet.port, device.link.at, seed)
                link = links[device.name] = stack.enter_context(made)
            cap, caps = _cap(device)
            if cap is not None:
                stack.callback(cap.close)
            setups.append(_setup(device, link, cap))
            words = "loopback" if device.link is None else device.link.words
            tried.facts["devices"][device.name] = {"link": words, "caps": caps}
            console.print(f"  {escape(device.name)}: {escape(words)}; {escape(caps)}")
        fleet.devices = setups
        tried.state = fleet.state
        stack.enter_context(LinkRecorder(links, tried.links))
        stack.enter_context(fleet)
        fleet.start()
        processes = list(fleet.processes)
        agents = [d.name for d in setups]

        def check() -> None:
            for name in processes:
                fleet.check(name)

        _follow(tried, fleet.state, check, console)
        until = time.monotonic() + GRACE_S
        while time.monotonic() < until and any(map(fleet.running, agents)):
            time.sleep(0.1)


def _cap(device: TrialDevice) -> tuple[KernelCap | None, str]:
    """The kernel's cap on a device, if any, and in words what holds it."""
    cpus = device.cpus
    cores = device.board.cpu.cores if device.board and device.board.cpu else None
    if cpus is None and cores is not None and cores < (os.cpu_count() or 1):
        cpus = float(cores)
    title = "" if device.board is None else f"{device.board.title}, "
    if device.memory_bytes is None and cpus is None:
        return None, "no caps"
    memory = device.memory_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    wanted = " and ".join(filter(None, [
        None if device.memory_bytes is None else f"{memory / 1e6:.0f} MB",
        None if cpus is None else f"{cpus:g} processors",
    ]))  # fmt: skip
    try:
        cap = KernelCap(f"sketchfleet-{device.name}", memory, cpus)
    except CapError as error:
        return None, f"{title}{wanted}: memory by the planner only, processors open: {error}"
    if cap.means == "rlimit":
        # A limit on the data segment counts what is reserved, which torch does far beyond use.
        cap.close()
        return None, f"{title}{wanted}: by the planner only, since no control group can be made"
    return cap, f"{title}{wanted} by {cap.means}, and by the planner"


def _setup(device: TrialDevice, link: EmulatedLink | None, cap: KernelCap | None) -> DeviceSetup:
    megabytes = None if device.memory_bytes is None else device.memory_bytes // 10**6
    title = "" if device.board is None else device.board.title
    return DeviceSetup(device.name, [], board=title, memory_mb=megabytes, cap=cap, network=link,
                       agent=device.agent)  # fmt: skip


def _time_bulk(
    tried: _Tried, shaped: list[TrialDevice], emulation: Emulation, console: Console
) -> None:
    """Plain TCP over every kind of link, once each."""
    seconds = tried.trial.settings.bulk_tcp_s
    by_kind: dict[str, list[TrialDevice]] = {}
    for device in shaped:
        assert device.link is not None
        by_kind.setdefault(device.link.words, []).append(device)
    for words, alike in by_kind.items():
        console.print(f"Timing plain TCP for {seconds:.0f} s: {escape(words)}")
        links = [device.link.at for device in alike if device.link is not None]
        found = bulk_tcp(emulation, links, seconds)
        for device in alike:
            tried.facts["bulk_tcp"][device.name] = asdict(found)


# --- machines out there ---


def _over_there(tried: _Tried, console: Console) -> None:
    names = [d.name for d in tried.trial.devices]
    fleet = RemoteFleet(tried.trial.run, tried.trial.sections, tried.folder, names)
    tried.facts["emulation"] = "machines of their own, over the links they have"
    tried.facts["devices"] = {name: {"link": "its own", "caps": "its own"} for name in names}
    tried.state = fleet.state
    with fleet:
        console.print(escape(fleet.words))
        if fleet.serves:
            console.print(f"Waiting for {', '.join(names)}; for those that have not joined yet: "
                          f"{escape(fleet.joining)}")  # fmt: skip
            _await_devices(tried, fleet.check, names, console)
        _follow(tried, fleet.state, fleet.check, console)
        fleet.farewell(GRACE_S)


def _await_devices(
    tried: _Tried, check: Callable[[], None], names: list[str], console: Console
) -> None:
    """Until every named device was heard of in this trial; tells of each."""
    assert tried.state is not None
    records, missing = open_state(tried.state)[0], set(names)
    try:
        while missing:
            check()
            for device in records.all_devices():
                if device.device_id in missing and device.last_seen_at >= tried.facts["began_at"]:
                    missing.remove(device.device_id)
                    console.print(f"  {escape(device.device_id)} is here")
            time.sleep(LOOK_EVERY_S)
    finally:
        records.close()


# --- both ---


def _follow(tried: _Tried, state: Path, check: Callable[[], None], console: Console) -> None:
    """Waits for the end of the run and tells of each round. Raises what `check` raises."""
    run_id, began = tried.trial.run.run.name, time.monotonic()
    at_most_s = tried.trial.settings.at_most_s
    records, told, estimated_at = open_state(state)[0], set(), began - ESTIMATES_EVERY_S
    try:
        while True:
            check()
            for r in records.all_rounds(run_id):
                if r.phase == "merged" and r.round not in told:
                    told.add(r.round)
                    words = _round_words(records, run_id, r.round)
                    console.print(f"{time.monotonic() - began:6.0f} s  {words}")
            run = records.run(run_id)
            finished = run is not None and run.finished_at is not None
            due = finished or time.monotonic() >= estimated_at + ESTIMATES_EVERY_S
            if tried.facts["remote"] and due:
                estimated_at = time.monotonic()
                tried.links += estimated_links(records.all_devices(), time.time())
            if finished:
                tried.facts["outcome"] = "finished"
                return
            if at_most_s is not None and time.monotonic() - began > at_most_s:
                tried.facts["outcome"] = f"ended after {at_most_s:.0f} s, as fleet.toml has it"
                return
            time.sleep(LOOK_EVERY_S)
    finally:
        records.close()


def _round_words(records: Records, run_id: str, round_: int) -> str:
    given = records.assignments(run_id, round_)
    done = [a for a in given if a.arrived]
    losses = [e.loss for a in done if a.report is not None
              and (e := a.report.evaluation("global", "received")) is not None]  # fmt: skip
    final = all(not a.assignment.trains for a in given)
    words = "last evaluation" if final else f"round {round_ + 1}"
    loss = f", fleet mean {sum(losses) / len(losses):.3f} nats per token" if losses else ""
    return f"{words}: {len(done)} of {len(given)} devices{loss}"


def _write(tried: _Tried) -> None:
    """Everything but the report, from the coordinator's records."""
    facts, run_id, state = tried.facts, tried.trial.run.run.name, tried.state
    facts["ended_at"] = time.time()
    rows: list[Row] = []
    if state is not None and (state / "coordinator.sqlite").is_file():
        records = open_state(state)[0]
        try:
            run = records.run(run_id)
            rows = ledger_rows(records, run_id, tried.links)
            if run is not None:
                report = build_report(records, run_id)
                facts["fairness"] = fairness_lines(report)
                (tried.folder / "report.json").write_text(json.dumps(report.plain(), indent=1))
        finally:
            records.close()
    write_parquet(tried.folder / "ledger.parquet", LEDGER, rows)
    write_parquet(tried.folder / "links.parquet", LINKS, tried.links)
    write_facts(tried.folder, Facts.model_validate(facts))


def _gather_logs(folder: Path) -> None:
    """The logs of all processes in one place, under the names of what wrote them."""
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    for path in (folder / "fleet").glob("*.log"):
        path.rename(logs / path.name)
    for path in (folder / "fleet").glob("*/state/trainer.log"):
        shutil.copy(path, logs / f"{path.parent.parent.name}.trainer.log")
