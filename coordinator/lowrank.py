"""The algebra of LoRA updates as bundles of rank-one components, stored rank-first.

Component j is row j of both factors, so cutting a sketch is a row gather and merging it a row
scatter; nothing here builds an (m, n) matrix except `dense`, which is for tests. Factors are
float32, sums and small cores float64. It does not know devices, rounds or weights of clients;
the best approximation of lower rank is in `truncation`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from profiles.errors import SketchfleetError
from protos.sketch import keyed_stream

Rows = NDArray[np.int64]
Matrix32 = NDArray[np.float32]
Matrix64 = NDArray[np.float64]

SCRATCH_BYTES = 1 << 19  # of values scaled at once, so that the passes over them meet in cache
GRAM_COLUMNS = 4096  # columns turned to float64 at once for Gram matrices, at most
GRAM_SCRATCH = 1 << 20  # values turned to float64 at once: 8 MiB
COLUMN_BLOCK = 256  # columns of the product held at once where Gram matrices would be larger


_own = threading.local()


class LowRankError(SketchfleetError):
    """Bundles, rows or scales that do not fit together."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """dW = scale * up' down. up: (r, m) float32, PEFT's lora_B'; down: (r, n) float32, lora_A."""

    up: Matrix32
    down: Matrix32
    scale: float

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.down.ndim != 2 or len(self.up) != len(self.down):
            raise LowRankError(
                f"up {self.up.shape} and down {self.down.shape} do not have the same number of "
                f"rows; pass (r, m) and (r, n)"
            )

    @property
    def rank(self) -> int:
        """Number of components, r."""
        return len(self.up)

    def take(self, rows: Rows) -> Bundle:
        """The components at `rows` (k,), as a copy with the same scale."""
        return Bundle(self.up[rows], self.down[rows], self.scale)

    def scatter_add(self, rows: Rows, delta_up: ArrayLike, delta_down: ArrayLike) -> Bundle:
        """A new bundle with delta_up (k, m) and delta_down (k, n) added at distinct `rows` (k,).

        Sums in float64. Raises `LowRankError` on repeated rows: one of them would be lost.
        """
        if len(np.unique(rows)) != len(rows):
            raise LowRankError("rows repeat; scatter each component once, or add deltas first")
        up, down = self.up.astype(np.float64), self.down.astype(np.float64)
        up[rows] += np.asarray(delta_up, dtype=np.float64)
        down[rows] += np.asarray(delta_down, dtype=np.float64)
        return Bundle(up.astype(np.float32), down.astype(np.float32), self.scale)

    def at_scale(self, scale: float) -> Bundle:
        """The same product under another scale; the ratio of scales goes to `up` only.

        Itself if the scale is its own. Raises `LowRankError` unless `scale` is positive and finite.
        """
        if not (scale > 0 and math.isfinite(scale)):
            raise LowRankError(f"scale {scale} is not a positive finite number; use alpha / r")
        if scale == self.scale:
            return self
        up = np.empty(self.up.shape, dtype=np.float32)
        for part, block in _scaled([(self.scale / scale, self.up)], np.float64):
            up[part] = block
        return Bundle(up, self.down, scale)

    def apply(self, vectors: Matrix32) -> Matrix32:
        """Each row x of `vectors` (q, n) as dW x: (q, m). All in float32, without forming dW."""
        coefficients: Matrix32 = vectors @ self.down.T
        coefficients *= self.scale
        product: Matrix32 = coefficients @ self.up
        return product

    def dense(self) -> Matrix64:
        """The product (m, n) float64. For tests."""
        product: Matrix64 = self.up.T.astype(np.float64) @ self.down.astype(np.float64)
        return self.scale * product


@dataclass(frozen=True)
class ErrorEnergy:
    """Squared Frobenius norms: `off` of ideal minus result, `target` of the ideal.

    exact: False if both are unbiased estimates.
    """

    off: float
    target: float
    exact: bool


