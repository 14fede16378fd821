"""The algebra of LoRA updates as bundles of rank-one components, stored rank-first.

Component j is row j of both factors, so cutting a sketch is a row gather and merging it a row
scatter; nothing here builds an (m, n) matrix except `dense`, which is for tests. Factors are
float32, sums and small cores float64. It does not know devices, rounds or weights of clients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from profiles.errors import SketchfleetError
from protos.contract import AdapterSpec
from protos.sketch import keyed_stream

Rows = NDArray[np.int64]
Matrix32 = NDArray[np.float32]
Matrix64 = NDArray[np.float64]

COLUMN_BLOCK = 256  # columns of the product held at once where Gram matrices would be larger


class LowRankError(SketchfleetError):
    """Bundles or rows that do not fit together."""


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

    def truncate(self, rank: int, *, scale: float = 1.0) -> Bundle:
        """The best approximation of this product with `rank` components, at the given scale.

        Thin QR of both sides, then the SVD of a core no larger than (min(m, R), min(n, R))
        (FlexLoRA, arXiv 2402.11505, without its dense product). Singular values are split evenly,
        the largest entry of each left vector is positive, zeros pad when `rank` exceeds what
        there is. Raises `LowRankError` unless rank >= 1 and scale > 0.
        """
        if rank < 1 or not scale > 0:
            raise LowRankError(f"cannot truncate to rank {rank} at scale {scale}; both exceed 0")
        q_up, r_up = np.linalg.qr(self.up.T.astype(np.float64) * self.scale)
        q_down, r_down = np.linalg.qr(self.down.T.astype(np.float64))
        left, values, right = np.linalg.svd(r_up @ r_down.T, full_matrices=False)
        kept = min(rank, len(values))
        root = np.sqrt(values[:kept] / scale)[:, None]
        up = (q_up @ left[:, :kept]).T  # (kept, m)
        down = right[:kept] @ q_down.T  # (kept, n)
        peak = np.take_along_axis(up, np.abs(up).argmax(axis=1)[:, None], axis=1)
        sign = np.where(peak < 0, -1.0, 1.0)
        padding = ((0, rank - kept), (0, 0))
        return Bundle(
            np.pad(sign * root * up, padding).astype(np.float32),
            np.pad(sign * root * down, padding).astype(np.float32),
            scale,
        )

    def dense(self) -> Matrix64:
        """The product (m, n) float64. For tests."""
        product: Matrix64 = self.up.T.astype(np.float64) @ self.down.astype(np.float64)
        return self.scale * product


def stack(bundles: Sequence[Bundle], weights: Sequence[float]) -> Bundle:
    """sum_i w_i s_i up_i' down_i as one bundle of sum r_i components and scale 1.

    Weight and scale go to the up side only; on both they would act squared. This is the ideal
    update of a round (FLoRA, arXiv 2409.05976).
    """
    up = [
        (weight * bundle.scale * bundle.up.astype(np.float64)).astype(np.float32)
        for bundle, weight in zip(bundles, weights, strict=True)
    ]
    return Bundle(np.concatenate(up), np.concatenate([b.down for b in bundles]), 1.0)


def gram(a: Bundle, b: Bundle) -> tuple[Matrix64, Matrix64]:
    """Inner products of components on either side: (r_a, r_b) of up and of down, float64."""
    up: Matrix64 = a.up.astype(np.float64) @ b.up.T.astype(np.float64)
    down: Matrix64 = a.down.astype(np.float64) @ b.down.T.astype(np.float64)
    return up, down


def inner(a: Bundle, b: Bundle) -> float:
    """Frobenius inner product of two updates, through (r_a, r_b) matrices."""
    up, down = gram(a, b)
    return a.scale * b.scale * float(np.sum(up * down))


def norm(bundle: Bundle) -> float:
    """Frobenius norm of an update, through Gram matrices or, when cheaper, blocks of columns."""
    m, n = bundle.up.shape[1], bundle.down.shape[1]
    if bundle.rank * (m + n) <= m * n:
        return math.sqrt(max(inner(bundle, bundle), 0.0))  # rounding may leave a tiny negative
    up = bundle.up.T.astype(np.float64)
    blocks = (bundle.down[:, start : start + COLUMN_BLOCK] for start in range(0, n, COLUMN_BLOCK))
    energy = sum(float(np.square(up @ block.astype(np.float64)).sum()) for block in blocks)
    return abs(bundle.scale) * math.sqrt(energy)


def initial_adapter(spec: AdapterSpec) -> dict[str, Bundle]:
    """The adapter of round 0, by module name: down ~ U(-1/sqrt(n), 1/sqrt(n)), up = 0.

    PEFT's own start (Kaiming uniform with a = sqrt 5), reproducible from the spec's seed.
    """
    return {
        module.name: Bundle(
            up=np.zeros((spec.rank, module.out_features), dtype=np.float32),
            down=_uniform(spec.seed, module.name, (spec.rank, module.in_features)),
            scale=spec.scale(spec.rank),
        )
        for module in spec.modules
    }


def _uniform(seed: int, module: str, shape: tuple[int, int]) -> Matrix32:
    raw = keyed_stream("initial", seed, module).random_raw(shape[0] * shape[1])
    unit = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53  # [0, 1)
    drawn: Matrix64 = (2.0 * unit - 1.0) / math.sqrt(shape[1])
    return drawn.reshape(shape).astype(np.float32)
