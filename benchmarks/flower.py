"""Flower's stock FedAvg against Sketchfleet: seconds from the first round until the same loss.

Both train the same adapter of the nano model on the demo's four devices, with the same batches a
device and round, in the same trainer, kept warm on both sides; each device sits in a network
namespace behind a link. Flower (its deployment engine: SuperLink, SuperNodes, `flwr run`) sends the
float32 factors. Losses are taken afterwards, of every version of the adapter, by the same code on
the same held-out sequences; the target is what Flower ends with. Bytes are those of IP packets that
the links delivered. Needs root, for the namespaces, and a package index, once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks._fleet_rounds import Fleet, Learning
from benchmarks._flower_environment import FOLDER, flower_commands
from benchmarks._flower_side import PATIENCE_S, play_flower
from benchmarks._race import LINKS, Run, Version, networks
from coordinator.serve import open_state
from coordinator.state import ADAPTER, StateFile
from profiles.errors import SketchfleetError
from trials.demo import NANO_CODE
from trials.fleet import LocalFleet
from trials.tunnel import unavailable

WIRE = {"update": "int4", "group": 64, "error_feedback": True, "delta": True, "slice": "int8",
        "global_adapter": "int8"}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One side in figures; None where the target was not reached. Seconds from the first round."""

    losses: tuple[float, ...]  # after one round, two, ...
    seconds: tuple[float, ...]
    startup_s: float
    rounds_to_target: int | None
    seconds_to_target: float | None
    up_bytes: int | None  # from the first round until then
    down_bytes: int | None
    startup_bytes: int  # both ways, before the first round


def result_of(run: Run, losses: Sequence[float], target: float) -> Result:
    """The figures of a run whose versions have these losses."""
    seconds = tuple(v.at - run.opened for v in run.versions)
    met = next((i for i, loss in enumerate(losses) if loss <= target), None)
    up = down = None
    before = moved_until(run.moved, run.opened)
    if met is not None:
        after = moved_until(run.moved, run.versions[met].at)
        up, down = after[0] - before[0], after[1] - before[1]
    return Result(
        losses=tuple(losses), seconds=seconds, startup_s=run.opened - run.began,
        rounds_to_target=None if met is None else run.versions[met].rounds,
        seconds_to_target=None if met is None else seconds[met],
        up_bytes=up, down_bytes=down, startup_bytes=sum(before),
    )  # fmt: skip


def moved_until(moved: Sequence[tuple[float, int, int]], at: float) -> tuple[int, int]:
    """Bytes up and down by then."""
    return next((m[1:] for m in reversed(moved) if m[0] <= at), (0, 0))


# --- Sketchfleet --------------------------------------------------------------------------------


def our_sections(learning: Learning, rounds: int) -> dict[str, dict[str, Any]]:
    """run.toml: every device trains all rows, and every round waits for every device."""
    c = learning
    return {
        "run": {"name": "wire", "seed": c.seed, "rounds": rounds},
        "model": {"base": str(NANO_CODE)},
        "adapter": {"rank": c.rank, "alpha": c.alpha},
        "method": {"name": "fedit"},
        "training": {
            "precision": c.precision, "sequence_tokens": c.sequence_tokens,
            "micro_batch": c.micro_batch, "local_steps": c.local_steps,
            "min_local_steps": c.local_steps, "learning_rate": c.learning_rate,
            "checkpointing": False,
        },
        "round": {"min_devices": 4, "gather_s": 1, "quorum": 1.0, "max_round_s": 600},
        "wire": WIRE,
        "evaluation": {"every_rounds": 1000, "sequences": 1, "held_out_share": c.held_out_share},
    }  # fmt: skip


def play_ours(fleet: Fleet, folder: Path, *, rounds: int, shaped: bool) -> Run:
    """A real coordinator and real agents, each in its namespace."""
    names = [device.name for device in fleet.devices]
    with contextlib.ExitStack() as stack:
        local = LocalFleet(folder, our_sections(fleet.learning, rounds), fleet.devices)
        net = stack.enter_context(networks(shaped, local.port, names))
        stack.enter_context(local)
        began = time.time()
        local.start_coordinator()
        local.await_token()
        for device, network in zip(fleet.devices, net.nets, strict=True):
            local.start_agent(replace(device, memory_mb=None, up="", down="", network=network))
        records, blobs = open_state(local.state)
        stack.callback(records.close)
        local.await_finish(records, PATIENCE_S)
        moved = net.stop()
        history = [r for r in records.all_rounds("wire") if not r.evaluate_only]
        versions = []
        for r in history:
            found = records.model("wire", r.round + 1)
            assert found is not None and r.merged_at is not None
            blob = found[1][ADAPTER]
            kept = folder / f"round-{r.round + 1}.bin"
            kept.write_bytes(blobs.path(blob.digest).read_bytes())
            versions.append(Version(r.round + 1, r.merged_at, StateFile(kept, blob.payload)))
        seeds = {
            name: [
                a.assignment.seed
                for a in records.assignments("wire")
                if a.assignment.device_id == name and a.assignment.trains
            ]
            for name in names
        }
    return Run(began, history[0].opened_at, tuple(versions), moved, seeds)


