"""Bytes of an adapter on the wire: over their floor, against Flower's, and what they cost in loss.

First, packed updates against the least that their values can take, on random values in the shape of
a real model and on real updates of the demo. Then whole runs of the demo's four devices, one for
each way of sending, on the same data and tokens: bytes up and down, the loss at the end (fleet mean
of the global adapter on held-out code, as the coordinator holds it), and both in one picture. The
peer of these runs is a dense float32 adapter as Flower sends it: every factor as a NumPy file, both
ways, each round.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np

from benchmarks._fleet_rounds import Fleet, Learning, Way
from benchmarks.packing import floor_bytes, make_factors
from profiles.models import load_models
from protos.codecs import CODECS
from protos.contract import AdapterSpec, Encoding, Payload
from protos.layout import Parts
from protos.packing import pack
from protos.unpacking import unpack

DENSITIES = (1.0, 1 / 4, 1 / 16, 1 / 64)
GROUPS = (0, 64, 512)
FLOOR = 1.02  # bytes over the floor, at most
WORSE = 1.01  # loss over that of float32, at most
FEWER = 30.0  # times fewer bytes than Flower's, at least
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "wire.png"

# Updates with what their packing lost added to the next; downlinks as differences. The encoding of
# slices says how close to the model a device's copy must be (`docs/wire-format.md`).
_coarse = partial(Way, group=64, error_feedback=True, delta=True)
WAYS: dict[str, Way] = {
    "float32": Way("float32", "float32"),
    "bfloat16": Way("bfloat16", "bfloat16"),
    "int8": Way("int8", "bfloat16", delta=True),
    "int4": _coarse("int4", "int8"),
    "int2": _coarse("int2", "int4"),
    "sign": _coarse("sign", "int4"),
    "sign/512": _coarse("sign", "int2", group=512),
    "int4, top 1/8": _coarse("int4", "int4", density=1 / 8),
    "budget of 1/16": Way("int8", "int4", error_feedback=True, delta=True, share=1 / 16),
    "budget of 1/32": Way("int8", "int4", error_feedback=True, delta=True, share=1 / 32),
    "int2, k = 16": _coarse("int2", "int4", rank=16),
    "sign, k = 16": _coarse("sign", "int4", rank=16),
    "int4, k = 8": _coarse("int4", "int4", rank=8),
    "int2, k = 8": _coarse("int2", "int4", rank=8),
}
QUICK = ("float32", "int2", "sign/512")


@dataclass(frozen=True)
class Outcome:
    """A run: bytes of all devices in all rounds, and the loss at its end, nats per token."""

    name: str
    up_bytes: int
    down_bytes: int
    loss: float


# --- the floor ----------------------------------------------------------------------------------


def payloads(rank: int) -> Iterator[tuple[str, Payload]]:
    """Every encoding, with every group it can have, at every density."""
    encoding: Encoding
    for encoding in get_args(Encoding):
        for group in GROUPS if CODECS[encoding].scaled else (0,):
            for density in DENSITIES:
                name = f"{encoding}{f'/{group}' if group else ''}"
                share = "" if density == 1 else f" 1/{1 / density:.0f}"
                yield name + share, Payload(rank, encoding, density=density, group=group)


def over_floor(spec: AdapterSpec, factors: Mapping[str, Parts]) -> dict[str, float]:
    """Bytes of these values over the floor, by payload."""
    return {
        name: len(pack(spec, payload, factors)) / floor_bytes(spec, payload)
        for name, payload in payloads(spec.rank)
    }


def real_shape(rank: int) -> AdapterSpec:
    """An adapter of all linears of a code model of half a billion parameters."""
    modules = load_models()["qwen2.5-coder-0.5b"].shape.modules(())
    return AdapterSpec("bench", "bench", "", "0" * 64, rank, 16.0, False, 1, modules)


def show_floor(found: Mapping[str, Mapping[str, float]]) -> float:
    """Prints a table of bytes over the floor; the highest of all."""
    columns = list(found)
    print(f"{'bytes / floor':14}" + "".join(f"{name:>24}" for name in columns))
    for payload in found[columns[0]]:
        print(f"{payload:14}" + "".join(f"{found[name][payload]:24.4f}" for name in columns))
    return max(ratio for ratios in found.values() for ratio in ratios.values())


# --- whole runs ---------------------------------------------------------------------------------


def flower_bytes(values: Mapping[str, Parts]) -> int:
    """Of an adapter as Flower sends it: each factor as a NumPy file, equal ones once."""
    files = set()
    for parts in values.values():
        for factor in parts.values():
            stream = io.BytesIO()
            np.save(stream, factor, allow_pickle=False)
            files.add(stream.getvalue())
    return sum(map(len, files))


def flower_run_bytes(fleet: Fleet, rounds: int) -> tuple[int, int]:
    """(up, down) of a run under Flower, without its messages around the factors."""
    file = fleet.initial()
    initial = unpack(file.path.read_bytes(), fleet.spec, file.payload)
    draw = np.random.default_rng(0)
    moved = {
        name: {part: draw.random(v.shape, dtype=np.float32) for part, v in parts.items()}
        for name, parts in initial.items()
    }
    dense, devices = flower_bytes(moved), len(fleet.devices)
    return devices * rounds * dense, devices * (flower_bytes(initial) + (rounds - 1) * dense)


def play(fleet: Fleet, name: str, rounds: int) -> Outcome:
    """One run of one way of sending."""
    found = fleet.play(WAYS[name], rounds, (rounds,))
    loss = found[-1].loss
    assert loss is not None
    return Outcome(name, sum(r.up_bytes for r in found), sum(r.down_bytes for r in found), loss)


def fewer(o: Outcome, peer: tuple[int, int]) -> dict[str, float]:
    """How many times fewer bytes than the peer's (up, down)."""
    up, down = peer
    return {
        "up": up / o.up_bytes,
        "down": down / o.down_bytes,
        "both": (up + down) / (o.up_bytes + o.down_bytes),
    }


