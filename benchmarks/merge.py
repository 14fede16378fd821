"""Merging a round with every method: seconds, memory, and ratios to the floor and to dense merges.

Shapes of Qwen2.5-Coder-1.5B (28 layers, all seven projections), global rank 64, 20 devices. Methods
for unequal devices get ranks from 4 to 64, the others 64 everywhere. The floor is a memory copy of
all update bytes at the speed measured in the same run; beside it stands the ratio to only reading
the files once, which a merge cannot do without and which takes longer than a copy. The dense merge
forms every device's product (m x n), sums, and for methods that truncate takes a full SVD; it is
timed on one layer's distinct shapes and extrapolated. Each merge runs in a process of its own, so
its peak memory is its own; the time is the best of five runs that neither measure the aggregation
error nor attribute the merge to devices, whose cost (the best of two that do, less that) has its
own column. Updates lie in the temporary folder, and are synced before time counts. A memory file
system without huge pages reads at less than half the speed of a page cache with large folios.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

import coordinator.merge
from coordinator.aggregation_error import measure
from coordinator.contribution import Given, attribute
from coordinator.lowrank import Bundle, stack
from coordinator.merge import Merger, MergeResult, StoredUpdate
from coordinator.methods import METHODS, Method, MethodOptions, UnknownMethodError, make
from coordinator.robust import Robust, require_fit
from coordinator.robust_rules import Rule
from coordinator.server_optimizer import Plain
from coordinator.state import StateFile, StateReader, write_initial
from coordinator.truncation import truncate
from profiles.model import ModuleShape
from protos.contract import AdapterSpec, Assignment, Encoding, Part, Payload
from protos.packing import PackedWriter

RANK = 64
RANKS = (4, 4, 4, 4, 8, 8, 8, 8, 16, 16, 16, 16, 24, 24, 32, 32, 48, 48, 64, 64)
SHAPES = {"q": (1536, 1536), "k": (256, 1536), "v": (256, 1536), "o": (1536, 1536),
          "gate": (8960, 1536), "up": (8960, 1536), "down": (1536, 8960)}  # fmt: skip
TRUNCATING = ("flexlora", "raflora", "florist", "fed-sb")
MEAN_FAMILY = ("fslora", "fedit", "zero-padding", "rbla", "ffa-lora", "rolora", "fedsa-lora",
               "fed-plora", "flasc", "hetlora")  # fmt: skip


def make_spec(layers: int) -> AdapterSpec:
    """The run of this benchmark."""
    modules = tuple(
        ModuleShape(f"layer.{i}.{name}", m, n)
        for i in range(layers) for name, (m, n) in SHAPES.items()
    )  # fmt: skip
    return AdapterSpec("bench", "bench", "", "0" * 64, RANK, 64.0, False, 1, modules)


def make_task(spec: AdapterSpec, method: Method, device: int, k: int, offset: int,
              encoding: Encoding) -> Assignment:  # fmt: skip
    """What the device was asked; only what the merge reads is real."""
    update = Payload(k, encoding, method.sent(0), method.density)
    scale = method.device_scale(spec, k)
    return Assignment(
        assignment_id=f"bench.0.device-{device:02}", run_id="bench", round=0,
        device_id=f"device-{device:02}", method=method.name, rank=k, rows=method.rows,
        sketch_offset=offset, alpha=scale * k, trained=method.trained(0),
        personal=method.personal, keeps_basis=True, keeps_state=False, error_feedback=False,
        fresh=method.fresh, precision="nf4", sequence_tokens=512, micro_batch=1, accumulation=1,
        checkpointing=False,
        local_steps=1, learning_rate=1e-3, optimizer="adamw", update=update,
        evaluation_sequences=1, held_out_share=0.1, evaluates_global=False, seed=device,
        deadline_s=60.0, reason="",
    )  # fmt: skip


def write_updates(
    folder: Path, spec: AdapterSpec, method: Method, encoding: Encoding
) -> list[StoredUpdate]:
    """One file per device; layers repeat the same draws, which no merge can tell."""
    ranks = RANKS if method.heterogeneous else (RANK,) * len(RANKS)
    offset, updates = 0, []
    for device, k in enumerate(ranks):
        task = make_task(spec, method, device, k, offset, encoding)
        task = dataclasses.replace(task, update=dataclasses.replace(task.update, density=1.0))
        draw = np.random.default_rng(device)
        parts: dict[str, dict[Part, Any]] = {}
        for name, (m, n) in SHAPES.items():
            parts[name] = {
                "up": (0.01 * draw.standard_normal((k, m), np.float32)),
                "down": (0.01 * draw.standard_normal((k, n), np.float32)),
            }
        path = folder / task.device_id
        with path.open("wb") as stream:
            writer = PackedWriter(stream, spec, task.update, assignment_digest=task.digest)
            for module in spec.modules:
                writer.write(module.name, parts[module.name.rpartition(".")[2]])
        updates.append(StoredUpdate(task.device_id, task, path, 1.0 + device % 5))
        offset += k
    return updates


def run_merge(
    folder: str, name: str, layers: int, encoding: Encoding, rule: Rule, out: Any
) -> None:
    """In a process of its own: seconds and growth of peak memory."""
    spec, root = make_spec(layers), Path(folder)
    method = make(name, MethodOptions(rank=RANK))
    work = root / name
    work.mkdir()
    updates = write_updates(work, spec, method, encoding)
    numbers = iter(range(10**6))

    def new_file(role: str) -> Path:
        return work / f"state-{next(numbers)}"

    files: dict[str, StateFile] = write_initial(spec, method, new_file)
    reader = StateReader(spec, files)
    merger = Merger(spec, method, Plain(), lambda round_: reader, new_file, Robust(rule))
    floor = sum(u.path.stat().st_size for u in updates)
    os.sync()  # or the merge would wait for the disk to take the updates
    read_s = min(read_seconds(updates) for _ in range(3))

    nothing = Given(np.zeros(len(updates)), np.zeros(len(updates)), 0.0)

    def seconds(*meters: Any) -> tuple[float, MergeResult]:
        vars(coordinator.merge).update(zip(("measure", "attribute"), meters, strict=True))
        began = time.perf_counter()
        result = merger.merge(0, 1, reader, updates)
        took = time.perf_counter() - began
        for file in result.files.values():
            file.path.unlink()
        return took, result

    reset_peak()
    began_bytes = resident_bytes("VmRSS")
    best = min(seconds(lambda *_: None, lambda *_: nothing)[0] for _ in range(5))
    measured = min((seconds(measure, attribute) for _ in range(2)), key=lambda run: run[0])
    peak = resident_bytes("VmHWM") - began_bytes
    out.send({
        "seconds": best, "read_s": read_s, "metering_s": max(0.0, measured[0] - best),
        "bytes": floor, "peak_bytes": peak, "error": measured[1].error, "exact": measured[1].exact,
    })  # fmt: skip


def read_seconds(updates: Sequence[StoredUpdate]) -> float:
    """Reading every update once from the page cache into the same memory."""
    memory = bytearray(1 << 20)
    began = time.perf_counter()
    for update in updates:
        with update.path.open("rb", buffering=0) as stream:
            while stream.readinto(memory):
                pass
    return time.perf_counter() - began


def resident_bytes(what: str) -> int:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {what}")


def reset_peak() -> None:
    """Sets VmHWM back to VmRSS (proc(5): clear_refs 5)."""
    Path("/proc/self/clear_refs").write_text("5")


def copy_speed() -> float:
    """Bytes per second of a memory copy, the best of a few."""
    source = np.ones(1 << 28, np.uint8)
    target = np.empty_like(source)
    best = np.inf
    for _ in range(4):
        began = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - began)
    return len(source) / float(best)


def dense_seconds(layers: int) -> dict[tuple[bool, bool], float]:
    """Extrapolated seconds of a dense merge of all layers, by (unequal ranks, with SVD)."""
    draw = np.random.default_rng(0)
    found = dict.fromkeys([(u, s) for u in (True, False) for s in (True, False)], 0.0)
    for shape in sorted({(min(s), max(s)) for s in SHAPES.values()}):
        m, n = shape
        count = layers * sum((min(s), max(s)) == shape for s in SHAPES.values())
        summed = {}
        for unequal in (True, False):
            began = time.perf_counter()
            total = np.zeros((m, n), np.float32)
            for k in RANKS if unequal else (RANK,) * len(RANKS):
                up = draw.standard_normal((k, m), np.float32)
                down = draw.standard_normal((k, n), np.float32)
                total += up.T @ down
            summed[unequal] = count * (time.perf_counter() - began)
        began = time.perf_counter()
        np.linalg.svd(total, full_matrices=False)
        svd_s = count * (time.perf_counter() - began)
        for unequal, with_svd in found:
            found[unequal, with_svd] += summed[unequal] + with_svd * svd_s
    return found


def against_dense_svd(ranks: tuple[int, ...]) -> dict[str, float]:
    """FlexLoRA's truncation on one 1536 x 8960 layer against NumPy's SVD of the dense product."""
    draw = np.random.default_rng(1)
    parts = [
        Bundle(
            draw.standard_normal((k, 1536), np.float32),
            draw.standard_normal((k, 8960), np.float32),
            64.0 / k,
        )
        for k in ranks
    ]
    weights = [1.0 / len(ranks)] * len(ranks)
    truncate(stack(parts, weights), RANK)  # threads and buffers warm
    began = time.perf_counter()
    ours = truncate(stack(parts, weights), RANK).bundle
    ours_s = time.perf_counter() - began
    began = time.perf_counter()
    dense = sum(w * p.scale * (p.up.T.astype(np.float64) @ p.down) for w, p in
                zip(weights, parts, strict=True))  # fmt: skip
    left, values, right = np.linalg.svd(dense, full_matrices=False)
    best = (left[:, :RANK] * values[:RANK]) @ right[:RANK]
    dense_s = time.perf_counter() - began
    error = float(np.linalg.norm(ours.dense() - best) / np.linalg.norm(best))
    return {"ours_s": ours_s, "dense_s": dense_s, "ratio": dense_s / ours_s, "error": error}


def main() -> None:
    """Prints the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two layers instead of 28")
    parser.add_argument("--methods", default="", help="names, comma-separated (default: all)")
    parser.add_argument("--encoding", default="float32", choices=["float32", "bfloat16", "int8"])
    parser.add_argument("--robust", default="none", choices=get_args(Rule),
                        help="merge by this rule, with the methods that take it")  # fmt: skip
    args = parser.parse_args()
    layers = 2 if args.quick else 28
    names = args.methods.split(",") if args.methods else list(METHODS)
    speed = copy_speed()
    print(f"memory copy: {speed / 1e9:.1f} GB/s; {layers} layers, 20 devices, {args.encoding}")
    dense = dense_seconds(layers)
    layer = against_dense_svd(RANKS)
    print(f"1536 x 8960, stacked rank {sum(RANKS)} -> {RANK}: {layer['ours_s']:.3f} s, dense SVD "
          f"{layer['dense_s']:.1f} s ({layer['ratio']:.0f}x), relative error "
          f"{layer['error']:.1e}")  # fmt: skip
    print(f"{'method':13} {'seconds':>8} {'x floor':>8} {'x read':>7} {'metering':>8} "
          f"{'dense/ours':>10} "
          f"{'peak MB':>8} {'allowed':>8}  aggregation error")  # fmt: skip
    results: dict[str, Any] = {}
    context = multiprocessing.get_context("spawn")
    for name in names:
        method = make(name, MethodOptions(rank=RANK))
        try:
            require_fit(args.robust, method)
        except UnknownMethodError as refusal:
            print(f"{name:13} {refusal}")
            continue
        receiver, sender = context.Pipe(duplex=False)
        with tempfile.TemporaryDirectory() as folder:
            child = context.Process(
                target=run_merge, args=(folder, name, layers, args.encoding, args.robust, sender)
            )
            child.start()
            sender.close()
            found = receiver.recv()
            child.join()
        ranks = RANKS if method.heterogeneous else (RANK,) * len(RANKS)
        widest = max(m + n for m, n in SHAPES.values())
        naive = dense[method.heterogeneous, name in TRUNCATING]
        found |= {
            "over_floor": found["seconds"] / (found["bytes"] / speed),
            "over_read": found["seconds"] / found["read_s"],
            "dense_over_ours": naive / found["seconds"],
            "allowed_bytes": sum(ranks) * widest * 4 + 200 * 10**6,
        }
        results[name] = found
        error = "-" if found["error"] is None else f"{found['error']:.2e}"
        how = "" if found["exact"] else " (estimated)"
        print(f"{name:13} {found['seconds']:8.2f} {found['over_floor']:8.1f} "
              f"{found['over_read']:7.1f} {found['metering_s']:8.2f} "
              f"{found['dense_over_ours']:10.0f} {found['peak_bytes'] / 1e6:8.0f} "
              f"{found['allowed_bytes'] / 1e6:8.0f}  {error}{how}", flush=True)  # fmt: skip
    print(json.dumps({
        "benchmark": "merge", "layers": layers, "encoding": args.encoding, "robust": args.robust,
        "copy_gb_per_s": speed / 1e9, "layer": layer, "results": results,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
