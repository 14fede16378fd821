"""Packing and unpacking of updates against copying the same floats, and sizes against the floor.

The floor of time is a memory copy of the float32 values in the same run; the floor of size is the
kept values at their bits, their scales and, in a sparse file, the entropy of which are kept. Both
are given as ratios.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import get_args

import numpy as np

from profiles.model import ModuleShape
from protos.contract import AdapterSpec, Encoding, Payload, UpdateBudget
from protos.fitting import fit
from protos.layout import Parts, codec_of, packed_bytes
from protos.packing import pack
from protos.unpacking import unpack

SPARSE_DENSITY = 1 / 16
GROUP = 64


def make_spec(layers: int, rank: int) -> AdapterSpec:
    """Shapes of Qwen2.5-0.5B's projections."""
    shapes = {"q": (896, 896), "k": (128, 896), "v": (128, 896), "o": (896, 896),
              "gate": (4864, 896), "up": (4864, 896), "down": (896, 4864)}  # fmt: skip
    modules = tuple(
        ModuleShape(f"layer.{i}.{name}", out, in_)
        for i in range(layers) for name, (out, in_) in shapes.items()
    )  # fmt: skip
    return AdapterSpec("bench", "bench", "", "0" * 64, rank, 16.0, False, 1, modules)


def make_factors(spec: AdapterSpec) -> dict[str, Parts]:
    """Normal values."""
    draw = np.random.default_rng(0)
    return {
        m.name: {
            "up": draw.normal(size=(spec.rank, m.out_features)).astype(np.float32),
            "down": draw.normal(size=(spec.rank, m.in_features)).astype(np.float32),
        }
        for m in spec.modules
    }


def best_s(work: Callable[[], object], times: int) -> float:
    """The least of several timings, seconds."""
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return min(found)


def copy_all(factors: Mapping[str, Parts]) -> None:
    """The floor of time."""
    for parts in factors.values():
        for values in parts.values():
            values.copy()


def floor_bytes(spec: AdapterSpec, payload: Payload) -> float:
    """The floor of size. Which values are kept is a fair draw at the density's entropy."""
    codec, share = codec_of(payload.encoding), payload.density
    values = payload.rank * spec.parameters_per_rank
    which = -sum(p * math.log2(p) for p in (share, 1 - share) if p > 0)  # bits per value
    scales = sum(
        codec.scale_bytes(payload.rank, columns, payload.group)
        for m in spec.modules for columns in (m.out_features, m.in_features)
    )  # fmt: skip
    return values * (share * codec.bits + which) / 8 + scales


def main() -> None:
    """Prints the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    spec = make_spec(layers=2 if quick else 24, rank=16)
    times = 2 if quick else 3
    factors = make_factors(spec)
    values = spec.rank * spec.parameters_per_rank
    payloads = {str(e): Payload(spec.rank, e) for e in get_args(Encoding)}
    encoding: Encoding
    for encoding in ("int4", "int2"):
        payloads[f"{encoding}/{GROUP}"] = Payload(spec.rank, encoding, group=GROUP)
    for encoding in ("int8", "int4", "int2"):
        payloads[f"{encoding} zstd"] = Payload(spec.rank, encoding, compressed=True)
    for encoding in ("float32", "int8", "int4"):
        payloads[f"{encoding} 1/16"] = Payload(spec.rank, encoding, density=SPARSE_DENSITY)
    for name in ("int8", "int4", "int2/64", "int4 1/16"):  # as updates with error feedback
        payloads[f"{name} near"] = payloads[name]
    floor_s = best_s(lambda: copy_all(factors), times)
    print(f"{values * 4 / 1e6:.1f} MB of float32; a copy takes {floor_s * 1e3:.1f} ms")
    print(f"{'payload':14} {'pack MB/s':>10} {'x copy':>7} {'unpack MB/s':>12} {'x copy':>7} "
          f"{'bytes/floor':>12} {'of float32':>11}")  # fmt: skip
    results = {}
    for name, payload in payloads.items():
        seed = None if name.endswith(" near") else 0
        data = pack(spec, payload, factors, seed=seed)
        assert len(data) <= packed_bytes(spec, payload)
        pack_s = best_s(partial(pack, spec, payload, factors, seed=seed), times)
        unpack_s = best_s(partial(unpack, data, spec, payload), times)
        results[name] = {
            "pack_mb_s": values * 4e-6 / pack_s,
            "pack_over_copy": pack_s / floor_s,
            "unpack_mb_s": values * 4e-6 / unpack_s,
            "unpack_over_copy": unpack_s / floor_s,
            "bytes_over_floor": len(data) / floor_bytes(spec, payload),
            "bytes_over_float32": len(data) / (4 * values),
        }
        r = results[name]
        print(f"{name:14} {r['pack_mb_s']:10.0f} {r['pack_over_copy']:7.1f} "
              f"{r['unpack_mb_s']:12.0f} {r['unpack_over_copy']:7.1f} "
              f"{r['bytes_over_floor']:12.5f} {r['bytes_over_float32']:11.4f}")  # fmt: skip
    terms = UpdateBudget(values // 8, ("bfloat16", "int8", "int4", "int2", "sign"), sparse=True)
    planned = Payload(spec.rank, "int8")
    fit_s = best_s(partial(fit, spec, planned, terms, factors, fed_back=True), times)
    print(f"choosing encoding and density for one bit a value: {fit_s:.2f} s before packing")
    print(json.dumps({
        "benchmark": "packing", "values": values, "fit_s": fit_s, "results": results,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
