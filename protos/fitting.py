"""Which encoding, group and density lose least of an update within so many bytes.

The planner asks before there are values, by curves of the last update (`best_expected`); the device
asks when it knows them (`fit`): settings are compared on a sample, and the winner is cut to size by
the places that it really keeps. Knows layouts and errors, not devices or rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from protos import gaps
from protos.codecs import Values
from protos.contract import AdapterSpec, Encoding, ErrorCurve, Part, Payload, UpdateBudget
from protos.distortion import (
    DENSITIES,
    contraction,
    error_at,
    error_curve,
    relative_error,
    sample,
)
from protos.layout import (
    HEADER_BYTES,
    Layout,
    WrongSizeError,
    codec_of,
    density_of,
    layout_of,
    packed_bytes,
    sparse_bytes,
)
from protos.packing import largest

MOST_COMPARED = 1 << 18  # values of the sample that settings are compared on
LEAST_DENSITY = 2.0**-12  # a share of which hardly anything arrives
TRIES = 12  # of a density until a file has the right size; a few suffice


@dataclass(frozen=True)
class Fit:
    """Settings, the size of such a file, and what it loses: ||C(x) - x||^2 / ||x||^2."""

    payload: Payload
    size_bytes: int
    error: float

    def arrives(self, *, fed_back: bool) -> float:
        """The share of the rows' update that arrives (`protos.distortion.contraction`)."""
        biased = fed_back or self.payload.density < 1  # what is left out is left out
        return contraction(self.error, fed_back=biased)


def settings(budget: UpdateBudget) -> list[tuple[Encoding, int]]:
    """(encoding, group) to choose among."""
    return [
        (e, g) for e in budget.encodings for g in (budget.groups if codec_of(e).scaled else (0,))
    ]


def best_expected(
    spec: AdapterSpec,
    payload: Payload,
    budget: UpdateBudget,
    curve: Callable[[Encoding, int], ErrorCurve],
) -> Fit | None:
    """The least error that is to be expected; None if nothing fits. Raises `WrongShapeError`.

    payload: its density is the largest that may be chosen.
    """
    found = []
    for encoding, group in settings(budget):
        fits = _expected(spec, replace(payload, encoding=encoding, group=group), budget)
        if fits is not None:
            error = error_at(curve(encoding, group), fits.density)
            found.append(Fit(fits, _size(_totals(spec, _whole(fits)), fits), error))
    return min(found, key=lambda fit: (fit.error, fit.size_bytes), default=None)


def least_bytes(spec: AdapterSpec, payload: Payload, budget: UpdateBudget) -> int:
    """The smallest budget under which anything fits, in any of its encodings."""
    density = LEAST_DENSITY if budget.sparse else payload.density
    every = [replace(payload, encoding=e, group=g, density=density) for e, g in settings(budget)]
    return min(_size(_totals(spec, _whole(one)), one) for one in every)


def _expected(spec: AdapterSpec, most: Payload, budget: UpdateBudget) -> Payload | None:
    """The payload at its own density if that fits, else at the largest that is expected to."""
    totals = _totals(spec, _whole(most))
    if _size(totals, most) <= budget.size_bytes:
        return most
    if not budget.sparse:
        return None
    fixed = sparse_bytes(0, totals.blocks, totals.scale_bytes, 1.0, 0)
    # That a value may have on average; a little less, for sizes are of whole bytes and values.
    bits = 7.998 * (budget.size_bytes - fixed - 2) / totals.values
    needed, densities = _bits_by_density(codec_of(most.encoding).bits)
    if bits < needed[0]:
        return None
    density = float(np.exp2(np.interp(math.log2(bits), np.log2(needed), np.log2(densities))))
    return replace(most, density=min(density, most.density, densities[-1]))


