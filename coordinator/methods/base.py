"""What a method is: a rule that moves one module's adapter by the updates of a round.

The base class checks updates, fixes their order and turns weights into shares, so that a method
only says what differs. It does not know files, assignments, or what made the weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from coordinator.lowrank import Bundle, Matrix64, Rows
from profiles.errors import SketchfleetError
from protos.packing import Factors


class MethodError(SketchfleetError):
    """A method cannot merge what it was given."""


class UnknownMethodError(MethodError):
    """No such method, normalisation or optimiser."""


class WeightError(MethodError):
    """Weights that do not make a mean."""


class UpdateError(MethodError):
    """An update whose rows, shape or values do not fit the module."""


@dataclass(frozen=True, eq=False)
class ModuleUpdate:
    """What one device changed in one module.

    rows: (k,) int64, sorted global rows; delta: up (k, m), down (k, n), trained minus received;
    weight: any non-negative number, usually the device's training sequences.
    """

    device_id: str
    rows: Rows
    delta: Factors
    weight: float
    k: int


class Method(ABC):
    """Merges are deterministic and, for distinct devices, independent of the order given."""

    name: ClassVar[str]
    heterogeneous: ClassVar[bool]  # False: the planner must give everybody k = r

    def merge_module(self, current: Bundle, updates: Sequence[ModuleUpdate]) -> Bundle:
        """The module after the round. current: up (r, m), down (r, n).

        Sums in float64, in order of device id. Raises `WeightError`, `UpdateError`.
        """
        ordered = sorted(updates, key=lambda update: update.device_id)
        for update in ordered:
            self._check(current, update)
        shares = normalised([update.weight for update in ordered])
        step_up, step_down = self.step(current, ordered, shares)
        with np.errstate(over="ignore"):
            up = (current.up.astype(np.float64) + step_up).astype(np.float32)
            down = (current.down.astype(np.float64) + step_down).astype(np.float32)
        if not (np.isfinite(up).all() and np.isfinite(down).all()):
            raise UpdateError(
                "the merged module exceeds float32; an update is far too large, screen by norm"
            )
        return Bundle(up, down, current.scale)

    @abstractmethod
    def step(
        self, current: Bundle, updates: Sequence[ModuleUpdate], shares: NDArray[np.float64]
    ) -> tuple[Matrix64, Matrix64]:
        """What to add to up (r, m) and down (r, n); `shares` sum to 1, in the order of updates."""

    def _check(self, current: Bundle, update: ModuleUpdate) -> None:
        rows, delta, rank = update.rows, update.delta, current.rank
        who = f"update of {update.device_id}"
        if rows.shape != (update.k,) or not 1 <= update.k <= rank:
            raise UpdateError(
                f"{who} names {rows.size} rows for k={update.k} of {rank}; derive them with "
                f"sketch_rows"
            )
        if rows[0] < 0 or rows[-1] >= rank or np.any(np.diff(rows) <= 0):
            raise UpdateError(f"{who} has rows that repeat or leave 0..{rank - 1}; sort them")
        expected = ((update.k, current.up.shape[1]), (update.k, current.down.shape[1]))
        if (delta.up.shape, delta.down.shape) != expected:
            raise UpdateError(
                f"{who} has shapes {delta.up.shape} and {delta.down.shape}, the module asks for "
                f"{expected[0]} and {expected[1]}; the device trained another module or k"
            )
        if not (np.isfinite(delta.up).all() and np.isfinite(delta.down).all()):
            raise UpdateError(f"{who} holds NaN or infinite values; screen it out of the round")
        if not self.heterogeneous and update.k != rank:
            raise UpdateError(
                f"{who} has {update.k} of {rank} rows, {self.name} merges whole adapters only; "
                f"assign k={rank} to every device or choose fslora"
            )


def normalised(weights: Sequence[float]) -> NDArray[np.float64]:
    """Weights (U,) divided by their sum, taken from left to right. Raises `WeightError`."""
    if not weights:
        raise WeightError("there is no update to merge; keep the adapter and open the next round")
    if bad := [w for w in weights if not (math.isfinite(w) and w >= 0)]:
        raise WeightError(f"weight {bad[0]} is negative or not finite; weigh by sequences trained")
    total = left_sum(np.array(weights, dtype=np.float64))
    if not (total > 0 and math.isfinite(total)):
        raise WeightError(
            f"{len(weights)} weights sum to {total}; at least one must be positive and all small "
            f"enough to add"
        )
    return np.array(weights, dtype=np.float64) / total


def left_sum(values: NDArray[np.float64]) -> float:
    """The sum in the order given; NumPy's own adds pairwise, which would give other bits."""
    total = 0.0
    for value in values:
        total += float(value)
    return total