def add_rows(
    rows: Rows,
    *pieces: tuple[Matrix32 | Matrix64, float | NDArray[np.float64], Matrix32 | Matrix64],
) -> None:
    """Adds factor * values (k, w) to `rows` (k,) of total (r, w), for (total, factor, values).

    factor: one, or (k,) of them. Rows are distinct and sorted; all totals have r rows. Done as
    products with a sparse (r, k) matrix: one pass over the values, where NumPy would take two and
    a call a row. Every value is multiplied and then added in the precision of its total, so the
    bits do not depend on how rows lie.
    """
    # The public product puts its result into new memory; this adds in place. Imported here, since
    # it takes as long as all else that a command of the coordinator imports.
    from scipy.sparse._sparsetools import csr_matvecs

    k, r = len(rows), len(pieces[0][0])
    stops = rows.searchsorted(np.arange(r + 1)).astype(np.int32)  # of the entries of each row
    columns = np.arange(k, dtype=np.int32)
    for total, factor, values in pieces:
        flat = np.ascontiguousarray(values, total.dtype).reshape(-1)
        entries = np.full(k, factor, total.dtype)
        csr_matvecs(r, k, total.shape[1], stops, columns, entries, flat, _flat(total))


def _flat(total: Matrix32 | Matrix64) -> NDArray[Any]:
    """A view (r * w,). Raises `LowRankError` where only a copy could be had: sums would be lost."""
    flat = total.reshape(-1)
    if flat.base is not total and flat.base is not total.base:
        raise LowRankError("totals must lie in one piece; make them with np.zeros")
    return flat


def stack(bundles: Iterable[Bundle], weights: Sequence[float], rank: int | None = None) -> Bundle:
    """sum_i w_i s_i up_i' down_i as one bundle of sum r_i components and scale 1.

    Weight and scale go to the up side only; on both they would act squared. This is the ideal
    update of a round (FLoRA, arXiv 2409.05976). rank: sum r_i, where the bundles are made one by
    one and never lie in memory together. Raises `LowRankError` if there is no bundle.
    """
    if rank is None:
        bundles = list(bundles)
        rank = sum(bundle.rank for bundle in bundles)
    up = down = np.empty((0, 0), np.float32)
    start = 0
    for bundle, weight in zip(bundles, weights, strict=True):
        if not down.size:
            up = np.empty((rank, bundle.up.shape[1]), dtype=np.float32)
            down = np.empty((rank, bundle.down.shape[1]), dtype=np.float32)
        down[start : start + bundle.rank] = bundle.down
        for part, block in _scaled([(weight * bundle.scale, bundle.up)], np.float64):
            up[start + part.start : start + part.stop] = block
        start += bundle.rank
    if not weights:
        raise LowRankError("there is no bundle to stack; a round needs at least one update")
    assert start == rank
    return Bundle(up, down, 1.0)


def gram(a: Bundle, b: Bundle) -> tuple[Matrix64, Matrix64]:
    """Inner products of components on either side: (r_a, r_b) of up and of down, float64."""
    return _cross_gram(a.up, b.up), _cross_gram(a.down, b.down)


