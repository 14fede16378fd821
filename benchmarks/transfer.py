"""Moving updates and slices, many clients at once, against bare gRPC streams of the same bytes.

A real coordinator process and the agent's own link code on loopback; devices are fake and do not
train. The bare peer is a gRPC server (asyncio, as ours) that takes a stream of 128 KiB messages and
throws them away, or sends them, with no files, checksums, or accounts. Both run one server process
and one client process. `throughput` is bytes of all clients over the seconds from the first call
to the last answer; `of bare` is ours over the peer's in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.exchange import fake_base, profile
from benchmarks.merge import resident_bytes
from edge_agent.link import Link
from profiles.model import ModuleShape
from protos.contract import AdapterSpec, Assignment, BlobRef, LocalReport, from_message
from protos.layout import Parts
from protos.packing import pack
from protos.sketchfleet.v1 import fleet_pb2 as pb
from protos.transfer import sha256_of
from trials.fleet import LocalFleet

MIB = 2**20
BARE_CHUNK_BYTES = 128 * 1024
GENERIC = "/bare.Bare/"


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


# --- the peer -----------------------------------------------------------------------------------


async def _bare_server(port: Any) -> None:
    async def take(messages: AsyncIterator[bytes], context: Any) -> bytes:
        received = 0
        async for message in messages:
            received += len(message)
        return str(received).encode()

    async def give(request: bytes, context: Any) -> AsyncIterator[bytes]:
        block, left = bytes(BARE_CHUNK_BYTES), int(request)
        while left > 0:
            yield block[:left]
            left -= len(block)

    server = grpc.aio.server()
    handlers = {
        "Take": grpc.stream_unary_rpc_method_handler(take),
        "Give": grpc.unary_stream_rpc_method_handler(give),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Bare", handlers),))
    port.send(server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    await server.wait_for_termination()


def _run_bare_server(port: Any) -> None:
    asyncio.run(_bare_server(port))


async def _bare(case: Case, port: int) -> Speeds:
    block = bytes(BARE_CHUNK_BYTES)

    async def messages() -> AsyncIterator[bytes]:
        for start in range(0, case.size_bytes, BARE_CHUNK_BYTES):
            yield block[: case.size_bytes - start]

    async def up(channel: Any) -> None:
        answer = await channel.stream_unary(GENERIC + "Take")(messages())
        assert int(answer) == case.size_bytes

    async def down(channel: Any) -> None:
        received = 0
        async for message in channel.unary_stream(GENERIC + "Give")(str(case.size_bytes).encode()):
            received += len(message)
        assert received == case.size_bytes

    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) for _ in range(case.clients)
    ]
    for channel in channels:
        await channel.channel_ready()
    seconds = []
    for work in (up, down):
        began = time.perf_counter()
        await asyncio.gather(*(work(channel) for channel in channels))
        seconds.append(time.perf_counter() - began)
    for channel in channels:
        await channel.close(None)
    total = case.clients * case.size_bytes
    return Speeds(total / seconds[0], total / seconds[1])


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


async def _ours(case: Case, fleet: LocalFleet, folder: Path) -> tuple[Speeds, int]:
    """The speeds, and the bytes that a client really moved up."""
    token = (fleet.state / "join-token").read_text().strip()
    links = [Link(f"127.0.0.1:{fleet.port}") for _ in range(case.clients)]
    tasks: list[Assignment] = []
    specs: list[AdapterSpec] = []

    async def join(number: int) -> None:
        link = links[number]
        await link.enroll(token, f"device-{number:03}", "0", 30)
        answer = await link.next_task(None, "", 0, 30)
        spec = from_message(answer.spec, AdapterSpec)
        while answer.kind != pb.NextTaskResponse.KIND_ASSIGNMENT:
            answer = await link.next_task(profile(spec.base_digest), "", 10, 30)
        tasks.append(from_message(answer.assignment, Assignment))
        specs.append(spec)
        joined[tasks[-1].assignment_id] = link

    joined: dict[str, Link] = {}
    await asyncio.gather(*(join(number) for number in range(case.clients)))
    spec = specs[0]
    updates: list[tuple[Assignment, Path, str]] = []
    for task in tasks:
        path = folder / f"{task.device_id}.update"
        path.write_bytes(_update(spec, task))
        updates.append((task, path, sha256_of(path)))

    async def down(task: Assignment) -> None:
        blob: BlobRef = task.slice[0]
        own = folder / task.device_id
        own.mkdir()
        await joined[task.assignment_id].fetch(blob, own)

    async def up(task: Assignment, path: Path, digest: str) -> None:
        await joined[task.assignment_id].push(task.assignment_id, digest, path)

    began = time.perf_counter()
    await asyncio.gather(*(down(task) for task in tasks))
    down_s = time.perf_counter() - began
    began = time.perf_counter()
    await asyncio.gather(*(up(*update) for update in updates))
    up_s = time.perf_counter() - began
    sent = sum(path.stat().st_size for _, path, _ in updates)
    fetched = sum(task.slice[0].size_bytes for task in tasks)
    for task in tasks:
        link = joined[task.assignment_id]
        await link.report(LocalReport(task.assignment_id, "done", train_examples=1), 10)
    for link in links:
        await link.close()
    return Speeds(sent / up_s, fetched / down_s), sent // case.clients


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


def measure(case: Case, layers: int) -> dict[str, Any]:
    """One case, ours beside the peer."""
    rank = rank_for(case.size_bytes, layers)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = fake_base(folder / "base", layers=layers)
        with LocalFleet(folder / "fleet", run_section(base, case, rank), []) as fleet:
            fleet.start_coordinator()
            fleet.await_token()
            pid = fleet.processes["coordinator"].pid
            before = resident_of(pid)
            ours, sent = asyncio.run(_ours(case, fleet, folder))
            grown = peak_of(pid) - before
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    server = context.Process(target=_run_bare_server, args=(sender,), daemon=True)
    server.start()
    bare = asyncio.run(_bare(Case(case.clients, sent), receiver.recv()))
    server.terminate()
    return {
        "clients": case.clients, "bytes_each": sent, "ours": asdict(ours), "bare": asdict(bare),
        "up_of_bare": ours.up / bare.up, "down_of_bare": ours.down / bare.down,
        "coordinator_growth_bytes": grown,
    }  # fmt: skip


def resident_of(pid: int) -> int:
    """Resident bytes of a process."""
    return _status(pid, "VmRSS")


def peak_of(pid: int) -> int:
    """The most it ever was."""
    return _status(pid, "VmHWM")


def _status(pid: int, what: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/status has no {what}")


def main() -> None:
    """Prints the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer clients and bytes")
    quick = parser.parse_args().quick
    cases = [Case(4, 4 * MIB)] if quick else [Case(8, 20 * MIB), Case(100, 1 * MIB)]
    print(f"{'clients':>8} {'MiB each':>9} {'up MB/s':>8} {'of bare':>8} {'down MB/s':>10} "
          f"{'of bare':>8} {'growth MB':>10}")  # fmt: skip
    results = []
    for case in cases:
        layers = 24 if case.size_bytes > 4 * MIB else 2
        found = measure(case, layers)
        results.append(found)
        print(f"{case.clients:8} {found['bytes_each'] / MIB:9.1f} {found['ours']['up'] / 1e6:8.0f} "
              f"{found['up_of_bare']:8.2f} {found['ours']['down'] / 1e6:10.0f} "
              f"{found['down_of_bare']:8.2f} {found['coordinator_growth_bytes'] / 1e6:10.1f}",
              flush=True)  # fmt: skip
    print(json.dumps({"benchmark": "transfer", "agent_bytes": resident_bytes("VmHWM"),
                      "results": results}))  # fmt: skip


if __name__ == "__main__":
    main()
