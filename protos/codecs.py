"""How blocks of numbers become 8, 4, 2 or 1 bit under a scale; and the table of all codecs.

Knows one (rows, columns) block at a time, or the values that a sparse file keeps of it. It does
not know files, modules or parts (`packing`), nor which values are kept (`gaps`).
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from protos.contract import Encoding
from protos.plain_codecs import (
    BFloat16,
    Bytes,
    Codec,
    Float32,
    NonFiniteError,
    PackingError,
    Values,
    all_finite,
    squares,
)

__all__ = [
    "CODECS", "Bytes", "Codec", "NonFiniteError", "PackingError", "Values", "all_finite", "squares",
]  # fmt: skip

AT_ONCE = 1 << 16  # values that are rounded together
MOST_FITTED = 1 << 14  # values of a block that scales are tried on


class _Scaled(Codec):
    """Values as a few levels of the scale of their group."""

    scaled: ClassVar[bool] = True
    highest: ClassVar[float]  # level; the peak of a group is this many scales
    fits: ClassVar[tuple[float, ...]] = (1.0,)  # of the peak, what the highest level may be

    @abstractmethod
    def _levels(self) -> Values:
        """The level of each code."""

    @abstractmethod
    def _codes(
        self, levels: NDArray[np.float64], noise: np.random.Philox | None
    ) -> NDArray[np.uint8]:
        """The codes (0 .. 2**bits - 1) of values given in scales."""

    @abstractmethod
    def _squared_errors(self, levels: NDArray[Any], *, nearest: bool) -> NDArray[Any]:
        """Expected squares of what rounding loses of values given in scales, in squared scales."""

    def _peaks(self, values: Values, group: int) -> NDArray[np.float64]:
        """(rows, groups) what `highest` scales are to be."""
        sizes = np.abs(values)
        if not group:
            whole: NDArray[np.float64] = sizes.max(axis=1, keepdims=True).astype(np.float64)
            return whole
        starts = np.arange(0, values.shape[1], group)
        peaks: NDArray[np.float64] = np.maximum.reduceat(sizes, starts, axis=1).astype(np.float64)
        return peaks

    def encode(
        self, values: Values, noise: np.random.Philox | None, group: int = 0
    ) -> tuple[Bytes, Bytes]:
        scale, stored = self._scales(values, group, fit=noise is None)
        divisor = np.where(scale == 0, np.float32(1), scale).astype(np.float64)
        wide = self.code_bytes(1, values.shape[1]) * 8 // self.bits
        codes = np.zeros((len(values), wide), np.uint8)
        # A few rows at a time: float64 takes 24 bytes a value, and a dense tensor may be large.
        # An even number of them, since one draw of 64 bits rounds two values.
        at_once = 2 * max(1, AT_ONCE // (2 * values.shape[1]))
        for start in range(0, len(values), at_once):
            rows = slice(start, start + at_once)
            each = _each(divisor[rows], values.shape[1], group)
            codes[rows, : values.shape[1]] = self._codes(values[rows] / each, noise)
        return stored, self._joined(codes.reshape(-1))

    def decode(self, data: memoryview, rows: int, columns: int, group: int = 0) -> Values:
        size = self.scale_bytes(rows, columns, group)
        scale = _read_scales(data[:size], rows, group)
        levels = self._split(data[size:]).reshape(rows, -1)[:, :columns]
        with np.errstate(over="ignore", invalid="ignore"):
            levels *= _each(scale, columns, group)
        return levels

    def encode_kept(
        self,
        values: Values,
        mask: NDArray[np.bool_],
        noise: np.random.Philox | None,
        group: int = 0,
    ) -> tuple[Bytes, Bytes]:
        thinned = np.where(mask, values, np.float32(0))
        scale, stored = self._scales(thinned, group, fit=noise is None)
        divisor = np.where(scale == 0, np.float32(1), scale).astype(np.float64)
        kept = np.flatnonzero(mask)
        each = divisor.reshape(-1)[_group_of(kept, values.shape[1], group)]
        codes = np.zeros(self.code_bytes(1, len(kept)) * 8 // self.bits, np.uint8)
        codes[: len(kept)] = self._codes(values.reshape(-1)[kept] / each, noise)
        return stored, self._joined(codes)

    def decode_kept(
        self, data: memoryview, kept: NDArray[np.int64], rows: int, columns: int, group: int = 0
    ) -> Values:
        size = self.scale_bytes(rows, columns, group)
        scale = _read_scales(data[:size], rows, group).reshape(-1)
        levels = self._split(data[size:])[: len(kept)]
        with np.errstate(over="ignore", invalid="ignore"):
            levels *= scale[_group_of(kept, columns, group)]
        return levels

    def squared_errors(
        self, values: Values, mask: NDArray[np.bool_] | None, group: int, *, nearest: bool
    ) -> float:
        scale = self._scales(values, group, fit=nearest)[0]
        each = _each(np.where(scale == 0, np.float32(1), scale), values.shape[1], group)
        errors = self._squared_errors(values / each, nearest=nearest)
        errors *= np.square(each)
        return float(errors.sum(dtype=np.float64, where=True if mask is None else mask))

    def _scales(self, values: Values, group: int, *, fit: bool = False) -> tuple[Values, bytes]:
        """(rows, groups) float32 scales as the reader will have them, and their bytes.

        fit: those of least error to the nearest level, if smaller than what keeps every value
        within the levels; one factor for the whole block.
        """
        peak = self._peaks(values, group)
        if fit and len(self.fits) > 1 and peak.any():
            peak *= self._fit(values, peak, group)
        with np.errstate(over="ignore"):
            scale = (peak / self.highest).astype(np.float32)
            # A scale rounded down would put the peak beyond the highest level, where it is biased.
            low = scale.astype(np.float64) * self.highest < peak
            scale = np.where(low, np.nextafter(scale, np.float32(np.inf)), scale)
            stored = scale.astype("<f4").tobytes()
            if group:
                halves = ((scale.view(np.uint32).astype(np.uint64) + 0xFFFF) >> 16).astype("<u2")
                stored = halves.tobytes()
                scale = (halves.astype(np.uint32) << 16).view(np.float32)
            if not np.isfinite(scale * np.float32(self.highest)).all():
                raise NonFiniteError(
                    f"a value above 3.3e38 is too large for {self.name}; use float32"
                )
        return scale, stored

    def _fit(self, values: Values, peak: NDArray[np.float64], group: int) -> float:
        """Which of `fits`, times the peaks, loses least; tried on a sample of the rows."""
        every = -(-values.size // MOST_FITTED)
        some, scale = values[::every], (peak[::every] / self.highest).astype(np.float32)
        each = _each(np.where(scale == 0, np.float32(1), scale), values.shape[1], group)
        there = some != 0  # of a sparse block, what is kept
        levels, weights = (some / each)[there], np.square(np.broadcast_to(each, some.shape)[there])
        lost = [
            float(weights @ self._squared_errors(levels / np.float32(f), nearest=True)) * f * f
            for f in self.fits
        ]
        return self.fits[int(np.argmin(lost))]

    def _joined(self, codes: NDArray[np.uint8]) -> Bytes:
        """Codes (n,) that fill whole bytes as those bytes, the first in the lowest bits."""
        each = 8 // self.bits
        if each == 1:
            return codes.data
        joined = codes[0::each].copy()
        for place in range(1, each):
            joined |= codes[place::each] << np.uint8(place * self.bits)
        return joined.data

    def _split(self, data: memoryview) -> Values:
        """The levels (n,) of bytes of codes, in memory of their own."""
        levels: Values = self._table.take(np.frombuffer(data, np.uint8), axis=0).reshape(-1)
        return levels

    @cached_property
    def _table(self) -> Values:
        """(256, values of a byte): the levels that each byte stands for."""
        each = 8 // self.bits
        shifts = np.arange(each) * self.bits
        codes = (np.arange(256)[:, None] >> shifts) & (2**self.bits - 1)
        table: Values = self._levels()[codes]
        return table


class _Rounded(_Scaled):
    """Whole steps between levels, rounded up or down at random.

    A value lands on its upper neighbour with probability equal to its distance from the lower
    one, so the expectation is the value itself and the error is below one step (QSGD, arXiv
    1610.02132). The noise is keyed by seed, part and module (`packing`), hence packing again gives
    the same bytes.
    """

    middle: ClassVar[float] = 0.0  # added to levels that lie between whole numbers

    def _codes(
        self, levels: NDArray[np.float64], noise: np.random.Philox | None
    ) -> NDArray[np.uint8]:
        """Whole steps in two's complement of `bits` bits, so that zero is zero."""
        if noise is None:
            steps = np.clip(levels, -self.highest, self.highest)
            return self._floored(steps, 0.5)
        raw = noise.random_raw((levels.size + 1) // 2).astype("<u8").view("<u4")
        # 32 bits of noise and a level of at most 127 add exactly in float64.
        steps = raw[: levels.size].reshape(levels.shape).astype(np.float64)
        steps *= 2.0**-32
        steps += levels
        return self._floored(steps, 0.0)

    def _floored(self, steps: NDArray[np.float64], more: float) -> NDArray[np.uint8]:
        """Codes of whole steps, in the memory of `steps`."""
        if self.middle + more:
            steps += self.middle + more
        codes = np.floor(steps, out=steps).astype(np.int8).view(np.uint8)
        if self.bits < 8:
            codes &= np.uint8(2**self.bits - 1)
        return codes

    def _squared_errors(self, levels: NDArray[Any], *, nearest: bool) -> NDArray[Any]:
        if nearest:
            inside = np.clip(levels, -self.highest, self.highest)
            found = np.rint(inside + np.float32(self.middle))
            found -= levels
            found -= np.float32(self.middle)
            squared: NDArray[Any] = np.square(found, out=found)
            return squared
        up = levels + np.float32(self.middle)
        up -= np.floor(up)
        up -= np.square(up)
        return up

    def _levels(self) -> Values:
        codes = np.arange(2**self.bits)
        signed = np.where(codes < 2 ** (self.bits - 1), codes, codes - 2**self.bits)
        return (signed - self.middle).astype(np.float32)


class Int8(_Rounded):
    """Levels -127 to 127."""

    name: ClassVar[Encoding] = "int8"
    wire_id: ClassVar[int] = 0b000110
    bits: ClassVar[int] = 8
    highest: ClassVar[float] = 127.0


class Int4(_Rounded):
    """Levels -7 to 7."""

    name: ClassVar[Encoding] = "int4"
    wire_id: ClassVar[int] = 0b001001
    bits: ClassVar[int] = 4
    highest: ClassVar[float] = 7.0
    fits: ClassVar[tuple[float, ...]] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


class Int2(_Rounded):
    """Levels -1.5, -0.5, 0.5 and 1.5; a zero comes back as one of the middle two, on average 0."""

    name: ClassVar[Encoding] = "int2"
    wire_id: ClassVar[int] = 0b001010
    bits: ClassVar[int] = 2
    highest: ClassVar[float] = 1.5
    fits: ClassVar[tuple[float, ...]] = (1.0, 0.85, 0.7, 0.6, 0.5, 0.42, 0.35, 0.3, 0.25, 0.2)
    middle: ClassVar[float] = -0.5


class Sign(_Scaled):
    """The sign of a value; the scale is the mean size of its group.

    Not unbiased: what it leaves out must be fed back (EF-signSGD, arXiv 1901.09847). Zero counts
    as positive.
    """

    name: ClassVar[Encoding] = "sign"
    wire_id: ClassVar[int] = 0b001100
    bits: ClassVar[int] = 1
    highest: ClassVar[float] = 1.0

    def _levels(self) -> Values:
        return np.array([-1, 1], np.float32)

    def _codes(
        self, levels: NDArray[np.float64], noise: np.random.Philox | None
    ) -> NDArray[np.uint8]:
        return (levels >= 0).astype(np.uint8)

    def _squared_errors(self, levels: NDArray[Any], *, nearest: bool) -> NDArray[Any]:
        found = np.abs(levels)
        found -= 1
        squared: NDArray[Any] = np.square(found, out=found)
        return squared

    def _peaks(self, values: Values, group: int) -> NDArray[np.float64]:
        """Means over what is there: a sparse block comes with zeros where nothing is kept."""
        starts = np.arange(0, values.shape[1], group or values.shape[1])
        sizes = np.abs(values).astype(np.float64)
        total = np.add.reduceat(sizes, starts, axis=1)
        count = np.add.reduceat((sizes > 0).astype(np.int64), starts, axis=1)
        return np.asarray(total / np.maximum(count, 1), np.float64)


def _each(scale: NDArray[Any], columns: int, group: int) -> NDArray[Any]:
    """(rows, groups) as (rows, columns), or as (rows, 1) where a row has one scale."""
    return np.repeat(scale, group, axis=1)[:, :columns] if group else scale


def _group_of(kept: NDArray[np.int64], columns: int, group: int) -> NDArray[np.int64]:
    """Which scale the values at these flat places have."""
    row, column = np.divmod(kept, columns)
    return row * -(-columns // group) + column // group if group else row


def _read_scales(data: memoryview, rows: int, group: int) -> Values:
    """(rows, groups) float32."""
    if not group:
        return np.frombuffer(data, "<f4").astype(np.float32).reshape(rows, 1)
    halves = np.frombuffer(data, "<u2").astype(np.uint32) << 16
    return halves.view(np.float32).reshape(rows, -1)


CODECS: dict[Encoding, Codec] = {
    codec.name: codec for codec in (Float32(), BFloat16(), Int8(), Int4(), Int2(), Sign())
}