def _cross_gram(a: Matrix32, b: Matrix32) -> Matrix64:
    """(r_a, r_b) inner products of rows, some columns at a time: float64 copies stay small."""
    total = np.zeros((len(a), len(b)))
    step = max(256, GRAM_SCRATCH // max(1, len(a) + len(b)))
    for start in range(0, a.shape[1], step):
        part = slice(start, start + step)
        total += a[:, part].astype(np.float64) @ b[:, part].T.astype(np.float64)
    return total


def gram_blocks(*bundles: Bundle) -> tuple[Matrix64, Matrix64]:
    """All inner products of components of the stack of `bundles`: (R, R) of up and of down.

    Scales are left out. Same bits as of one stacked bundle, at half the flops of `gram`.
    """
    return _self_gram([b.up for b in bundles]), _self_gram([b.down for b in bundles])


def inner(a: Bundle, b: Bundle) -> float:
    """Frobenius inner product of two updates, through (r_a, r_b) matrices."""
    up, down = gram(a, b)
    return a.scale * b.scale * float(np.vdot(up, down))


def norm(bundle: Bundle) -> float:
    """Frobenius norm of an update, through Gram matrices or, when cheaper, blocks of columns."""
    m, n = bundle.up.shape[1], bundle.down.shape[1]
    if bundle.rank * (m + n) <= 2 * m * n:
        energy = float(np.vdot(*gram_blocks(bundle)))
        return abs(bundle.scale) * math.sqrt(max(energy, 0.0))  # rounding may leave a tiny negative
    energy = sum(float(np.vdot(block, block)) for block in _dense_blocks(bundle))
    return math.sqrt(energy)


def error_energy(ideal: Bundle, result: Bundle) -> ErrorEnergy:
    """How far `result` is from `ideal`, as energies; the relative error is sqrt(off / target).

    Exact through Gram matrices or blocks of columns, whichever is cheaper. The Gram matrices of R
    components leave rounding of about 1e-16 R ||up||^2 ||down||^2 in `off`.
    """
    (_, m), (_, n) = ideal.up.shape, ideal.down.shape
    rank = ideal.rank + result.rank
    by_gram, by_columns = rank**2 * (m + n), 2 * rank * m * n
    if by_gram <= by_columns:
        up, down = gram_blocks(ideal, result)
        products = up * down
        scales = np.repeat([ideal.scale, -result.scale], [ideal.rank, result.rank])
        own = products[: ideal.rank, : ideal.rank]
        off, target = float(scales @ products @ scales), ideal.scale**2 * float(own.sum())
        return ErrorEnergy(max(off, 0.0), max(target, 0.0), True)
    off = target = 0.0
    for want, got in zip(_dense_blocks(ideal), _dense_blocks(result), strict=True):
        target += float(np.vdot(want, want))
        missed = want - got
        off += float(np.vdot(missed, missed))
    return ErrorEnergy(off, target, True)


def random_signs(shape: tuple[int, int], purpose: str, *key: int | str) -> Matrix32:
    """A (q, n) float32 matrix of +1 and -1 that depends on its shape and key alone."""
    count = shape[0] * shape[1]
    raw = keyed_stream(purpose, *key).random_raw(-(-count // 64)).astype("<u8")
    bits = np.unpackbits(raw.view(np.uint8), count=count).reshape(shape)
    return 2 * bits.astype(np.float32) - 1


def _scaled(
    pieces: Sequence[tuple[float, Matrix32]], precision: DTypeLike
) -> Iterator[tuple[slice, Any]]:
    """The products factor * values side by side, some rows at a time, in one buffer."""
    height = len(pieces[0][1])
    width = sum(values.shape[1] for _, values in pieces)
    step = max(1, SCRATCH_BYTES // (np.dtype(precision).itemsize * max(1, width)))
    scratch = _scratch(min(step, height) * width, precision)
    for start in range(0, height, step):
        part = slice(start, min(start + step, height))
        block = scratch[: (part.stop - start) * width].reshape(part.stop - start, width)
        at = 0
        for factor, values in pieces:
            into = block[:, at : at + values.shape[1]]
            at += values.shape[1]
            if into.dtype == values.dtype:
                np.multiply(values[part], into.dtype.type(factor), out=into)
            else:  # a plain conversion first; a product of mixed types is twice as slow
                np.copyto(into, values[part])
                into *= factor
        yield part, block


def _scratch(size: int, precision: DTypeLike) -> NDArray[Any]:
    """At least this many values, the same for a thread: fresh memory would be paged in."""
    needed = size * np.dtype(precision).itemsize
    found: NDArray[np.uint8] | None = getattr(_own, "scratch", None)
    if found is None or len(found) < needed:
        found = _own.scratch = np.empty(max(needed, SCRATCH_BYTES), np.uint8)
    return found[:needed].view(precision)


def _self_gram(parts: Sequence[Matrix32]) -> Matrix64:
    """Inner products (R, R) of the rows of all parts, without putting them into one array."""
    rank, width = sum(map(len, parts)), parts[0].shape[1]
    total, share = np.zeros((rank, rank)), np.empty((rank, rank))
    step = min(width, GRAM_COLUMNS, max(256, GRAM_SCRATCH // max(1, rank)))
    scratch = np.empty((rank, step))
    for start in range(0, width, step):
        block = scratch[:, : min(step, width - start)]
        blocks = [part[:, start : start + step] for part in parts]
        np.concatenate(blocks, out=block)
        total += np.matmul(block, block.T, out=share)  # BLAS computes one triangle of x x' only
    return total


def _dense_blocks(bundle: Bundle) -> Iterator[Matrix64]:
    """The product, `COLUMN_BLOCK` columns at a time."""
    up = bundle.up.T.astype(np.float64)
    up *= bundle.scale
    for start in range(0, bundle.down.shape[1], COLUMN_BLOCK):
        product: Matrix64 = up @ bundle.down[:, start : start + COLUMN_BLOCK].astype(np.float64)
        yield product