# --- both ---------------------------------------------------------------------------------------


def compare(
    fleet: Fleet, folder: Path, commands: Path, *, rounds: int, shaped: bool
) -> dict[str, Any]:
    """Both sides over the same links, on the same batches; Flower's last loss is the target.

    Sketchfleet may take one round more to get there.
    """
    folder.mkdir()
    ours = play_ours(fleet, folder / "ours", rounds=rounds + 1, shaped=shaped)
    theirs = play_flower(
        fleet, folder / "flower", commands, ours.seeds, rounds=rounds, shaped=shaped
    )
    losses = {
        name: [fleet.loss(version.file) for version in run.versions]
        for name, run in (("Flower", theirs), ("Sketchfleet", ours))
    }
    target = losses["Flower"][-1]
    found = {
        "Flower": result_of(theirs, losses["Flower"], target),
        "Sketchfleet": result_of(ours, losses["Sketchfleet"], target),
    }
    for name, result in found.items():
        print(row(name, result))
    ratio = ratio_of(found["Flower"].seconds_to_target, found["Sketchfleet"].seconds_to_target)
    told = "Sketchfleet did not get there" if ratio is None else f"Flower / Sketchfleet {ratio:.1f}"
    print(f"time to a loss of {target:.4f}: {told}")
    return {"target": target, "ratio": ratio, **{n: asdict(r) for n, r in found.items()}}


def ratio_of(theirs: float | None, ours: float | None) -> float | None:
    """How many times as long the peer took; None where one did not get there."""
    return None if theirs is None or ours is None else theirs / ours


HEAD = (f"{'':12} {'startup s':>9} {'MB':>6} {'rounds':>6} {'s to target':>11} "
        f"{'s a round':>9} {'up MB':>7} {'down MB':>8}  loss after each round")  # fmt: skip


def row(name: str, r: Result) -> str:
    """A line of the table."""
    up, down = (f"{b / 1e6:.2f}" if b is not None else "-" for b in (r.up_bytes, r.down_bytes))
    met = "-" if r.seconds_to_target is None else f"{r.seconds_to_target:.1f}"
    losses = " ".join(f"{loss:.4f}" for loss in r.losses)
    return (f"{name:12} {r.startup_s:9.1f} {r.startup_bytes / 1e6:6.2f} "
            f"{r.rounds_to_target or '-':>6} {met:>11} {r.seconds[-1] / len(r.seconds):9.1f} "
            f"{up:>7} {down:>8}  {losses}")  # fmt: skip


def main() -> None:
    """Prints a table for each kind of link and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--environment", type=Path, default=FOLDER, help="where Flower goes")
    parser.add_argument("--keep", type=Path, help="a new folder for logs and adapters")
    options = parser.parse_args()
    if (why := unavailable()) is not None:
        raise SystemExit(why)
    learning = Learning(
        local_steps=3 if options.quick else 20, evaluation_sequences=8 if options.quick else 24
    )
    rounds = 1 if options.quick else 3
    found = {}
    try:
        commands = flower_commands(options.environment)
        with tempfile.TemporaryDirectory() as scratch:
            folder = (options.keep or Path(scratch) / "runs").resolve()
            folder.mkdir(parents=True)
            fleet = Fleet(learning, folder)
            print(f"{len(fleet.devices)} devices, rounds of {learning.tokens} tokens each, "
                  f"adapter of {4 * fleet.values / 1e6:.2f} MB in float32")  # fmt: skip
            for kind in ("unshaped", "links")[: 1 if options.quick else 2]:
                shaped = kind == "links"
                print(f"\n{kind}{': ' + ', '.join(LINKS) if shaped else ''}\n{HEAD}", flush=True)
                found[kind] = compare(fleet, folder / kind, commands, rounds=rounds, shaped=shaped)
    except SketchfleetError as error:
        raise SystemExit(str(error)) from error
    print(json.dumps({"benchmark": "flower", "rounds": rounds, "tokens": learning.tokens,
                      "results": found}))  # fmt: skip


if __name__ == "__main__":
    main()
