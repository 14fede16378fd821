"""What screening knows of the updates of a round: sizes, likeness of each to each, signatures.

Updates are compared where they mean the same: on the rank rows that two devices share, all of which
started from the same values, by inner products of rows (Gram matrices of owners, never a matrix of
a layer's size). Every part of every module is measured in its own device's size of it: likeness is
of directions, no single layer decides, and up and down, which have no common unit, weigh the same.
That B starts as zero does not matter here, whereas of the products dW = s B A a change of A could
not be seen in the first round.

A signature is a random projection of what was sent, row by row in the order it was sent, under a
key that no device knows. It is kept, so that what was sent before can be recognised later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from coordinator.lowrank import Matrix32, Rows, random_signs
from coordinator.overlap import Overlap
from protos.contract import AdapterSpec, Assignment, Part
from protos.layout import Parts
from protos.sketch import slice_rows
from protos.unpacking import PackedReader, open_update

MOST_PARTS_WIDE = 128  # of a model; above, signatures take fewer numbers of each
TOGETHER = 64  # updates compared with each other; larger fleets are dealt into groups


@dataclass(frozen=True)
class Sent:
    """An update on disk. kept: rows left after the device pruned itself, 0 for all."""

    assignment: Assignment
    path: Path
    kept: int = 0


@dataclass(frozen=True, eq=False)
class Likeness:
    """Of n updates of one round.

    sizes: (n, parts) root mean square of the values of each part of each module, as the device
    moved them; NaN where it sent none. parts: what those are. cosines: (n, n) of two devices on the
    rows that they share; NaN where they share none or were not compared. signatures: (n, d)
    float32, of length 1.
    """

    sizes: NDArray[np.float64]
    parts: tuple[str, ...]
    cosines: NDArray[np.float64]
    signatures: NDArray[np.float32]


def likeness(
    spec: AdapterSpec, updates: Sequence[Sent], *, common_basis: bool, key: str
) -> Likeness:
    """Reads every update once. common_basis: whether all started from the same rows.

    Memory is one module of `TOGETHER` updates. Raises `PackingError`, `OSError`.
    """
    groups = [updates[at : at + TOGETHER] for at in range(0, len(updates), TOGETHER)]
    found = [_of_group(spec, group, common_basis, key) for group in groups]
    cosines = np.full((len(updates), len(updates)), np.nan)
    at = 0
    for one in found:
        n = len(one.sizes)
        cosines[at : at + n, at : at + n] = one.cosines
        at += n
    if not found:
        return Likeness(np.zeros((0, 0)), (), cosines, np.zeros((0, 0), np.float32))
    sizes, marks = ([getattr(one, of) for one in found] for of in ("sizes", "signatures"))
    return Likeness(np.concatenate(sizes), found[0].parts, cosines, np.concatenate(marks))


def _of_group(spec: AdapterSpec, updates: Sequence[Sent], common_basis: bool, key: str) -> Likeness:
    n = len(updates)
    readers = [open_update(u.path, spec, u.assignment) for u in updates]
    names = [m.name for m in spec.modules]
    dense = [t.name for t in spec.dense]
    kinds = sorted({p for u in updates for p in u.assignment.update.parts} - {"dense"})
    columns = [f"{name} {part}" for name in names for part in kinds] + dense
    wide = 4 if len(columns) <= MOST_PARTS_WIDE else 2
    sizes = np.full((n, len(columns)), np.nan)
    inner, energy = np.zeros((n, n)), np.zeros((n, n))
    marks: list[list[NDArray[np.float32]]] = [[] for _ in updates]
    for column, rows, held in _pieces(spec, updates, readers, names, kinds, dense):
        present = [i for i, v in enumerate(held) if v is not None]
        values = [cast("Matrix32", held[i]) for i in present]
        own = np.array([_rms(v) for v in values])
        sizes[present, column] = own
        safe = np.where(own > 0, own, 1.0)
        for i, v, size in zip(present, values, safe, strict=True):
            marks[i].append(_mark(v, wide, key) / np.float32(size * np.sqrt(v.size)))
        if not common_basis or len(present) < 2:
            continue
        overlap = Overlap.of([rows[i] for i in present], 1 + max(int(r.max()) for r in rows))
        scale = overlap.spread(1 / safe)
        grams = overlap.grams(_flat(values, [rows[i] for i in present]))
        grams *= scale[:, :, None] * scale[:, None, :]
        at = np.ix_(present, present)
        inner[at] += overlap.pairs(grams)
        energy[at] += overlap.energies(grams)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = inner / np.sqrt(energy * energy.T)
    return Likeness(sizes, tuple(columns), cosines, _unit(marks, len(columns), wide))


def _pieces(
    spec: AdapterSpec,
    updates: Sequence[Sent],
    readers: Sequence[PackedReader],
    names: Sequence[str],
    kinds: Sequence[Part],
    dense: Sequence[str],
) -> Iterator[tuple[int, Sequence[Rows], list[Matrix32 | None]]]:
    """Column, rows of each device, and its values there (None: not sent), one part at a time."""
    whole = [np.zeros(1, np.int64)] * len(updates)
    for m, name in enumerate(names):
        read: list[Mapping[Part, Matrix32]] = []
        rows: list[Rows] = []
        for update, reader in zip(updates, readers, strict=True):
            mine = slice_rows(spec, update.assignment, name)
            if 0 < update.kept < len(mine):
                mine = mine[: update.kept]
            parts: Parts = reader.module(name)
            read.append({p: v[: len(mine)] for p, v in parts.items()})
            rows.append(mine)
        for p, part in enumerate(kinds):
            at = rows
            if part == "core":
                at = [(r[:, None] * spec.rank + r).reshape(-1) for r in rows]
            yield m * len(kinds) + p, at, [parts.get(part) for parts in read]
    for d, name in enumerate(dense):
        values = [reader.module(name)["dense"].reshape(1, -1) for reader in readers]
        yield len(names) * len(kinds) + d, whole, list(values)


def _flat(values: Sequence[Matrix32], rows: Sequence[Rows]) -> list[Matrix32]:
    """Values (k, w) as they are; of a core, whose rows are its entries, (k * k, 1)."""
    return [v.reshape(len(r), -1) for v, r in zip(values, rows, strict=True)]


def _rms(values: Matrix32) -> float:
    flat = values.reshape(-1)
    return float(np.sqrt(np.vdot(flat, flat) / max(1, flat.size)))


def _mark(values: Matrix32, wide: int, key: str) -> NDArray[np.float32]:
    """(wide^2,) projections of values (k, w), of mean square ||values||^2."""
    down = _signs(values.shape[1], wide, f"{key}/columns")
    left = _signs(len(values), wide, f"{key}/rows")
    found: NDArray[np.float32] = (left @ (values @ down.T)).reshape(-1)
    return found


@lru_cache(maxsize=64)  # a model has few widths
def _signs(width: int, wide: int, key: str) -> Matrix32:
    return random_signs((wide, width), "screening", key)


def _unit(
    marks: Sequence[Sequence[NDArray[np.float32]]], parts: int, wide: int
) -> NDArray[np.float32]:
    """(n, d) of length 1; devices that sent fewer parts have zeros at the end."""
    found = np.zeros((len(marks), parts * wide * wide), np.float32)
    for own, pieces in zip(found, marks, strict=True):
        if pieces:
            said = np.concatenate(pieces)
            length = float(np.linalg.norm(said))
            own[: len(said)] = said / length if length > 0 else said
    return found
