"""What each device's update gave to a merge: its share of the merged update, and its direction.

Both are measured where the model lives, in weight space: U is what the merge changed in a module,
D_i what device i changed, times its weight. Of a device's update, <U, D_i> / sum_j <U, D_j> is its
share of the merged one, which is <U, D_i> / ||U||^2 where the merge is the sum of the D_i; and
<U, D_i> / (||U|| ||D_i||) its alignment with it. Nothing of a layer's size is built: all inner
products go through matrices of ranks.

Methods that move the rows of a basis add up changes of factors, and there
U = s (dB' A + B' dA) holds exactly with A, B halfway between before and after; D_i is the device's
part of that sum. A row of it enters with the factor that the method gives to it. Methods that
average products have no such rows: there D_i is p_i times the device's product after training
less the one it began with.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.aggregation_error import EXACT_COMPONENTS
from coordinator.ledger_types import Contribution
from coordinator.lowrank import Bundle, Matrix32, Rows, inner, random_signs
from coordinator.methods import Method, ModuleState, ModuleUpdate
from coordinator.methods.base import Shares

NOTHING = 1e-12  # of the sum of what the inner products could have been
_Difference = Sequence[tuple[float, Bundle]]  # sum of factor * product
PROBES = 4  # of an estimated norm: about 35 % off for one layer, 2.5 % for 200


@dataclass(frozen=True, eq=False)
class Given:
    """Of one module: <U, D_i> (n,), ||D_i||^2 (n,) and ||U||^2; and the seconds it took."""

    inner: NDArray[np.float64]
    energies: NDArray[np.float64]
    energy: float
    seconds: float = 0.0


class ContributionMeter:
    """Sums over the modules of a merge; updates in one order throughout."""

    def __init__(self, shares: Shares, rank: int) -> None:
        self._shares = shares
        self._inner, self._energies = np.zeros(len(shares)), np.zeros(len(shares))
        self._energy = 0.0
        self._held, self._modules = np.zeros((len(shares), rank)), 0
        self.seconds = 0.0  # that attributing took

    def add(self, rows: Sequence[Rows], found: Given) -> None:
        """Takes one module; `rows` (k,) that each update holds of it."""
        self._inner += found.inner
        self._energies += found.energies
        self._energy += found.energy
        self.seconds += found.seconds
        self._modules += 1
        for held, of in zip(self._held, rows, strict=True):
            held[of] += 1

    def add_dense(self, i: int, step: NDArray[Any], delta: Matrix32) -> None:
        """Takes what the i-th update changed in a tensor that is trained whole, and the step taken.

        Call it for every update of a tensor, the first one included.
        """
        began, share = time.perf_counter(), float(self._shares[i])
        self._inner[i] += share * float(np.vdot(step, delta))
        self._energies[i] += share**2 * _dot(delta, delta)
        if i == 0:
            self._energy += float(np.vdot(step, step))
        self.seconds += time.perf_counter() - began

    def contributions(self) -> list[Contribution]:
        """One for every update, in their order."""
        norms, whole = np.sqrt(self._energies), math.sqrt(max(self._energy, 0.0))
        total, most = float(self._inner.sum()), whole * float(norms.sum())
        shared = total > NOTHING * most and math.isfinite(total)
        held = np.rint(255 * self._held / max(1, self._modules)).astype(np.uint8)
        return [
            Contribution(
                weight=float(self._shares[i]),
                share=float(self._inner[i]) / total if shared else None,
                alignment=_cosine(float(self._inner[i]), whole * float(norms[i])),
                norm=float(norms[i]) if math.isfinite(norms[i]) else None,
                components=held[i].tobytes(),
            )
            for i in range(len(norms))
        ]


def _cosine(product: float, most: float) -> float | None:
    if not (most > 0 and math.isfinite(most) and math.isfinite(product)):
        return None
    return min(1.0, max(-1.0, product / most))


def attribute(
    method: Method,
    before: ModuleState,
    after: ModuleState,
    updates: Sequence[ModuleUpdate],
    shares: Shares,
) -> Given:
    """What each update gave to one module. Looks at each update's values once."""
    began = time.perf_counter()
    with np.errstate(over="ignore", invalid="ignore"):  # of updates that only just fit float32
        found = _attributed(method, before, after, updates, shares)
    return replace(found, seconds=time.perf_counter() - began)


