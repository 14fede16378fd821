"""Made-up studies with a known effect, to see that the statistics find it, and nothing else.

Losses as a study has them: domains differ, seeds differ, sequences differ, and one device's
compression costs itself `effect` nats per token and halving of bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trials.study.statistics import Array


@dataclass(frozen=True)
class Planted:
    """x (S, D): halvings of bytes. nats, tokens (2, S, D, E): of the dense run and of this one."""

    x: Array
    nats: Array
    tokens: Array


def plant(
    effect: float, seed: int, *, seeds: int = 5, devices: int = 8, examples: int = 12,
    domain_sd: float = 0.5, seed_sd: float = 0.02, device_sd: float = 0.02,
    example_sd: float = 0.3, varies: float = 0.0,
) -> Planted:  # fmt: skip
    """One study. device_sd: of what a device's loss moves between two runs for no reason; varies:
    standard deviation of the effect among domains. Levels 0 to 3, evenly, drawn for each seed.
    """
    draw = np.random.default_rng(seed)
    levels = np.arange(devices) * 4 // devices
    x = np.stack([draw.permutation(levels) for _ in range(seeds)]).astype(np.float64)
    domain = draw.normal(3.0, domain_sd, devices)
    own = effect + draw.normal(0, varies, devices) if varies else np.full(devices, effect)
    tokens = draw.integers(50, 64, (seeds, devices, examples)).astype(np.float64)
    each = draw.normal(0, example_sd, (seeds, devices, examples))
    both = []
    for run in range(2):
        loss = domain + draw.normal(0, seed_sd, (seeds, 1))
        loss = loss + draw.normal(0, device_sd, (seeds, devices)) + run * own * x
        both.append((loss[..., None] + each) * tokens)
    return Planted(x, np.stack(both), np.stack([tokens, tokens]))
