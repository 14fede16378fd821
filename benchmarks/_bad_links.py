"""Transfers under duress: beside slow clients, in one agent's memory, over a bad link."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks._fleet_case import Case, coordinator, join_words
from benchmarks._one_agent import resident_bytes
from benchmarks._our_clients import Joined, join
from edge_agent.pace import Pace
from profiles.trace import LinkState, Outage, steady
from protos.contract import to_plain
from trials.fleet import LocalFleet, environment

SLOW_BPS = 64_000.0
FAST = 8  # clients alone, and as many beside the slow ones
WORST = steady(LinkState(1e6, 1e6, 0.15, 0.02), Outage(60, 20))


@dataclass(frozen=True)
class Speeds:
    """Bytes per second each way."""

    up: float
    down: float


async def _all_joined(fleet: LocalFleet, folder: Path, clients: int) -> list[Joined]:
    words = join_words(fleet, clients)

    async def one(number: int) -> Joined:
        joined = await join(f"127.0.0.1:{fleet.port}", words, f"device-{number:03}", folder)
        await joined.link.probe(metered=True)
        return joined

    return list(await asyncio.gather(*map(one, range(clients))))


def measure_slow(slow: int, size_bytes: int) -> dict[str, Any]:
    """Fast clients alone, then beside `slow` others that fetch and push at 64 kbit/s."""
    with coordinator(Case(slow + 2 * FAST, size_bytes)) as (fleet, folder):
        return asyncio.run(_beside_slow(fleet, folder, slow))


async def _beside_slow(fleet: LocalFleet, folder: Path, slow: int) -> dict[str, Any]:
    joined = await _all_joined(fleet, folder, slow + 2 * FAST)
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
        env=environment(),
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


async def _joined_and_hung_up(fleet: LocalFleet, folder: Path, clients: int) -> list[Joined]:
    joined = await _all_joined(fleet, folder, clients)
    for device in joined:
        await device.link.close()
    return joined


def measure_link(size_bytes: int) -> dict[str, Any]:
    """A fetch and a push at once, each over a bad link of its own, then plain TCP likewise."""
    from trials.bulk import bulk_tcp
    from trials.emulation import choose, free_number

    emulation = choose()
    with (
        coordinator(Case(2, size_bytes), secured=True) as (fleet, folder),
        contextlib.ExitStack() as stack,
    ):
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