def _attributed(
    method: Method,
    before: ModuleState,
    after: ModuleState,
    updates: Sequence[ModuleUpdate],
    shares: Shares,
) -> Given:
    cored = before.core is not None and after.core is not None
    same_side = after.side is before.side
    if not method.has_global:
        return _by_factors(before, after, updates, shares)
    if cored and same_side:
        return _by_core(before, after, updates, shares)
    if method.keeps_basis and before.core is None and after.core is None and same_side:
        return _by_rows(method, before, after, updates, shares)
    return _by_products(before, after, updates, shares)


def _by_rows(
    method: Method,
    before: ModuleState,
    after: ModuleState,
    updates: Sequence[ModuleUpdate],
    shares: Shares,
) -> Given:
    """U = s (dB' A + B' dA): <U, D_i> = s^2 (<b_i, (U A')'> + <a_i, B U>), row by row."""
    scale2 = before.adapter.scale**2
    up_step, up = _step_and_middle(before.adapter.up, after.adapter.up)
    down_step, down = _step_and_middle(before.adapter.down, after.adapter.down)
    middle = _Middle(up, down, up @ up.T, down @ down.T)
    onto_up: Matrix32 = np.add(middle.down_gram @ up_step, (down @ down_step.T) @ up)  # (r, m)
    onto_down: Matrix32 = np.add((up @ up_step.T) @ down, middle.up_gram @ down_step)  # (r, n)
    exact = sum(update.k for update in updates) <= EXACT_COMPONENTS
    inners, energies = np.zeros(len(updates)), np.zeros(len(updates))
    factors = method.row_factors(before.adapter.rank, updates, shares)
    for i, (update, factor) in enumerate(zip(updates, factors, strict=True)):
        b, a = update.delta.get("up"), update.delta.get("down")
        w = factor.astype(np.float32)  # of rows of a
        v = w * np.float32(update.lift)  # of rows of b
        if b is not None:
            inners[i] += scale2 * float(v @ _by_row(b, _at(onto_up, update.rows)))
        if a is not None:
            inners[i] += scale2 * float(w @ _by_row(a, _at(onto_down, update.rows)))
        measure = middle.energy if exact else middle.estimate
        energies[i] = scale2 * max(measure(update.rows, b, v, a, w), 0.0)
    energy = scale2 * (_dot(up_step, onto_up) + _dot(down_step, onto_down))
    return Given(inners, energies, max(energy, 0.0))


@dataclass(frozen=True, eq=False)
class _Middle:
    """A model halfway between before and after: up (r, m), down (r, n), and their Gram matrices.

    What rows b (k, m) and a (k, n), times v and w, change of it is (vb)' A + B' (wa) at its rows.
    """

    up: Matrix32
    down: Matrix32
    up_gram: Matrix32
    down_gram: Matrix32

    def energy(
        self, rows: Rows, b: Matrix32 | None, v: Matrix32, a: Matrix32 | None, w: Matrix32
    ) -> float:
        """The square of that change's norm."""
        found, block = 0.0, np.ix_(rows, rows)
        if b is not None:
            found += _dot((b @ b.T) * np.outer(v, v), self.down_gram[block])
        if a is not None:
            found += _dot((a @ a.T) * np.outer(w, w), self.up_gram[block])
        if a is not None and b is not None:
            crossed = (b @ _at(self.up, rows).T) * (_at(self.down, rows) @ a.T)
            found += 2 * float(v @ crossed.astype(np.float64) @ w)
        return found

    def estimate(
        self, rows: Rows, b: Matrix32 | None, v: Matrix32, a: Matrix32 | None, w: Matrix32
    ) -> float:
        """The same without bias, from what the change makes of random vectors."""
        vectors = _probes(self.down.shape[1])
        image = np.zeros((PROBES, self.up.shape[1]), np.float32)
        if b is not None:
            image += ((vectors @ _at(self.down, rows).T) * v) @ b
        if a is not None:
            image += ((vectors @ a.T) * w) @ _at(self.up, rows)
        return _dot(image, image) / PROBES


