"""What packing loses of values: the relative squared error of an encoding, groups and density.

    error = ||C(x) - x||^2 / ||x||^2      C: keep the largest share, then round to levels

Known beforehand from the values alone, without packing them: what is left out is a sum of squares,
and rounding up with probability f from the level below errs by f (1 - f) squared steps. `fed_back`
is for updates with error feedback, which are rounded to the nearest level. Knows blocks of numbers;
which settings fit into how many bytes is `protos.fitting`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from protos.codecs import Values, squares
from protos.contract import Encoding, ErrorCurve
from protos.layout import codec_of

DENSITIES = tuple(2.0**-i for i in range(12))
"""Where a curve is sampled, descending: 1, 1/2 … 1/2048."""
ROW_SPREAD = {"sgd": 1.0}
"""Of what an optimiser leaves after 20 steps, chosen after seeing updates of the nano model
(`python -m benchmarks.distortion`); AdamW moves all rows alike, so 0 for what is not named.
"""
MOST_VALUES = 1 << 16  # of a sample that curves are made of


def relative_error(
    values: Values | Sequence[Values],
    encoding: Encoding,
    group: int = 0,
    density: float = 1.0,
    *,
    fed_back: bool = False,
) -> float:
    """Expected ||C(x) - x||^2 / ||x||^2; 0 if there is nothing but zeros.

    values: one (rows, columns) block, or several that are packed together, so that the largest
    share is that of all of them. Unbiased rounding of coarse levels may lose more than everything.
    """
    blocks = [values] if isinstance(values, np.ndarray) else list(values)
    total = sum(map(squares, blocks))
    if not total:
        return 0.0
    return _lost(blocks, thresholds(blocks, (density,))[0], encoding, group, fed_back) / total


def error_curve(
    blocks: Sequence[Values],
    encoding: Encoding,
    group: int,
    *,
    fed_back: bool,
    densities: Sequence[float] = DENSITIES,
) -> ErrorCurve:
    """`relative_error` at all `DENSITIES`, or the first of them."""
    total = sum(map(squares, blocks))
    lost = [
        _lost(blocks, least, encoding, group, fed_back) for least in thresholds(blocks, densities)
    ]
    return ErrorCurve(encoding, group, tuple(x / total if total else 0.0 for x in lost))


def error_at(curve: ErrorCurve, density: float) -> float:
    """A curve between its points: a line in log2 of the density; beyond the last, as that goes on.

    There what arrives, not what is lost, falls by the same factor with every halving.
    """
    at = -math.log2(density)
    errors, last = curve.errors, len(curve.errors) - 1
    if not at:
        return errors[0]
    if at >= last:
        arrives, before = 1 - errors[last], 1 - errors[last - 1]
        ratio = arrives / before if 0 < arrives < before else 0.5
        return 1 - max(0.0, arrives) * math.pow(ratio, at - last)
    low = int(at)
    return errors[low] + (at - low) * (errors[low + 1] - errors[low])


def contraction(error: float, *, fed_back: bool) -> float:
    """delta, the share of an update that arrives, from the relative error of packing it.

    With error feedback 1 - error: the compressor is a delta-contraction, and what it leaves out
    comes later (EF-SGD, arXiv 1901.09847). Without, rounding is unbiased with variance `error`:
    1 / (1 + error), for the best multiple of such an estimate leaves error / (1 + error).
    """
    return max(0.0, 1 - error) if fed_back else 1 / (1 + max(0.0, error))


def sample(blocks: Sequence[Values], most_values: int = MOST_VALUES) -> list[Values]:
    """Whole rows, evenly from all blocks: so many values at most, where rows are shorter."""
    every = max(1, -(-sum(block.size for block in blocks) // most_values))
    rows, skipped = [], 0
    for block in blocks:
        first = -skipped % every
        rows.append(block[first::every])
        skipped += len(block)
    return [block for block in rows if len(block)]


@lru_cache(maxsize=64)
def prior_curve(encoding: Encoding, group: int, fed_back: bool, spread: float = 0.0) -> ErrorCurve:
    """The curve to expect of a device that has not told its own.

    Of normal values in rows whose sizes vary: `spread` is the standard deviation of their
    logarithm (`ROW_SPREAD`).
    """
    draw = np.random.default_rng(0)
    sizes = np.exp(spread * draw.normal(size=(256, 1)))
    values = (draw.normal(size=(256, 512)) * sizes).astype(np.float32)
    return error_curve([values], encoding, group, fed_back=fed_back)


def usable_curves(told: Sequence[ErrorCurve]) -> dict[tuple[Encoding, int], ErrorCurve]:
    """Curves by encoding and group, of those that a device told the ones that can be: not empty,
    and of errors that grow, from 0 on, as less is kept. Anything else would only harm its plans.
    """
    return {
        (curve.encoding, curve.group): curve
        for curve in told
        if curve.errors and len(curve.errors) <= len(DENSITIES) and min(curve.errors) >= 0
    }


def thresholds(blocks: Sequence[Values], densities: Sequence[float]) -> list[float]:
    """The least magnitude that is kept, for each density; 0 where all are."""
    if all(density >= 1 for density in densities):
        return [0.0] * len(densities)
    sizes = np.sort(np.concatenate([np.abs(block).ravel() for block in blocks]))
    kept = [max(1, math.ceil(density * sizes.size - 1e-9)) for density in densities]
    return [float(sizes[sizes.size - n]) if n < sizes.size else 0.0 for n in kept]


def _lost(
    blocks: Sequence[Values], least: float, encoding: Encoding, group: int, fed_back: bool
) -> float:
    """Squared error of blocks of which values of size `least` and above are kept."""
    codec, found = codec_of(encoding), 0.0
    for block in blocks:
        if least > 0:
            mask = np.abs(block) >= least
            if not mask.any():
                found += squares(block)
                continue
            kept = np.where(mask, block, np.float32(0))
            found += squares(block) - squares(kept)
            found += codec.squared_errors(kept, mask, group, nearest=fed_back)
        else:
            found += codec.squared_errors(block, None, group, nearest=fed_back)
    return found
