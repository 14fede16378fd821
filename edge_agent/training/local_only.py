"""The adapter of a device that took no part: trained on its own code alone, never merged.

A plain LoRA pair whatever the run's method: up and down (and tensors trained whole) of as many
rows as the device's slice, the run's lora_alpha, from the adapter that the run started from. Given
the steps, rows of code, learning rate and optimiser of the slice, it answers whether taking part
was worth it. Knows parts as arrays; knows no models and no files.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from protos.codecs import Values
from protos.contract import AdapterSpec, Part
from protos.layout import Parts
from protos.sketch import initial_down


def trained_locally(spec: AdapterSpec) -> tuple[Part, ...]:
    """What its optimiser moves."""
    return ("up", "down", "dense") if spec.dense else ("up", "down")


def starting_local(spec: AdapterSpec, rank: int, kept: Mapping[str, Parts]) -> dict[str, Parts]:
    """What it goes on from with `rank` rows: itself, or else the run's initial adapter.

    A device that is given more rows than it kept gets them as they would have started; with fewer,
    the best approximation of that rank goes on.
    """
    found: dict[str, Parts] = {}
    for m in spec.modules:
        parts = kept.get(m.name)
        if parts is None:
            parts = {"up": np.zeros((0, m.out_features), np.float32),
                     "down": np.zeros((0, m.in_features), np.float32)}  # fmt: skip
        up, down = parts["up"], parts["down"]
        if 0 < len(up) != rank:
            up = up * np.float32(spec.divisor(rank) / spec.divisor(len(up)))  # the same product
        if len(up) > rank:
            up, down = truncated(up, down, rank)
        if missing := rank - len(up):
            drawn = initial_down(spec.seed, m.name, rank, m.in_features)[-missing:]
            up = np.concatenate([up, np.zeros((missing, m.out_features), np.float32)])
            down = np.concatenate([down, drawn])
        found[m.name] = {"up": up, "down": down}
    for t in spec.dense:
        zeros: Parts = {"dense": np.zeros((t.out_features, t.in_features), np.float32)}
        found[t.name] = kept.get(t.name, zeros)
    return found


def truncated(up: Values, down: Values, rank: int) -> tuple[Values, Values]:
    """The best approximation, up (rank, m) and down (rank, n), of up (k, m)' down (k, n)."""
    left, right = np.linalg.qr(up.T.astype(np.float64)), np.linalg.qr(down.T.astype(np.float64))
    u, s, v = np.linalg.svd(left[1] @ right[1].T)
    root = np.sqrt(s[:rank])
    new_up = (left[0] @ u[:, :rank] * root).T
    new_down = (right[0] @ v[:rank].T * root).T
    return (np.ascontiguousarray(new_up, dtype=np.float32),
            np.ascontiguousarray(new_down, dtype=np.float32))  # fmt: skip
