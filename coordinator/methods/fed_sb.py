"""Fed-SB: two fixed bases and a small core between them, which is all that travels.

Knows how the bases are found; does not know slices other than prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from coordinator.lowrank import Bundle, Matrix32, Matrix64, random_signs
from coordinator.methods.base import (
    ModuleState,
    ModuleUpdate,
    Shares,
    UpdateError,
    WholeMethod,
)
from coordinator.methods.products import ideal
from coordinator.truncation import truncate
from protos.contract import Part


class FedSB(WholeMethod):
    """Devices train and send the (r, r) core R of s B R A, whose mean is exact; B and A are fixed.

    LoRA-SB takes the bases from the SVD of a first averaged gradient. Here round 0 trains ordinary
    adapters, and the singular vectors of their mean of products take that place [ours]: the first
    average update is made of gradients, and no other kind of round is needed. A device of k rows
    holds the leading k x k block; each entry is averaged over the devices that hold it.
    """

    name: ClassVar[str] = "fed-sb"
    paper: ClassVar[str] = (
        "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) "
        "Federated LoRA Fine-Tuning (arXiv 2502.15436)"
    )
    keeps_basis: ClassVar[bool] = True  # from round 1; in round 0 other parts are trained
    exact: ClassVar[bool] = True

    def trained(self, version: int) -> tuple[Part, ...]:
        """Up and down in round 0, then the core."""
        return ("core",) if version else ("up", "down")

    def files(self, version: int) -> tuple[tuple[Part, ...], ...]:
        """The bases in a file of their own, which a device fetches once."""
        return (("up", "down"), ("core",)) if version else (("up", "down"),)

    def parts(self, version: int) -> tuple[Part, ...]:
        """With a core from version 1 on."""
        return ("up", "down", "core") if version else ("up", "down")

    def merge(
        self, current: ModuleState, updates: Sequence[ModuleUpdate], shares: Shares, round_: int
    ) -> ModuleState:
        """Round 0: the bases; later: the mean of the cores."""
        if current.core is None:
            return _with_bases(current, ideal(updates, shares))
        if late := [update.device_id for update in updates if "core" not in update.delta]:
            raise UpdateError(f"update of {late[0]} is from before the bases were fixed; leave it")
        total, cover = np.zeros(current.core.shape), np.zeros(current.core.shape)
        for update, share in zip(updates, shares, strict=True):
            if "core" in update.delta:  # else it is late and of another version
                update.add_change({"core": total}, float(share))
            cover[np.ix_(update.rows, update.rows)] += share
        return current.moved({"core": total / np.where(cover > 0, cover, 1.0)})


def _with_bases(current: ModuleState, target: Bundle) -> ModuleState:
    """The best approximation of `target` as s up' core down with orthonormal rows of up and down.

    Where the target has fewer components than r, the bases are completed by random signs and by
    the rows of down as drawn, so that every entry of the core can act; there it is zero.
    """
    rank, scale = current.adapter.rank, current.adapter.scale
    best = truncate(target, rank)
    signs = random_signs(current.adapter.up.shape, "fed-sb")
    up, left = _orthonormal(best.bundle.up[: best.kept], signs)
    down, right = _orthonormal(best.bundle.down[: best.kept], current.adapter.down)
    core = (left @ right.T / scale).astype(np.float32)
    return ModuleState(Bundle(up, down, scale), current.side, core)


def _orthonormal(rows: Matrix32, filler: Matrix32) -> tuple[Matrix32, Matrix64]:
    """Orthonormal rows (r, w), the first of which span `rows` (q, w); rows = weights' @ those.

    As many come from `filler` (r, w) as lack to r; zeros where w < r leaves no direction.
    """
    q, rank = len(rows), len(filler)
    columns = np.concatenate([rows, filler[: rank - q]]).astype(np.float64).T
    turned, triangle = np.linalg.qr(columns)
    basis = np.zeros(filler.shape, dtype=np.float32)
    basis[: turned.shape[1]] = turned.T
    weights = np.zeros((rank, q))
    weights[: len(triangle)] = triangle[:, :q]
    return basis, weights
