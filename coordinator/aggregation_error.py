"""How far a merge is from the mean of the devices' products, module by module.

Exact through Gram matrices while the fleet's ranks add up to few components. Beyond, the same
energies are estimated from their action on random vectors, at about the cost of reading the
updates: the devices' changes act, and what they started from acts once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from coordinator.lowrank import (
    Bundle,
    ErrorEnergy,
    Matrix32,
    error_energy,
    random_signs,
    stack,
)
from coordinator.methods import Method, ModuleState, ModuleUpdate

EPSILON = 1e-12  # keeps the relative error finite while the ideal update is still zero
EXACT_COMPONENTS = 256  # of ideal and result together; 20 ms for the widest layer of a 1.5 B model
PROBES = 8  # of an estimate: its standard deviation is about 25 % for one layer, 2 % for 200


class ErrorMeter:
    """Aggregation errors ||merged - ideal|| / ||ideal||, by module and overall."""

    def __init__(self) -> None:
        self.errors: dict[str, float] = {}
        self.exact = True
        self._off = self._target = 0.0

    def add(self, module: str, found: ErrorEnergy) -> None:
        """Takes one module's energies."""
        self.errors[module] = _ratio(found.off, found.target)
        self.exact &= found.exact
        self._off += found.off
        self._target += found.target

    @property
    def overall(self) -> float | None:
        """Over all modules; None before the first."""
        return _ratio(self._off, self._target) if self.errors else None


def measure(
    method: Method,
    before: ModuleState,
    after: ModuleState,
    updates: Sequence[ModuleUpdate],
    shares: NDArray[np.float64],
) -> ErrorEnergy:
    """Energies of ideal minus merged and of the ideal, for one module."""
    reached, signs = [after.product], [1.0]
    if after.side is not before.side:
        for branch, sign in ((after.side, 1.0), (before.side, -1.0)):
            if branch is not None:
                reached.append(branch)
                signs.append(sign)
    rank = sum(update.k for update in updates) + sum(bundle.rank for bundle in reached)
    if rank <= EXACT_COMPONENTS:
        ideal = stack([method.contribution(before, u) for u in updates], shares.tolist())
        result = stack(reached, signs) if len(reached) > 1 else reached[0]
        return error_energy(ideal, result)
    probes = _probes(before.adapter.down.shape[1])
    want = _image_of_ideal(method, before, updates, shares, probes).astype(np.float64)
    target = float(np.vdot(want, want))
    for bundle, sign in zip(reached, signs, strict=True):
        want -= sign * bundle.apply(probes)
    return ErrorEnergy(float(np.vdot(want, want)) / PROBES, target / PROBES, False)


def _image_of_ideal(
    method: Method,
    before: ModuleState,
    updates: Sequence[ModuleUpdate],
    shares: NDArray[np.float64],
    probes: Matrix32,
) -> Matrix32:
    """sum_i p_i s_i B_i A_i applied to each of `probes` (q, n): (q, m)."""
    start: Bundle = before.adapter
    plain = (
        type(method).contribution is Method.contribution
        and not method.fresh
        and before.core is None
    )
    image = np.zeros((len(probes), start.up.shape[1]), np.float32)
    columns = np.ascontiguousarray(probes.T)
    started = start.down @ columns  # (r, q)
    gathered = np.zeros_like(started)  # what the rows of B at the start are to be combined with
    for update, share in zip(updates, shares, strict=True):
        if not (plain and update.on_time):
            image += np.float32(share) * method.contribution(before, update).apply(probes)
            continue
        # B_i A_i x = (B + dB)(A x + dA x) with B, A the rows everybody started from.
        inside = started[update.rows]
        if (down := update.delta.get("down")) is not None:
            inside += down @ columns
        scale = start.scale * update.lift  # s_i
        sketch = start.rank / update.k if method.scaling == "sketch" else 1.0
        inside *= np.float32(share * scale * sketch)
        if (up := update.delta.get("up")) is not None:
            image += inside.T @ up
        gathered[update.rows] += inside / np.float32(update.lift)
    image += gathered.T @ start.up
    return image


@lru_cache(maxsize=8)  # a model has few widths
def _probes(width: int) -> Matrix32:
    return random_signs((PROBES, width), "aggregation error")


def _ratio(off: float, target: float) -> float:
    return math.sqrt(max(off, 0.0)) / (math.sqrt(target) + EPSILON)
