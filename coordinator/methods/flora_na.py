"""FLoRA-NA: combinations of the devices' factors whose product is nearest to the mean of products.

Everything is decided between the inner products of the devices' components; no matrix of the
layer's size appears. Knows no slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from coordinator.lowrank import Bundle, Matrix64, add_rows, gram_blocks
from coordinator.methods.base import ModuleState, ModuleUpdate, Shares, WholeMethod
from coordinator.methods.means import sum_of_changes, today

Blocks = NDArray[np.float64]  # (U, U, r, r): inner products of the components of every two devices

LIMIT = 2.0  # on ||u||_1 ||v||_1, 1 for means: how far negative weights may amplify a device
SWEEPS = 50
RIDGE = 1e-12  # share of the trace: clients that are nearly parallel make the system singular
FLAT = 1e-9  # a sweep that gains less than this share is the last
ROUNDING = 1e-6  # a gain of less than this share of the ideal's norm is lost in float32


class FLoRANA(WholeMethod):
    """Up becomes sum u_i B_i and down sum v_i A_i, with the 2 U numbers u, v that bring their
    product nearest to sum p_i B_i A_i; FedIT, u = v = p, where that is no gain.

    The paper leaves open how u and v are found: here by alternating exact solves, which never make
    it worse. As v sums to 1, down is the old one plus a combination of changes, and up the same up
    to a factor: row j goes on meaning the same.
    """

    name: ClassVar[str] = "flora-na"
    paper: ClassVar[str] = (
        "Communication-Efficient and Accurate Approach for Aggregation in Federated Low-Rank "
        "Adaptation (arXiv 2509.26399)"
    )
    heterogeneous: ClassVar[bool] = False
    keeps_basis: ClassVar[bool] = True

    def merge(
        self, current: ModuleState, updates: Sequence[ModuleUpdate], shares: Shares, round_: int
    ) -> ModuleState:
        """The fitted pair, or FedIT's means."""
        adapters = [today(current, update) for update in updates]
        found = fitted(adapters, shares)
        if found is None:
            return current.moved(sum_of_changes(current, updates, shares))
        up, down = np.zeros(current.adapter.up.shape), np.zeros(current.adapter.down.shape)
        for adapter, u, v in zip(adapters, *found, strict=True):
            add_rows(updates[0].rows, (up, float(u), adapter.up), (down, float(v), adapter.down))
        new = Bundle(up.astype(np.float32), down.astype(np.float32), current.adapter.scale)
        return ModuleState(new, current.side)


def fitted(bundles: Sequence[Bundle], p: Shares) -> tuple[Shares, Shares] | None:
    """(u, v) that minimise ||(sum u_i B_i)(sum v_i A_i) - sum p_i B_i A_i||^2, sum v = 1.

    None if nothing better than u = v = p is found.
    """
    ups, downs = (_blocks(gram, len(bundles)) for gram in gram_blocks(*bundles))
    target = float(p @ (ups * downs).sum(axis=(2, 3)) @ p)
    u, v = p.copy(), p.copy()
    first = error = _half(ups, downs, u, v, p)[0] + target
    for _ in range(SWEEPS):
        before = error
        u = _improved(ups, downs, u, v, p)
        v = _improved(downs, ups, v, u, p)
        error = _half(downs, ups, v, u, p)[0] + target
        if before - error <= FLAT * before:
            break
    total = float(v.sum())
    if not first - error > ROUNDING * np.sqrt(max(first, 0.0) * target) or abs(total) < FLAT:
        return None
    return u * total, v / total


def _blocks(gram: Matrix64, count: int) -> Blocks:
    rank = len(gram) // count
    return np.ascontiguousarray(gram.reshape(count, rank, count, rank).transpose(0, 2, 1, 3))


def _half(
    near: Blocks, far: Blocks, x: Shares, y: Shares, p: Shares
) -> tuple[float, Matrix64, Shares]:
    """The objective less its constant, x' H x - 2 c x, in the weights x of one side, and H, c."""
    through = np.tensordot(y, far, 1)  # (U, r, r): the other side's sum against each device
    square = np.tensordot(near, np.tensordot(y, through, 1), 2)
    linear = np.tensordot(near, p[:, None, None] * through, 3)
    return float(x @ square @ x - 2 * (linear @ x)), square, linear


def _improved(near: Blocks, far: Blocks, x: Shares, y: Shares, p: Shares) -> Shares:
    """From x towards the minimum with y held, as far as `LIMIT` allows.

    The ridge pulls to where x is, so that of equal answers the one near the mean is taken. The
    objective is convex in x and so is the norm: a part of the way is an improvement as well.
    """
    _, square, linear = _half(near, far, x, y, p)
    ridge = RIDGE * float(np.trace(square))
    if ridge <= 0:
        return x
    step = np.linalg.solve(square + ridge * np.eye(len(x)), linear - square @ x)
    here, there = float(np.abs(x).sum()), float(np.abs(x + step).sum())
    room = LIMIT / float(np.abs(y).sum())
    if there > room:
        step *= (room - here) / (there - here) if here < room else 0.0
    return x + step
