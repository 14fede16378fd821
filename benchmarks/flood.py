"""What a flood by one enrolled device costs the others: their rounds with it, over those without.

A real coordinator process on loopback, the agent's own link code, fake devices that rest instead of
training; and `_flooder`, one enrolled device that asks for everything at once and dials anew what
falls silent. By turns: rounds in peace, rounds in the flood; `ratio` is that of a pair's medians.

The flooder shares this machine's address and processors with those it attacks. It runs at nice 19,
so that it takes what they leave; `processor` says how much of one the coordinator used in either
case, which is what the flood costs wherever it comes from.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc

from benchmarks._fleet_case import join_words
from benchmarks._our_clients import enrolled, make_update
from benchmarks.exchange import fake_base, profile
from edge_agent.identity import Identity
from edge_agent.link import Link
from protos.contract import AdapterSpec, Assignment, LocalReport, from_message
from protos.sketchfleet.v1 import fleet_pb2 as pb
from protos.transfer import sha256_of
from trials.fleet import LocalFleet

DEVICES = 4
TRAIN_S = 1.0  # a round's training, in which a device only rests


@dataclass
class Rounds:
    """When each device began each round, seconds."""

    began: dict[int, float] = field(default_factory=dict)
    newest: int = -1

    def begins(self, number: int) -> None:
        """The first device that hears of a round begins it."""
        if number > self.newest:
            self.newest = number
            self.began[number] = time.monotonic()

    async def reach(self, number: int) -> None:
        """Waits for a round to begin."""
        while self.newest < number:
            await asyncio.sleep(0.01)


async def take_part(link: Link, folder: Path, rounds: Rounds) -> None:
    """A device's rounds, until it is cancelled."""
    known = None
    while True:
        answer = await link.next_task(known, "", 20, 60)
        known = None
        spec = from_message(answer.spec, AdapterSpec)
        if answer.kind == pb.NextTaskResponse.KIND_PROFILE:
            known = profile(spec.base_digest)
        if answer.kind != pb.NextTaskResponse.KIND_ASSIGNMENT:
            continue
        task = from_message(answer.assignment, Assignment)
        rounds.begins(task.round)
        for blob in task.blobs:
            await link.fetch(blob, folder)
        await asyncio.sleep(TRAIN_S)
        update = folder / "update"
        update.write_bytes(make_update(spec, task))
        await link.push(task.assignment_id, sha256_of(update), update)
        await link.report(LocalReport(task.assignment_id, "done", train_examples=1), 60)


async def dial(address: str, shown: str, took_s: list[float]) -> None:
    """Connects anew from the flooder's own address, again and again, until it is cancelled."""
    identity = Path(shown) if Path(shown).is_dir() else None
    own = [("grpc.use_local_subchannel_pool", 1)]  # no connection that is open already
    while True:
        begun = time.monotonic()
        if identity is None:
            channel = grpc.aio.insecure_channel(address, options=own)
        else:
            channel = grpc.aio.secure_channel(address, Identity(identity).credentials, options=own)
        try:
            await channel.channel_ready()
        finally:
            took_s.append(time.monotonic() - begun)
            await channel.close(None)
        await asyncio.sleep(0.5)


@contextlib.contextmanager
def flood(address: str, shown: str, how: str) -> Iterator[dict[str, int]]:
    """The flooder at work; afterwards, how often it tried what."""
    process = subprocess.Popen(
        ["nice", "-n", "19", sys.executable, "-m", "benchmarks._flooder", address, shown, how],
        stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.getcwd()},  # noqa: PTH109 - where this runs
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    tried: dict[str, int] = {}
    try:
        yield tried
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired, ValueError):
            out, _ = process.communicate(timeout=20)
            tried.update(json.loads(out))
        process.kill()
        process.wait()


