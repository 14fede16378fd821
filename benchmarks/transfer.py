"""Moving updates and slices, many clients at once, against bare gRPC streams of the same bytes.

A real coordinator process and the agent's own link code on loopback; devices are fake and do not
train. `throughput` is bytes of all clients over the seconds from the first call to the last answer:
for us that is the receipt, with the update hashed, synced to disk, decoded, checked and entered in
the database. Both sides run one server process and one client process, in plain text; what mutual
TLS costs beside that, `--tls` measures.

`of bare`: over a plain gRPC program that throws its messages away, at its best message size.
`of files`: over the same program reading, writing and hashing files (`_bare_grpc`).
All by turns, five times; ratios are medians of those of a turn (lowest and highest beside them).
`--tls`: mutual TLS against plain text, and what a new connection takes.
`--slow`: a fast client beside 200 slow ones. `--agent`: what an agent's network process holds.
`--link`: over 1 Mbit/s, 300 ms, 2 % loss and outages, against plain TCP; needs root.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._bare_grpc import bare_rates
from benchmarks._one_agent import resident_bytes
from benchmarks.exchange import fake_base, profile
from edge_agent.identity import Identity
from edge_agent.joining import enroll
from edge_agent.link import Link
from edge_agent.pace import Pace
from profiles.model import ModuleShape
from profiles.trace import LinkState, Outage, steady
from protos.contract import AdapterSpec, Assignment, BlobRef, LocalReport, from_message, to_plain
from protos.layout import Parts
from protos.packing import pack
from protos.sketchfleet.v1 import fleet_pb2 as pb
from protos.transfer import sha256_of
from trials.fleet import LocalFleet

MIB = 2**20
BARE_MESSAGE_BYTES = (128 * 1024, 512 * 1024, MIB)
SLOW_BPS = 64_000.0
FAST = 8  # clients alone, and as many beside the slow ones
WORST = steady(LinkState(1e6, 1e6, 0.15, 0.02), Outage(60, 20))


@dataclass(frozen=True)
class Case:
    """So many clients, each moving about so many bytes in either direction."""

    clients: int
    size_bytes: int


@dataclass(frozen=True)
class Speeds:
    """Bytes per second of all clients together."""

    up: float
    down: float


# --- ours ---------------------------------------------------------------------------------------


def _update(spec: AdapterSpec, task: Assignment) -> bytes:
    """Any values do; every device sends other ones."""
    draw = np.random.default_rng(task.seed)
    k = task.rank
    sides: dict[str, Parts] = {
        m.name: {
            "up": draw.standard_normal((k, m.out_features), np.float32),
            "down": draw.standard_normal((k, m.in_features), np.float32),
        }
        for m in spec.modules
    }
    return pack(spec, task.update, sides, assignment_digest=task.digest)


@dataclass
class Joined:
    """An enrolled device with its assignment and a packed update."""

    link: Link
    spec: AdapterSpec
    task: Assignment
    update: Path
    digest: str
    fetched: Path  # a folder
    shown: str  # the folder of its identity; in plain text its credential

    @property
    def slice(self) -> BlobRef:
        """Its slice, which is one file."""
        (blob,) = self.task.slice
        return blob

    async def down(self) -> None:
        """Fetches the slice."""
        await self.link.fetch(self.slice, self.fetched)

    async def up(self) -> None:
        """Pushes the update."""
        await self.link.push(self.task.assignment_id, self.digest, self.update)


async def join(fleet: LocalFleet, folder: Path, clients: int) -> list[Joined]:
    """So many devices with assignments; their links have been measured, as agents' are."""
    address = f"127.0.0.1:{fleet.port}"
    invitation = fleet.invitation(uses=clients) if fleet.secured else None

    async def one(number: int) -> Joined:
        name = f"device-{number:03}"
        if invitation is None:
            link = Link(address)
            token = (fleet.state / "join-token").read_text().strip()
            await link.enroll(token, name, "0", 60)
            shown = link.credential
        else:
            identity = Identity(folder / "identities" / name)
            await asyncio.to_thread(enroll, identity, invitation, name, "0", lambda: None, 60)
            link, shown = Link(address, None, identity.credentials), str(identity.folder)
        await link.probe(metered=True)
        answer = await link.next_task(None, "", 0, 60)
        spec = from_message(answer.spec, AdapterSpec)
        while answer.kind != pb.NextTaskResponse.KIND_ASSIGNMENT:
            answer = await link.next_task(profile(spec.base_digest), "", 10, 60)
        task = from_message(answer.assignment, Assignment)
        own = folder / task.device_id
        own.mkdir()
        return Joined(link, spec, task, own / "update", "", own, shown)

    joined = await asyncio.gather(*map(one, range(clients)))
    for device in joined:
        device.update.write_bytes(_update(device.spec, device.task))
        device.digest = sha256_of(device.update)
    return list(joined)