def best(
    found: Sequence[Outcome], dense: float, peer: tuple[int, int]
) -> tuple[Outcome, float] | None:
    """The fewest bytes at a loss within the limit, and how many times fewer they are."""
    sound = [(o, fewer(o, peer)["both"]) for o in found if o.loss <= WORSE * dense]
    return max(sound, key=lambda pair: pair[1], default=None)


def line(o: Outcome, dense: float, peer: tuple[int, int]) -> str:
    """A row of the table."""
    times = fewer(o, peer)
    return (f"{o.name:14} {o.up_bytes / 1e6:8.3f} {o.down_bytes / 1e6:8.3f} {times['up']:7.1f} "
            f"{times['down']:7.1f} {times['both']:7.1f} {o.loss:8.4f} "
            f"{100 * (o.loss / dense - 1):+8.2f}")  # fmt: skip


HEAD = (f"{'way':14} {'up MB':>8} {'down MB':>8} {'x up':>7} {'x down':>7} {'x both':>7} "
        f"{'loss':>8} {'% worse':>8}")  # fmt: skip


def picture(
    found: Sequence[Outcome], before: float, peer: tuple[int, int], values: int, path: Path
) -> None:
    """Loss at the end against bits per value of the adapter and direction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    dense = next(o.loss for o in found if o.name == "float32")
    total = sum(peer)
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    kinds = {"whole": ("o", "C0"), "top": ("^", "C1"), "budget": ("D", "C3"), "k = ": ("s", "C2")}
    labels = {"whole": "all rows, all values", "top": "largest values only",
              "budget": "the least error within so many bytes of an update",
              "k = ": "so many of 32 rows a device and round"}  # fmt: skip
    for kind, (marker, colour) in kinds.items():
        mine = [o for o in found if _kind(o.name) == kind]
        axes.plot(
            [total / (o.up_bytes + o.down_bytes) for o in mine], [o.loss for o in mine],
            marker, color=colour, ms=8, label=labels[kind],
        )  # fmt: skip
    spread = max(o.loss for o in found) - min(o.loss for o in found)
    places = [(total / (o.up_bytes + o.down_bytes), o.loss) for o in found]
    for o, (times, loss) in zip(found, places, strict=True):
        crowded = any(
            abs(math.log(times / x)) < 0.25 and 0 < y - loss < 0.1 * spread for x, y in places
        )
        side = -1 if crowded else 1  # below, where another lies close above
        axes.annotate(
            o.name, (times, o.loss), (0, 13 * side), textcoords="offset points", ha="center",
            va="center", fontsize="small",
            bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.8},
        )  # fmt: skip
    axes.axhline(WORSE * dense, color="0.4", ls=":", label="1 % worse than float32")
    axes.axvline(FEWER, color="0.4", ls="--", label=f"{FEWER:.0f} times fewer bytes")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100])
    axes.set_xlim(0.8, 160)
    axes.set_xlabel("times fewer bytes, up and down together, than float32 as Flower sends it")
    axes.set_ylabel("loss at the end, nats per token")
    axes.set_title(f"Loss against bytes: demo devices, {values:,} values, from {before:.2f}")
    axes.grid(alpha=0.25)
    axes.margins(y=0.12)
    figure.legend(fontsize="small", loc="outside lower center", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _kind(name: str) -> str:
    return next((kind for kind in ("top", "budget", "k = ") if kind in name), "whole")


def main() -> None:
    """Prints both tables and one line of JSON, and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--ways", nargs="*", help="some of them; float32 is always in")
    parser.add_argument("--picture", type=Path, help="docs/wire.png, unless --quick")
    options = parser.parse_args()
    quick = options.quick
    import torch

    torch.set_num_threads(1)
    learning = Learning(
        seed=options.seed, local_steps=4 if quick else 10, evaluation_sequences=8 if quick else 48
    )
    rounds = 2 if quick else 10
    names = list(dict.fromkeys(("float32", *(options.ways or (QUICK if quick else WAYS)))))
    if unknown := [name for name in names if name not in WAYS]:
        raise SystemExit(f"no way of sending is called {unknown[0]!r}; use {', '.join(WAYS)}")
    with tempfile.TemporaryDirectory() as scratch:
        fleet = Fleet(learning, Path(scratch))
        spec = real_shape(32)
        highest = show_floor({
            "Qwen2.5-Coder-0.5B": over_floor(spec, make_factors(spec)),
            "update of the demo": over_floor(fleet.spec, fleet.first_update()),
        })  # fmt: skip
        before = fleet.loss(fleet.initial())
        peer = flower_run_bytes(fleet, rounds)
        print(f"\n{len(fleet.devices)} devices, {rounds} rounds of {learning.tokens} tokens each; "
              f"loss before {before:.4f}; as Flower sends it {peer[0] / 1e6:.1f} MB up, "
              f"{peer[1] / 1e6:.1f} MB down\n{HEAD}")  # fmt: skip
        found: list[Outcome] = []
        for name in names:
            found.append(play(fleet, name, rounds))
            print(line(found[-1], found[0].loss, peer), flush=True)
    chosen = best(found, found[0].loss, peer)
    assert chosen is not None  # float32 is never worse than itself
    print(f"\nhighest bytes over floor: {highest:.4f} (aim {FLOOR})")
    print(f"fewest bytes at a loss at most 1 % worse than float32: {chosen[0].name}, "
          f"{chosen[1]:.1f} times fewer than Flower's (aim {FEWER:.0f})")  # fmt: skip
    if not quick or options.picture:
        path = options.picture or PICTURE
        picture(found, before, peer, fleet.values, path)
        print(f"picture: {path}")
    print(json.dumps({
        "benchmark": "wire", "bytes_over_floor": highest, "rounds": rounds, "seed": options.seed,
        "tokens": learning.tokens, "loss_before": before, "flower_bytes": peer,
        "best": {"way": chosen[0].name, "times_fewer": chosen[1]},
        "results": [asdict(o) | fewer(o, peer) for o in found],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