@lru_cache
def _bits_by_density(bits: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(bits of a value on average, places and all; density), both ascending."""
    densities = np.exp2(np.linspace(math.log2(LEAST_DENSITY), math.log2(0.999), 400))
    many = 1 << 32  # values, so that nothing is rounded
    sizes = [8 * sparse_bytes(many, 0, 0, float(p), bits) / many for p in densities]
    return np.maximum.accumulate(np.array(sizes)), densities


@dataclass(frozen=True)
class _Totals:
    """Of all blocks of a file that leaves nothing out."""

    values: int
    blocks: int
    scale_bytes: int
    most_bytes: int


@lru_cache(maxsize=4096)  # a planner asks for every k in every encoding
def _totals(spec: AdapterSpec, whole: Payload) -> _Totals:
    layout, codec = layout_of(spec, whole), codec_of(whole.encoding)
    blocks = [block for parts in layout.blocks.values() for block in parts.values()]
    return _Totals(
        values=sum(block.size for block in blocks),
        blocks=len(blocks),
        scale_bytes=sum(codec.scale_bytes(b.rows, b.columns, whole.group) for b in blocks),
        most_bytes=layout.most_bytes,
    )


def _whole(payload: Payload) -> Payload:
    return replace(payload, density=1.0)


def _size(totals: _Totals, payload: Payload) -> int:
    """`expected_bytes` without a layout for every density."""
    if payload.density == 1:
        return totals.most_bytes
    return sparse_bytes(
        totals.values, totals.blocks, totals.scale_bytes, payload.density,
        codec_of(payload.encoding).bits,
    )  # fmt: skip


def fit(
    spec: AdapterSpec,
    payload: Payload,
    budget: UpdateBudget,
    factors: Mapping[str, Mapping[Part, Values]],
    *,
    fed_back: bool,
) -> tuple[Fit, tuple[ErrorCurve, ...]]:
    """The payload of least error for these values that is no larger than the budget, and the
    curves of everything it was compared with.

    payload: as planned; its rows and parts stay. Sizes are exact, or with compression the
    most: it is counted on by nobody. Raises `WrongSizeError` if nothing fits, `WrongShapeError`.
    """
    layout = layout_of(spec, replace(payload, density=1.0, encoding="float32", group=0))
    blocks = [
        np.ascontiguousarray(factors[name][part], np.float32)
        for name, parts in layout.blocks.items() for part in parts
    ]  # fmt: skip
    some = sample(blocks, MOST_COMPARED)
    known = settings(budget)
    ordered: list[tuple[float, Payload]] = []
    for encoding, group in known:
        most = replace(_whole(payload), encoding=encoding, group=group)
        if (fits := _expected(spec, most, budget)) is not None:
            error = relative_error(some, encoding, group, fits.density, fed_back=fed_back)
            ordered.append((error, fits))
    curves = tuple(
        error_curve(
            sample(some), e, g, densities=DENSITIES if budget.sparse else (1.0,), fed_back=fed_back
        )
        for e, g in known
    )
    for error, fits in sorted(ordered, key=lambda pair: pair[0]):
        if fits.density == 1:
            return Fit(fits, packed_bytes(spec, fits), error), curves
        if (cut := _cut(spec, fits, budget.size_bytes, blocks)) is not None:
            p = cut.payload
            error_now = relative_error(some, p.encoding, p.group, p.density, fed_back=fed_back)
            return replace(cut, error=error_now), curves
    raise WrongSizeError(
        f"no update of {payload.rank} rows fits into {budget.size_bytes:,} bytes; the least takes "
        f"{least_bytes(spec, payload, budget):,}: raise [plan] bytes_per_round or bytes_per_day"
    )


def _cut(
    spec: AdapterSpec, guess: Payload, most_bytes: int, blocks: Sequence[Values]
) -> Fit | None:
    """The guess with as many values as fit, by the places that are really kept."""
    values = sum(block.size for block in blocks)
    bits = codec_of(guess.encoding).bits
    low, high = 0, values  # fits; does not
    kept = layout_of(spec, guess).kept
    best: Fit | None = None
    for _ in range(TRIES):
        tried = replace(guess, density=density_of(kept, values))
        took = exact_bytes(layout_of(spec, tried), tried, blocks)
        if took <= most_bytes:
            low, best = kept, Fit(tried, took, 0.0)
            if took > 0.998 * most_bytes:
                break
        else:
            high = kept
        # One more value costs its bits and its share of the places.
        slope = (bits + math.log2(values / kept) + 1.44) / 8
        kept += round((0.9995 * most_bytes - took) / slope)
        if not low < kept < high:
            kept = (low + high) // 2
        if high - low <= 1 or kept < 1:
            break
    return best


def exact_bytes(layout: Layout, payload: Payload, blocks: Sequence[Values]) -> int:
    """Size of a sparse file of these blocks, uncompressed."""
    codec, total = codec_of(payload.encoding), HEADER_BYTES + layout.table_bytes
    for block, mask in zip(blocks, largest(blocks, layout.kept), strict=True):
        kept = np.flatnonzero(mask)
        total += gaps.encoded_bytes(kept, block.size) + codec.code_bytes(1, len(kept))
        total += codec.scale_bytes(block.shape[0], block.shape[1], payload.group)
    return total