async def leave(joined: list[Joined]) -> None:
    """Reports, so that the round closes, and hangs up."""
    for device in joined:
        report = LocalReport(device.task.assignment_id, "done", train_examples=1)
        await device.link.report(report, 60)
        await device.link.close()


async def _ours(case: Case, fleet: LocalFleet, folder: Path) -> tuple[Speeds, int, int]:
    """The speeds, the bytes that a client moved up, and by how much the coordinator grew."""
    joined = await join(fleet, folder, case.clients)
    pid = fleet.processes["coordinator"].pid
    _forget_peak(pid)
    before = resident_bytes("VmRSS", pid)
    seconds = []
    for work in (Joined.down, Joined.up):
        began = time.perf_counter()
        await asyncio.gather(*map(work, joined))
        seconds.append(time.perf_counter() - began)
    grown = resident_bytes("VmHWM", pid) - before
    sent = sum(device.update.stat().st_size for device in joined)
    fetched = sum(device.slice.size_bytes for device in joined)
    await leave(joined)
    return Speeds(sent / seconds[1], fetched / seconds[0]), sent // case.clients, grown


def _forget_peak(pid: int) -> None:
    """From here on VmHWM counts anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def run_section(base: Path, case: Case, rank: int) -> dict[str, dict[str, Any]]:
    """run.toml: every device gets the whole adapter, both ways in float32."""
    return {
        "run": {"name": "bench", "rounds": 1},
        "model": {"base": str(base)},
        "adapter": {"rank": rank},
        "method": {"name": "fedit"},
        "training": {"sequence_tokens": 128, "micro_batch": 1, "local_steps": 1},
        "wire": {"update": "float32", "slice": "float32"},
        "round": {"min_devices": case.clients, "gather_s": 0, "round_s": 3000,
                  "max_round_s": 3600},
        "evaluation": {"every_rounds": 1000},
    }  # fmt: skip


def rank_for(size_bytes: int, layers: int) -> int:
    """The rank at which an adapter of the fake base has about this size in float32."""
    shapes = {"q": (896, 896), "k": (128, 896), "v": (128, 896), "o": (896, 896),
              "gate": (4864, 896), "up": (4864, 896), "down": (896, 4864)}  # fmt: skip
    modules = tuple(
        ModuleShape(f"{i}.{name}", *shape) for i in range(layers) for name, shape in shapes.items()
    )
    each = 4 * sum(m.out_features + m.in_features for m in modules)
    return max(1, round(size_bytes / each))


@contextlib.contextmanager
def coordinator(case: Case, *, secured: bool = False) -> Iterator[tuple[LocalFleet, Path]]:
    """A coordinator that serves such a case, and a folder for its devices."""
    layers = 24 if case.size_bytes > 4 * MIB else 2
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = fake_base(folder / "base", layers=layers)
        run = run_section(base, case, rank_for(case.size_bytes, layers))
        with LocalFleet(folder / "fleet", run, [], secured=secured) as fleet:
            fleet.start_coordinator()
            fleet.await_token()
            yield fleet, folder


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """One case, ours and the peer's two kinds by turns; medians."""
    found = [_once(case) for _ in range(repeats)]
    ratios = {key: [f[key] for f in found] for key in found[0] if "_of_" in key}
    return {
        "clients": case.clients, "bytes_each": found[0]["bytes_each"],
        "ours": {way: statistics.median(f["ours"][way] for f in found) for way in ("up", "down")},
        **{key: statistics.median(values) for key, values in ratios.items()},
        "ranges": {key: (min(values), max(values)) for key, values in ratios.items()},
        "coordinator_growth_bytes": max(f["coordinator_growth_bytes"] for f in found),
        "repeats": found,
    }  # fmt: skip


