"""The best approximation of an update by fewer components, without its dense product.

Everything happens between the (R, m) and (R, n) factors of a stack and matrices of side
min(R, m, n), in float64. It knows bundles only: neither devices nor what the rank is for.

Each path finds left singular vectors U and answers with U U' dW, the projection of the update, not
with three computed SVD factors: an error in U then enters the result's error squared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.lowrank import (
    GRAM_COLUMNS,
    Bundle,
    LowRankError,
    Matrix32,
    Matrix64,
    gram_blocks,
    random_signs,
)

EXACT_SIDE = 2048  # of min(R, m, n): beyond, an eigendecomposition takes many seconds
NOISE_LIMIT = 1e-6  # share of the norm that Gram matrices may blur before QR is worth its time
OVERSAMPLING = 16  # directions searched beyond the rank on the approximate path
COLUMNS = 1024  # of many components turned to float64 at once
POWER_ITERATIONS = 2
ERROR_PROBES = 64  # fresh random vectors that estimate what the search has missed
EPSILON = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, eq=False)
class Truncation:
    """A bundle cut to fewer components, and what that lost.

    bundle: `rank` components, largest first, zeros beyond `kept`. values: (q,) float64, singular
    values of what was cut, descending: all min(R, m, n), zero where they drown in rounding, or on
    the approximate path estimates of the largest. error: ||cut off|| / ||update|| in Frobenius
    norm before rounding to float32, 0 for a zero update; estimated unless `exact`.
    """

    bundle: Bundle
    values: NDArray[np.float64]
    kept: int
    error: float
    exact: bool


@dataclass(frozen=True, eq=False)
class _Spectrum:
    """up' down ~ left' right. left (k, m) has orthonormal rows, those of right (k, n) have length
    values[:k]; values (q,) descend; outside: energy of the product beyond all q values.
    """

    values: NDArray[np.float64]
    left: Matrix64
    right: Matrix64
    outside: float = 0.0


def truncate(
    bundle: Bundle,
    rank: int,
    *,
    scale: float = 1.0,
    energy: float = 1.0,
    approximate: bool | None = None,
) -> Truncation:
    """The best approximation of the bundle's product with `rank` components, at `scale`.

    This is the redistribution of FlexLoRA (arXiv 2402.11505). With energy < 1 it keeps the fewest
    components, at most `rank`, whose squared singular values make up that share of their sum
    (FLoRIST, arXiv 2506.09199). Singular values are split evenly over both sides; the largest
    entry of each row of `up` is positive. Exact unless min(R, m, n) > `EXACT_SIDE`; `approximate`
    overrules that. Raises `LowRankError` unless rank >= 1, scale > 0, 0 < energy <= 1, and on
    values that are not finite.
    """
    if rank < 1 or not (scale > 0 and math.isfinite(scale)) or not 0 < energy <= 1:
        raise LowRankError(
            f"cannot truncate to rank {rank} at scale {scale} and energy {energy}; ask for "
            f"rank >= 1, a positive finite scale and 0 < energy <= 1"
        )
    m, n = bundle.up.shape[1], bundle.down.shape[1]
    if approximate is None:
        approximate = min(bundle.rank, m, n) > EXACT_SIDE
    search = _by_random_search if approximate else _by_all_vectors
    found = search(bundle, rank)
    kept, error = _cut(found, rank, energy)
    # W = s up' down, so with sigma of up' down: both sides get sqrt(s sigma / scale).
    root = np.sqrt(found.values[:kept, None] * (abs(bundle.scale) / scale))
    peaks = np.abs(found.left[:kept]).argmax(axis=1)
    sign = np.sign(found.left[np.arange(kept), peaks])[:, None]
    up, down = np.zeros((rank, m), np.float32), np.zeros((rank, n), np.float32)
    up[:kept] = found.left[:kept] * (sign * root)
    down[:kept] = found.right[:kept] * (
        sign * math.copysign(1.0, bundle.scale) * root / found.values[:kept, None]
    )
    values = found.values * abs(bundle.scale)
    return Truncation(Bundle(up, down, scale), values, kept, error, not approximate)


def _cut(found: _Spectrum, rank: int, energy: float) -> tuple[int, float]:
    """How many components to keep, and the relative error of keeping those."""
    squares = np.square(found.values)
    total = float(squares.sum()) + found.outside
    kept = min(rank, int(np.count_nonzero(squares)))
    if energy < 1:
        enough = energy * total * (1 - 4 * EPSILON)  # a share met exactly may round to less
        kept = min(kept, 1 + int(np.searchsorted(np.cumsum(squares), enough)))
    lost = float(squares[kept:].sum()) + found.outside
    return kept, math.sqrt(lost / total) if kept else 0.0


def _by_all_vectors(bundle: Bundle, rank: int) -> _Spectrum:
    if bundle.rank >= min(bundle.up.shape[1], bundle.down.shape[1]):
        return _by_smaller_side(bundle, rank)
    return _by_components(bundle, rank) or _by_qr(bundle, rank)


def _by_components(bundle: Bundle, rank: int) -> _Spectrum | None:
    """On R x R: with down down' = K K', the squares sigma^2 are the eigenvalues of K' (up up') K.

    None if components cancel so far that rounding in the Gram matrices, sqrt(eps) of the factors'
    size, would be seen in the product.
    """
    gram_up, gram_down = gram_blocks(bundle)
    energy = _finite(float(np.vdot(gram_up, gram_down)))
    noise = 4 * EPSILON * float(np.linalg.norm(gram_up) * np.linalg.norm(gram_down))
    if noise > NOISE_LIMIT**2 * energy and noise > 0:
        return None
    root = _root(gram_down)
    del gram_down  # of many components each is as large as what LAPACK works in
    values, vectors = _eigen(root.T @ gram_up @ root, noise)
    top = vectors[: min(rank, np.count_nonzero(values))]
    weights = (1 / values[: len(top), None]) * (top @ root.T)
    left = _combine(weights, bundle.up)
    return _Spectrum(values, left, _combine(weights @ gram_up, bundle.down))


def _by_qr(bundle: Bundle, rank: int) -> _Spectrum:
    """Thin QR of both sides, SVD of an R x R core: full float64 accuracy, in ten times the time."""
    q_up, r_up = np.linalg.qr(bundle.up.T.astype(np.float64))
    q_down, r_down = np.linalg.qr(bundle.down.T.astype(np.float64))
    left, values, right = np.linalg.svd(r_up @ r_down.T)
    noise = EPSILON * bundle.rank * float(np.linalg.norm(r_up) * np.linalg.norm(r_down))
    values[values <= noise] = 0.0
    right = values[:rank, None] * right[:rank]
    return _Spectrum(values, (q_up @ left[:, :rank]).T, right @ q_down.T)


def _by_smaller_side(bundle: Bundle, rank: int) -> _Spectrum:
    """On m x m or n x n: eigenvectors of W W' or W' W, from blocks of the product W."""
    turned = bundle.up.shape[1] > bundle.down.shape[1]
    near, far = (bundle.down, bundle.up) if turned else (bundle.up, bundle.down)
    side = near.T.astype(np.float64)
    square = np.zeros((len(side), len(side)))
    far_energy = 0.0
    for start in range(0, far.shape[1], GRAM_COLUMNS):
        part = far[:, start : start + GRAM_COLUMNS].astype(np.float64)
        far_energy += float(np.vdot(part, part))
        block = side @ part
        square += block @ block.T
    # Rounding of the eigenvalues, and that of W where its components cancel.
    noise = 4 * EPSILON * _finite(float(np.trace(square)))
    noise += EPSILON**2 * float(np.vdot(side, side)) * far_energy
    values, vectors = _eigen(square, noise)
    top = vectors[: min(rank, np.count_nonzero(values))]
    across = _combine(top @ side, far)
    if turned:
        size = values[: len(top), None]
        return _Spectrum(values, across / size, top * size)
    return _Spectrum(values, top, across)


def _by_random_search(bundle: Bundle, rank: int) -> _Spectrum:
    """Randomised subspace iteration (arXiv 0909.4061), its error estimated by fresh probes.

    What the found space misses is measured apart from what the cut drops inside it, so the
    estimate of the error is unbiased in squares.
    """
    up, down = bundle.up, bundle.down
    forth, back = Bundle(up, down, 1.0), Bundle(down, up, 1.0)
    count = min(rank + OVERSAMPLING, bundle.rank, up.shape[1], down.shape[1])
    image = forth.apply(random_signs((count, down.shape[1]), "range probes"))
    basis = _orthonormal(image)
    for _ in range(POWER_ITERATIONS):
        basis = _orthonormal(forth.apply(_orthonormal(back.apply(basis))))
    inside = back.apply(basis).astype(np.float64)
    values, vectors = _eigen(inside @ inside.T, 0.0)
    top = vectors[: min(rank, np.count_nonzero(values))]
    fresh = random_signs((ERROR_PROBES, down.shape[1]), "error probes")
    missed = forth.apply(fresh).astype(np.float64)
    space = basis.astype(np.float64)
    missed -= (missed @ space.T) @ space
    outside = _finite(float(np.vdot(missed, missed))) / ERROR_PROBES
    return _Spectrum(values, top @ space, top @ inside, outside)


def _root(gram: Matrix64) -> Matrix64:
    """K with K K' = gram; of repeated or zero components too, where Cholesky finds no root."""
    try:
        return np.asarray(np.linalg.cholesky(gram), dtype=np.float64)
    except np.linalg.LinAlgError:
        energies, vectors = np.linalg.eigh(gram)
        return np.asarray(vectors * np.sqrt(np.maximum(energies, 0.0)), dtype=np.float64)


