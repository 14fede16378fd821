"""One idle exchange, slice down and update up, against the same bytes over a bare TCP connection.

A real coordinator process, the agent's own link code, loopback; a fake device that does not train.
What is left over the floor is what the protocol costs: calls, checksums, files, fsync, SQLite.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks.packing import make_factors
from edge_agent.link import Link
from profiles.device import ComputeProfile, DeviceProfile
from profiles.link import LinkProfile
from protos.contract import AdapterSpec, Assignment, LocalReport, from_message
from protos.packing import pack
from protos.sketchfleet.v1 import fleet_pb2 as pb
from protos.transfer import sha256_of
from protos.unpacking import unpack
from trials.fleet import LocalFleet

CONFIG = {
    "model_type": "qwen2", "hidden_size": 896, "num_attention_heads": 14,
    "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936,
    "tie_word_embeddings": True,
}  # fmt: skip


def fake_base(folder: Path, layers: int) -> Path:
    """A folder with the dimensions of Qwen2.5-0.5B and none of its weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"x": np.zeros(1, np.float32)}, folder / "model.safetensors")
    return folder


def profile(base_digest: str) -> DeviceProfile:
    """A device that can afford everything."""
    compute = ComputeProfile(base_digest, "nf4", 1e6, 1e7, 10**8, 10**8, 4, 128, 1)
    link = LinkProfile(1e10, 1e10, 1e-4)
    return DeviceProfile("bench", "bench", 8, 2**38, 2**38, 2**38, "0", compute=compute, link=link)


async def exchange(fleet: LocalFleet, folder: Path) -> dict[str, float]:
    """Seconds and bytes of fetching the slice and pushing the update."""
    link = Link(f"127.0.0.1:{fleet.port}")
    await link.enroll((fleet.state / "join-token").read_text().strip(), "bench", "0", 10)
    answer = await link.next_task(None, "", 0, 10)
    spec = from_message(answer.spec, AdapterSpec)
    known = profile(spec.base_digest)
    while answer.kind != pb.NextTaskResponse.KIND_ASSIGNMENT:
        answer = await link.next_task(known, "", 10, 10)
    task = from_message(answer.assignment, Assignment)
    (slice_,) = task.slice
    begun = time.perf_counter()
    path = await link.fetch(slice_, folder)
    fetch_s = time.perf_counter() - begun
    received = unpack(path.read_bytes(), spec, slice_.payload)
    assert received.keys() == {m.name for m in spec.modules}
    update = folder / "update"
    update.write_bytes(pack(spec, task.update, make_factors(spec), assignment_digest=task.digest))
    digest = sha256_of(update)
    begun = time.perf_counter()
    await link.push(task.assignment_id, digest, update)
    push_s = time.perf_counter() - begun
    await link.report(LocalReport(task.assignment_id, "done", train_examples=1), 10)
    await link.close()
    return {"fetch_s": fetch_s, "fetch_bytes": slice_.size_bytes, "push_s": push_s,
            "push_bytes": update.stat().st_size}  # fmt: skip


def bare_tcp_s(size_bytes: int) -> float:
    """Seconds to send these bytes over loopback to a reader that throws them away."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drain() -> None:
            connection, _ = server.accept()
            left = size_bytes
            while left:
                left -= len(connection.recv(1 << 20))
            connection.sendall(b"x")
            connection.close()

        reader = threading.Thread(target=drain)
        reader.start()
        data = bytes(size_bytes)
        begun = time.perf_counter()
        with socket.create_connection(server.getsockname()) as client:
            client.sendall(data)
            client.recv(1)
        seconds = time.perf_counter() - begun
        reader.join()
    return seconds


def main() -> None:
    """Prints the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = fake_base(folder / "base", layers=4 if quick else 24)
        run: dict[str, dict[str, Any]] = {
            "run": {"name": "bench", "rounds": 1},
            "model": {"base": str(base)},
            "adapter": {"rank": 32},
            "training": {"sequence_tokens": 128, "micro_batch": 1, "local_steps": 1},
            "round": {"min_devices": 1, "gather_s": 0, "round_s": 600},
        }
        with LocalFleet(folder / "fleet", run, []) as fleet:
            fleet.start_coordinator()
            fleet.await_token()
            found = asyncio.run(exchange(fleet, folder))
    print(f"{'direction':10} {'MB':>8} {'seconds':>9} {'MB/s':>8} {'bare TCP s':>11} {'ratio':>7}")
    results = {}
    for name in ("fetch", "push"):
        size, seconds = int(found[f"{name}_bytes"]), found[f"{name}_s"]
        floor_s = min(bare_tcp_s(size) for _ in range(3))
        results[name] = {"bytes": size, "seconds": seconds, "over_bare_tcp": seconds / floor_s}
        print(f"{name:10} {size / 1e6:8.1f} {seconds:9.3f} {size / 1e6 / seconds:8.0f} "
              f"{floor_s:11.4f} {seconds / floor_s:7.1f}")  # fmt: skip
    print(json.dumps({"benchmark": "exchange", "results": results}))


if __name__ == "__main__":
    main()