def _once(case: Case) -> dict[str, Any]:
    with coordinator(case) as (fleet, folder):
        ours, size, grown = asyncio.run(_ours(case, fleet, folder))
        files = sorted(folder.glob("device-*/update"))
        kinds = {
            f"{message // 1024} KiB": Speeds(*bare_rates(case.clients, size, message))
            for message in BARE_MESSAGE_BYTES
        }
        bare = Speeds(max(k.up for k in kinds.values()), max(k.down for k in kinds.values()))
        filed = Speeds(*bare_rates(case.clients, size, 512 * 1024, files, folder))
    return {
        "bytes_each": size, "ours": asdict(ours),
        "bare": {kind: asdict(speeds) for kind, speeds in kinds.items()}, "files": asdict(filed),
        "up_of_bare": ours.up / bare.up, "down_of_bare": ours.down / bare.down,
        "up_of_files": ours.up / filed.up, "down_of_files": ours.down / filed.down,
        "coordinator_growth_bytes": grown,
    }  # fmt: skip


# --- slow ones, one agent, a bad link -----------------------------------------------------------


async def _beside_slow(fleet: LocalFleet, folder: Path, slow: int) -> dict[str, Any]:
    """Fast clients alone, then beside `slow` others that fetch and push at 64 kbit/s."""
    joined = await join(fleet, folder, slow + 2 * FAST)
    others, alone, beside = joined[: -2 * FAST], joined[-2 * FAST : -FAST], joined[-FAST:]
    pid = fleet.processes["coordinator"].pid

    async def fast(devices: list[Joined]) -> Speeds:
        """One after the other; the median."""
        rates: dict[str, list[float]] = {"up": [], "down": []}
        for device in devices:
            began = time.perf_counter()
            await device.down()
            fetched = time.perf_counter()
            await device.up()
            rates["down"].append(device.slice.size_bytes / (fetched - began))
            rates["up"].append(device.update.stat().st_size / (time.perf_counter() - fetched))
        return Speeds(statistics.median(rates["up"]), statistics.median(rates["down"]))

    first = await fast(alone)
    before = resident_bytes("VmRSS", pid)
    for device in others:
        device.link.pace = Pace(SLOW_BPS)
    busy = [
        asyncio.create_task(device.down() if number % 2 else device.up())
        for number, device in enumerate(others)
    ]
    await asyncio.sleep(10)
    early = resident_bytes("VmRSS", pid)
    second = await fast(beside)
    await asyncio.sleep(10)
    late = resident_bytes("VmRSS", pid)
    still = sum(not task.done() for task in busy)
    for task in busy:
        task.cancel()
    await asyncio.gather(*busy, return_exceptions=True)
    for device in joined:
        await device.link.close()
    return {
        "slow": slow, "still_at_it": still, "alone": asdict(first), "beside": asdict(second),
        "up_ratio": second.up / first.up, "down_ratio": second.down / first.down,
        "growth_bytes": early - before, "later_growth_bytes": late - early,
    }  # fmt: skip