def _eigen(square: Matrix64, noise: float) -> tuple[Matrix64, Matrix64]:
    """Roots (q,) of the eigenvalues, descending and zero where they are no more than `noise`, and
    the eigenvectors as rows (q, q), of a symmetric matrix.
    """
    energies, vectors = np.linalg.eigh(square)
    values = np.sqrt(np.where(energies > noise, energies, 0.0))
    return values[::-1], vectors.T[::-1]


def _combine(weights: Matrix64, rows: Matrix32) -> Matrix64:
    """The product weights (k, R) @ rows (R, w) in float64, converting some columns at a time."""
    product = np.empty((len(weights), rows.shape[1]))
    for start in range(0, rows.shape[1], COLUMNS):
        part = slice(start, start + COLUMNS)
        product[:, part] = weights @ rows[:, part].astype(np.float64)
    return product


def _orthonormal(rows: Matrix32) -> Matrix32:
    """An orthonormal basis (q, w) of what the rows (l, w) span to float32 accuracy, q <= l.

    Through Gram matrices, twice because once leaves the square of the rows' condition; NumPy's QR
    of tall matrices takes ten times as long.
    """
    basis = rows.astype(np.float64)
    for _ in range(2):
        square = basis @ basis.T
        _finite(float(np.trace(square)))
        energies, vectors = np.linalg.eigh(square)
        seen = energies > 1e-12 * energies.max(initial=0.0)
        basis = (vectors[:, seen] / np.sqrt(energies[seen])).T @ basis
    return basis.astype(np.float32)


def _finite(energy: float) -> float:
    if not math.isfinite(energy):
        raise LowRankError("the update holds NaN or infinite values; screen it out of the round")
    return energy
