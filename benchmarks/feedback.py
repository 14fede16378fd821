"""What error feedback is worth: federated least squares under sketches, by encoding and density.

Four devices whose optima differ pull rows of a matrix towards them with noisy gradients; each sends
a quarter of the rows, packed. Printed: the excess loss at the end, of updates rounded at random
without feedback, at random with it, and to the nearest level with it, over the uncompressed one's.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from profiles.model import ModuleShape
from protos.contract import AdapterSpec, Part, Payload
from protos.packing import pack
from protos.unpacking import unpack

R, K, N, DEVICES = 16, 4, 256, 4
UP: tuple[Part, ...] = ("up",)
SPEC = AdapterSpec("bench", "bench", "", "0" * 64, R, 16.0, False, 1, (ModuleShape("a", N, 8),))
PAYLOADS = {
    "float32": Payload(K, "float32", UP),
    "int8": Payload(K, "int8", UP),
    "int4": Payload(K, "int4", UP),
    "int2": Payload(K, "int2", UP),
    "int2/64": Payload(K, "int2", UP, group=64),
    "sign": Payload(K, "sign", UP),
    "int4 1/4": Payload(K, "int4", UP, density=1 / 4),
    "int4 1/16": Payload(K, "int4", UP, density=1 / 16),
}
WAYS = {"no feedback": (False, False), "random": (True, False), "nearest": (True, True)}


def final_loss(
    payload: Payload, seed: int, rounds: int, *, feeds_back: bool, nearest: bool
) -> float:
    """Loss over the start's, the mean of the last tenth of the rounds."""
    draw = np.random.default_rng(seed)
    target = draw.standard_t(4, size=(R, N))
    apart = 0.7 * draw.normal(size=(DEVICES, R, N))
    apart -= apart.mean(0)
    curvature = np.exp(draw.normal(size=N))
    curvature /= curvature.max()
    x, held, losses = np.zeros((R, N)), np.zeros((DEVICES, R, N)), []
    for round_ in range(rounds):
        order, moved = draw.permutation(R), np.zeros((R, N))
        for device in range(DEVICES):
            rows = np.sort(np.roll(order, -device * K)[:K])
            noise = 0.5 * draw.normal(size=(K, N))
            due = 0.3 * curvature * (target[rows] + apart[device][rows] - x[rows] + noise)
            if feeds_back:
                due += held[device][rows]
            own = None if nearest else (seed * rounds + round_) * DEVICES + device
            data = pack(SPEC, payload, {"a": {"up": due.astype(np.float32)}}, seed=own)
            sent = unpack(data, SPEC, payload)["a"]["up"]
            held[device][rows] = due - sent
            moved[rows] += sent  # every row is in one sketch
        x += moved
        losses.append(float((curvature * (x - target) ** 2).sum()))
    start = float((curvature * target**2).sum())
    return float(np.mean(losses[-max(1, rounds // 10) :])) / start


def main() -> None:
    """Prints the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    rounds, seeds = (60, 1) if quick else (150, 3)
    results: dict[str, dict[str, float]] = {}
    print(f"{'payload':12}" + "".join(f"{way:>13}" for way in WAYS))
    for name, payload in PAYLOADS.items():
        results[name] = {
            way: float(np.mean([
                final_loss(payload, seed, rounds, feeds_back=fed, nearest=near)
                for seed in range(seeds)
            ]))
            for way, (fed, near) in WAYS.items()
        }  # fmt: skip
        floor = results["float32"]["no feedback"]
        ratios = [results[name][way] / floor for way in WAYS]
        print(f"{name:12}" + "".join(f"{ratio:13.3f}" for ratio in ratios))
    print(json.dumps({"benchmark": "feedback", "rounds": rounds, "results": results}))


if __name__ == "__main__":
    main()