def _started(device: Joined, address: str, folder: Path, wrap: list[str], **task: Any) -> Any:
    """A process of `_one_agent` at work."""
    process = subprocess.Popen(
        [*wrap, sys.executable, "-m", "benchmarks._one_agent", address, device.shown,
         str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},  # noqa: PTH109 - where this runs
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(json.dumps(task))
    process.stdin.close()
    process.stdin = None
    return process


def _ended(process: Any) -> dict[str, Any]:
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError("an agent's process failed; see above")
    found: dict[str, Any] = json.loads(out)
    return found


def _pushes(device: Joined) -> dict[str, Any]:
    return {"assignment_id": device.task.assignment_id, "digest": device.digest,
            "update": str(device.update)}  # fmt: skip


def measure_agent(size_bytes: int) -> dict[str, Any]:
    """Resident bytes of an agent's network process, idle and while it moves an update."""
    with coordinator(Case(1, size_bytes), secured=True) as (fleet, folder):
        (device,) = asyncio.run(_joined_and_hung_up(fleet, folder, 1))
        address = f"127.0.0.1:{fleet.port}"
        blobs = [to_plain(device.slice)]
        return _ended(_started(device, address, device.fetched, [], blobs=blobs, **_pushes(device)))


def measure_tls(case: Case, repeats: int) -> dict[str, Any]:
    """Ours over mutual TLS, of ours in plain text by turns, and what a new connection takes."""
    ratios: dict[str, list[float]] = {"up": [], "down": []}
    connect_s: dict[bool, float] = {}
    for _ in range(repeats):
        speeds = {}
        for secured in (False, True):
            with coordinator(case, secured=secured) as (fleet, folder):
                speeds[secured], _, _ = asyncio.run(_ours(case, fleet, folder))
            with coordinator(Case(1, 4096), secured=secured) as (fleet, folder):
                connect_s[secured] = asyncio.run(_connecting(fleet, folder))
        ratios["up"].append(speeds[True].up / speeds[False].up)
        ratios["down"].append(speeds[True].down / speeds[False].down)
    return {"clients": case.clients, "bytes_each": case.size_bytes, "ratios": ratios,
            "connect_plain_s": connect_s[False], "connect_tls_s": connect_s[True]}  # fmt: skip


async def _connecting(fleet: LocalFleet, folder: Path) -> float:
    """Median seconds of the first small call over a new connection."""
    (device,) = await join(fleet, folder, 1)
    found = []
    for _ in range(20):
        if fleet.secured:
            link = Link(device.link.address, None, Identity(Path(device.shown)).credentials)
        else:
            link = Link(device.link.address)
            link.credential = device.shown
        found.append(await link.ping())
        await link.close()
    await leave([device])
    return statistics.median(found)


async def _joined_and_hung_up(fleet: LocalFleet, folder: Path, clients: int) -> list[Joined]:
    joined = await join(fleet, folder, clients)
    for device in joined:
        await device.link.close()
    return joined


def measure_link(size_bytes: int) -> dict[str, Any]:
    """A fetch and a push at once, each over a bad link of its own, then plain TCP likewise."""
    from trials.bulk import bulk_tcp
    from trials.emulation import choose, free_number

    emulation = choose()
    with coordinator(Case(2, size_bytes)) as (fleet, folder), contextlib.ExitStack() as stack:
        joined = asyncio.run(_joined_and_hung_up(fleet, folder, 2))
        numbers: list[int] = []
        processes = []
        for index, device in enumerate(joined):
            numbers.append(free_number(numbers))
            made = emulation.link(f"transfer-{index}", numbers[-1], fleet.port, WORST, seed=index)
            link = stack.enter_context(made)
            task = _pushes(device) if index == 0 else {"blobs": [to_plain(device.slice)]}
            processes.append(_started(device, link.address, device.fetched, link.wrap([]), **task))
        pushed, fetched = map(_ended, processes)
        up_bytes, down_bytes = joined[0].update.stat().st_size, joined[1].slice.size_bytes
    # Over as many seconds, so that plain TCP meets as many outages.
    up_tcp_bps = bulk_tcp(emulation, [WORST], pushed["push_s"]).up_bps
    down_tcp_bps = bulk_tcp(emulation, [WORST], fetched["fetch_s"]).down_bps
    up_bps, down_bps = 8 * up_bytes / pushed["push_s"], 8 * down_bytes / fetched["fetch_s"]
    return {
        "links": emulation.words, "up_bytes": up_bytes, "down_bytes": down_bytes,
        "up_bps": up_bps, "down_bps": down_bps, "up_tcp_bps": up_tcp_bps,
        "down_tcp_bps": down_tcp_bps,
        "up_of_tcp": up_bps / up_tcp_bps, "down_of_tcp": down_bps / down_tcp_bps,
        "resumes": pushed["resumes"] + fetched["resumes"],
        "resent_share": (pushed["resent_bytes"] + fetched["resent_bytes"])
        / (up_bytes + down_bytes),
    }  # fmt: skip


def main() -> None:
    """Prints tables and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer clients and bytes")
    parser.add_argument("--repeats", type=int, help="5, with --quick 1")
    for name in ("slow", "agent", "link", "tls"):
        parser.add_argument(f"--{name}", action="store_true", help="measure this instead")
    asked = parser.parse_args()
    results: dict[str, Any] = {}
    if asked.slow:
        clients, size = (20, MIB) if asked.quick else (200, 2 * MIB)
        with coordinator(Case(clients + 2 * FAST, size)) as (fleet, folder):
            results = found = asyncio.run(_beside_slow(fleet, folder, clients))
        print(f"a fast client beside {clients} slow ones: {found['up_ratio']:.2f} of its rate up, "
              f"{found['down_ratio']:.2f} down; the coordinator grew by "
              f"{found['growth_bytes'] / 1e6:.1f} MB, then by "
              f"{found['later_growth_bytes'] / 1e6:.1f} MB")  # fmt: skip
    elif asked.agent:
        results = found = measure_agent(20 * MIB)
        print(f"an agent's network process: {found['idle_bytes'] / 1e6:.1f} MB, at most "
              f"{found['peak_bytes'] / 1e6:.1f} MB while it moved 20 MiB each way")  # fmt: skip
    elif asked.tls:
        case = Case(4, 4 * MIB) if asked.quick else Case(8, 20 * MIB)
        found = results = measure_tls(case, asked.repeats or (1 if asked.quick else 5))
        up, down = (statistics.median(found["ratios"][way]) for way in ("up", "down"))
        print(f"{case.clients} clients over mutual TLS: {up:.2f} of the rate in plain text up, "
              f"{down:.2f} down; the first call over a new connection "
              f"{found['connect_tls_s'] * 1e3:.0f} ms, plain "
              f"{found['connect_plain_s'] * 1e3:.0f} ms")  # fmt: skip
    elif asked.link:
        results = found = measure_link(MIB if asked.quick else 4 * MIB)
        print(f"{found['links']}\nup {found['up_bps'] / 1e3:.0f} kbit/s, "
              f"{found['up_of_tcp']:.2f} of TCP; down {found['down_bps'] / 1e3:.0f} kbit/s, "
              f"{found['down_of_tcp']:.2f} of TCP; sent twice "
              f"{found['resent_share']:.2%}")  # fmt: skip
    else:
        cases = [Case(4, 4 * MIB)] if asked.quick else [Case(8, 20 * MIB), Case(100, 1 * MIB)]
        repeats = asked.repeats or (1 if asked.quick else 5)
        results["cases"] = [_told(measure(case, repeats)) for case in cases]
    print(json.dumps({"benchmark": "transfer", "results": results}))


def _told(found: dict[str, Any]) -> dict[str, Any]:
    print(f"{found['clients']} clients x {found['bytes_each'] / MIB:.1f} MiB, the coordinator grew "
          f"by {found['coordinator_growth_bytes'] / 1e6:.1f} MB")  # fmt: skip
    for way in ("up", "down"):
        of = {kind: (found[f"{way}_of_{kind}"], *found["ranges"][f"{way}_of_{kind}"])
              for kind in ("bare", "files")}  # fmt: skip
        print(f"  {way:5} {found['ours'][way] / 1e6:6.0f} MB/s   " + "   ".join(
            f"{mid:5.2f} of {kind} ({low:.2f} to {high:.2f})"
            for kind, (mid, low, high) in of.items()
        ), flush=True)  # fmt: skip
    return found


if __name__ == "__main__":
    main()
