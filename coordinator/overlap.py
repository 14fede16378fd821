"""Which devices hold which rows of a module, and inner products of what they hold in common.

Sketches overlap in part: two devices can be compared on the rows that both have and on no others.
Rows are laid out by owner, (r, c) places with c the most owners that any row has, so that nothing
here loops over rows; columns are taken some at a time, so that no copy of the updates is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from coordinator.lowrank import Matrix32, Rows
from coordinator.methods.base import ModuleUpdate
from protos.contract import Part

BLOCK_VALUES = 1 << 21  # laid out at once: 8 MiB


@dataclass(frozen=True, eq=False)
class Overlap:
    """n devices on r rows. place: (r, c) index into the stack of all devices' rows, the number of
    those where nobody is; who: (r, c) the device, 0 where nobody is; held: (r, c), whose
    places are filled from the left.
    """

    devices: int
    place: NDArray[np.int64]
    who: NDArray[np.int64]
    held: NDArray[np.bool_]

    @staticmethod
    def of(rows: Sequence[Rows], rank: int) -> Overlap:
        """rows: of each device, (k,) distinct and below `rank`."""
        sizes = [len(own) for own in rows]
        flat = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        owner = np.repeat(np.arange(len(rows)), sizes)
        order = np.argsort(flat, kind="stable")
        counts = np.bincount(flat, minlength=rank)
        first = np.cumsum(counts) - counts
        depth = int(counts.max(initial=1))
        within = np.arange(len(flat)) - first[flat[order]]
        place = np.full((rank, depth), len(flat), np.int64)
        who = np.zeros((rank, depth), np.int64)
        held = np.zeros((rank, depth), np.bool_)
        at = (flat[order], within)
        place[at], who[at], held[at] = order, owner[order], True
        return Overlap(len(rows), place, who, held)

    @property
    def depth(self) -> int:
        """The most owners of a row, c."""
        return int(self.place.shape[1])

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """(r,) owners of each row."""
        found: NDArray[np.int64] = self.held.sum(axis=1)
        return found

    def spread(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(r, c) of (n,): each device's value at its places, zero where nobody is."""
        return np.where(self.held, values[self.who], 0.0)

    def blocks(self, values: Sequence[Matrix32]) -> Iterator[tuple[slice, Matrix32]]:
        """Columns, and (r, c, w) float32 of them, zeros where nobody is; a copy to do with as one
        likes. values: of each device, (k, w) in the order of its rows.
        """
        width = max(v.shape[1] for v in values)
        step = max(16, BLOCK_VALUES // max(1, self.place.size))
        total = sum(len(v) for v in values)
        for start in range(0, width, step):
            stop = min(start + step, width)
            stack = np.zeros((total + 1, stop - start), np.float32)
            at = 0
            for v in values:
                if v.shape[1] > start:  # a device without this part has one column of zeros
                    part = v[:, start:stop]
                    stack[at : at + len(v), : part.shape[1]] = part
                at += len(v)
            yield slice(start, stop), stack[self.place]

    def grams(self, values: Sequence[Matrix32]) -> NDArray[np.float64]:
        """(r, c, c) float64: inner products of each row between its owners."""
        found = np.zeros((*self.place.shape, self.depth))
        for _, block in self.blocks(values):
            found += block @ block.transpose(0, 2, 1)
        return found

    def pairs(self, grams: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, n): sums over the rows that two devices share of grams (r, c, c)."""
        found = np.zeros((self.devices, self.devices))
        left = np.broadcast_to(self.who[:, :, None], grams.shape)
        right = np.broadcast_to(self.who[:, None, :], grams.shape)
        both = self.held[:, :, None] & self.held[:, None, :]
        np.add.at(found, (left[both], right[both]), grams[both])
        return found

    def shared(self) -> NDArray[np.float64]:
        """(n, n): how many rows two devices share."""
        return self.pairs(np.ones((*self.place.shape, self.depth)))

    def energies(self, grams: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, n): of each device, the energy on the rows that it shares with each other."""
        own = np.einsum("rcc->rc", grams)
        return self.pairs(np.broadcast_to(own[:, :, None], grams.shape))

    def distances(self, grams: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, n): mean squared distance per shared row; NaN where two share none."""
        energy, shared = self.energies(grams), self.shared()
        squared = np.maximum(energy + energy.T - 2 * self.pairs(grams), 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(shared > 0, squared / shared, np.nan)

    def from_centre(
        self, grams: NDArray[np.float64], shares: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """(n,): squared distance of each device from the mean over owners, on its rows."""
        weights = self.spread(shares)
        weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
        towards = np.einsum("rcd,rd->rc", grams, weights)
        centre = np.einsum("rc,rc->r", towards, weights)
        squared = np.einsum("rcc->rc", grams) - 2 * towards + centre[:, None]
        found = np.zeros(self.devices)
        np.add.at(found, self.who[self.held], np.maximum(squared, 0.0)[self.held])
        return found


def flat_rows(update: ModuleUpdate, part: Part, rank: int) -> Rows:
    """The rows of a part; of a core, its entries as rows of one value, numbered row by row."""
    if part != "core":
        return update.rows
    found: Rows = (update.rows[:, None] * rank + update.rows[None, :]).reshape(-1)
    return found