def used_s(pid: int) -> float:
    """Seconds of a processor that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Stretch:
    """Some rounds, s; longest_s: of them and of the two before, in which it begins. processor: used
    of one.
    """

    median_s: float
    longest_s: float
    processor: float


async def stretch(rounds: Rounds, count: int, pid: int) -> Stretch:
    """`count` rounds from the next but one on, and the processor that `pid` uses in them."""
    under_way = rounds.newest
    await rounds.reach(under_way + 2)
    used, at = used_s(pid), time.monotonic()
    await rounds.reach(under_way + 2 + count)
    processor = (used_s(pid) - used) / (time.monotonic() - at)
    began = [rounds.began[n] for n in range(under_way, under_way + count + 3)]
    lengths = [after - before for before, after in itertools.pairwise(began)]
    return Stretch(statistics.median(lengths[2:]), max(lengths), processor)


async def measure(
    fleet: LocalFleet, folder: Path, pairs: int, count: int, how: str
) -> dict[str, Any]:
    """Pairs of stretches, one in peace and one in the flood."""
    address = f"127.0.0.1:{fleet.port}"
    words = join_words(fleet, DEVICES + 1)
    joined = [
        await enrolled(address, words, f"device-{number}", folder) for number in range(DEVICES + 1)
    ]
    links, shown = [link for link, _ in joined], joined[-1][1]
    rounds = Rounds()
    working = []
    for number, link in enumerate(links[:DEVICES]):
        own = folder / f"device-{number}"
        own.mkdir()
        working.append(asyncio.create_task(take_part(link, own, rounds)))
    pid = fleet.processes["coordinator"].pid
    found: list[dict[str, Any]] = []
    await rounds.reach(1)
    for _ in range(pairs):
        peace = await stretch(rounds, count, pid)
        begun = time.monotonic()
        took_s: list[float] = []
        with flood(address, shown, how) as tried:
            dialling = asyncio.create_task(dial(address, joined[0][1], took_s))
            flooded = await stretch(rounds, count, pid)
            dialling.cancel()
            await asyncio.gather(dialling, return_exceptions=True)
        ratio = flooded.median_s / peace.median_s
        found.append({
            "ratio": ratio, "peace": asdict(peace), "flood": asdict(flooded),
            "flood_lasted_s": time.monotonic() - begun, "dials_s": took_s, "tried": tried,
        })  # fmt: skip
        print(f"  {peace.median_s:.2f} s in peace (longest {peace.longest_s:.2f}), "
              f"{flooded.median_s:.2f} s in the flood (longest {flooded.longest_s:.2f}): "
              f"{ratio:.2f}; processor {peace.processor:.2f} -> {flooded.processor:.2f}; "
              f"{len(took_s)} dials from its address, {max(took_s):.1f} s at most",
              flush=True)  # fmt: skip
        for task in working:
            if task.done():
                task.result()
    for task in working:
        task.cancel()
    await asyncio.gather(*working, return_exceptions=True)
    for link in links:
        await link.close()
    ratios = [f["ratio"] for f in found]
    return {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
            "pairs": found}  # fmt: skip


def main() -> None:
    """Prints a line for each pair, one in all, and one of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one pair of three rounds each")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tls", action="store_true", help="everybody over mutual TLS")
    parser.add_argument("--how", choices=["all", "dials", "frames", "beneath"], default="all",
                        help="connections alone, frames of HTTP/2 that are no calls alone, or "
                        "calls and connections just beneath the limits")  # fmt: skip
    asked = parser.parse_args()
    pairs, count = (1, 3) if asked.quick else (asked.pairs, 6)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = fake_base(folder / "base", layers=2)
        run: dict[str, dict[str, Any]] = {
            "run": {"name": "bench", "rounds": 10_000},
            "model": {"base": str(base)},
            "adapter": {"rank": 8},
            "training": {"sequence_tokens": 128, "micro_batch": 1, "local_steps": 1},
            "round": {"min_devices": DEVICES, "gather_s": 0, "round_s": 60},
            "evaluation": {"every_rounds": 100_000},
        }
        with LocalFleet(folder / "fleet", run, [], secured=asked.tls) as fleet:
            fleet.start_coordinator()
            fleet.await_token()
            found = asyncio.run(measure(fleet, folder, pairs, count, asked.how))
    print(f"rounds of {DEVICES} devices in a flood by a fifth: {found['ratio']:.2f} times as long "
          f"({found['lowest']:.2f} to {found['highest']:.2f})")  # fmt: skip
    print(json.dumps({"benchmark": "flood", "how": asked.how, "tls": asked.tls, "results": found}))


if __name__ == "__main__":
    main()