def _step_and_middle(before: Matrix32, after: Matrix32) -> tuple[Matrix32, Matrix32]:
    """What a factor moved by, and the factor halfway."""
    step: Matrix32 = after - before
    return step, before + np.float32(0.5) * step


def _at(values: Matrix32, rows: Rows) -> Matrix32:
    """These rows, sorted; without a copy where they lie together."""
    first, last = int(rows[0]), int(rows[-1])
    return values[first : last + 1] if last - first + 1 == len(rows) else values[rows]


def _by_core(
    before: ModuleState,
    after: ModuleState,
    updates: Sequence[ModuleUpdate],
    shares: Shares,
) -> Given:
    """U = s B' dR A: all of it happens in (r, r) matrices."""
    assert before.core is not None and after.core is not None
    scale2 = before.adapter.scale**2
    up, down = before.adapter.up.astype(np.float64), before.adapter.down.astype(np.float64)
    up_gram, down_gram = up @ up.T, down @ down.T
    step = after.core.astype(np.float64) - before.core
    through = up_gram @ step @ down_gram
    inners, energies = np.zeros(len(updates)), np.zeros(len(updates))
    for i, (update, share) in enumerate(zip(updates, shares, strict=True)):
        if "core" not in update.delta:
            continue
        own = share * update.delta["core"].astype(np.float64)
        block = np.ix_(update.rows, update.rows)
        inners[i] = scale2 * float(np.vdot(own, through[block]))
        energies[i] = scale2 * float(np.vdot(own, up_gram[block] @ own @ down_gram[block]))
    return Given(inners, np.maximum(energies, 0.0), scale2 * float(np.vdot(step, through)))


def _by_factors(
    before: ModuleState,
    after: ModuleState,
    updates: Sequence[ModuleUpdate],
    shares: Shares,
) -> Given:
    """In the space of the parts that are shared: where devices keep the rest, there is no U."""
    inners, energies, energy = np.zeros(len(updates)), np.zeros(len(updates)), 0.0
    moved = {part: after.values(part) - before.values(part) for part in before.parts}
    energy = sum(_dot(step, step) for step in moved.values())
    for i, (update, share) in enumerate(zip(updates, shares, strict=True)):
        for part in update.delta:
            own = update.delta[part]
            inners[i] += share * _dot(own, moved[part][update.rows])
            energies[i] += share**2 * _dot(own, own)
    return Given(inners, energies, energy)


def _by_products(
    before: ModuleState,
    after: ModuleState,
    updates: Sequence[ModuleUpdate],
    shares: Shares,
) -> Given:
    """By Gram matrices of products, in float64, device by device: U and D_i are differences."""
    merged = [(1.0, after.product), (-1.0, before.product)]
    if after.side is not before.side:
        sides = ((1.0, after.side), (-1.0, before.side))
        merged += [(sign, side) for sign, side in sides if side is not None]
    inners, energies = np.zeros(len(updates)), np.zeros(len(updates))
    for i, (update, share) in enumerate(zip(updates, shares, strict=True)):
        begun = update.begin()
        own = [(share, begun.moved(update.delta).product), (-share, begun.product)]
        inners[i] = _inner(merged, own)
        energies[i] = max(_inner(own, own), 0.0)
    return Given(inners, energies, max(_inner(merged, merged), 0.0))


def _inner(of: _Difference, other: _Difference) -> float:
    """Of two sums of products; nothing is stacked, so memory is that of what is given."""
    return sum(a * b * inner(x, y) for a, x in of for b, y in other)


@lru_cache(maxsize=8)  # a model has few widths
def _probes(width: int) -> Matrix32:
    return random_signs((PROBES, width), "contribution")


def _dot(a: Matrix32, b: Matrix32) -> float:
    """The sum of products of two arrays of one shape."""
    return float(_by_row(a, b).sum())


def _by_row(a: Matrix32, b: Matrix32) -> NDArray[np.float64]:
    """(k,) sums of products by row, in float32; what is added up of them is float64."""
    sums: NDArray[np.float64] = np.einsum("ij,ij->i", a, b).astype(np.float64)
    return sums
