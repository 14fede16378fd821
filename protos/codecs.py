"""How blocks of numbers become bytes: floats, halves, and 8, 4, 2 or 1 bit under a scale.

Knows one (rows, columns) block at a time, or the values that a sparse file keeps of it. It does
not know files, modules or parts (`packing`), nor which values are kept (`gaps`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from profiles.errors import SketchfleetError
from protos.contract import Encoding

Values = NDArray[np.float32]
Bytes = bytes | memoryview
AT_ONCE = 1 << 16  # values that are rounded together


class PackingError(SketchfleetError):
    """Factors cannot be packed, or bytes are not the packed file they should be."""


class NonFiniteError(PackingError):
    """A value or scale is NaN, infinite, or too large for the encoding."""


def squares(values: Values) -> float:
    """The sum of squared values, in float32 blocks; not finite if a value is not, or too large."""
    flat = values.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.dot(flat, flat))


def all_finite(values: Values) -> bool:
    """Whether no value is NaN or infinite; looks twice only where squares overflow."""
    return math.isfinite(squares(values)) or bool(np.isfinite(values).all())


class Codec(ABC):
    """How finite float32 become bytes. `noise` is seeded; zero decodes to zero wherever it can.

    wire_id: pairwise two bits apart, so that no single flipped bit turns one into another.
    bits: of a value. scaled: values are multiples of the scale of their group, which is `group`
    neighbours in a row (the last one of a row may have fewer), or the whole row for 0. A scale is
    a float32 for a row and a bfloat16 for a smaller group.
    """

    name: ClassVar[Encoding]
    wire_id: ClassVar[int]
    bits: ClassVar[int]
    scaled: ClassVar[bool] = False

    def groups(self, columns: int, group: int) -> int:
        """Scales of a row."""
        return (-(-columns // group) if group else 1) if self.scaled else 0

    def scale_bytes(self, rows: int, columns: int, group: int) -> int:
        """Bytes of all scales of a block."""
        return rows * self.groups(columns, group) * (2 if group else 4)

    def code_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the values of a block, less their scales: every row is filled up to a byte.

        So rows can be cut, and k of r rows take exactly k/r of the bytes. What a sparse file keeps
        of a block is one row.
        """
        return rows * -(-columns * self.bits // 8)

    @abstractmethod
    def encode(
        self, values: Values, noise: np.random.Philox, group: int = 0
    ) -> tuple[Bytes, Bytes]:
        """Scales and values of a (rows, columns) block. Raises `NonFiniteError` on overflow."""

    @abstractmethod
    def decode(self, data: memoryview, rows: int, columns: int, group: int = 0) -> Values:
        """A (rows, columns) array from scales and values, perhaps a read-only view of `data`.

        May hold non-finite values when `data` is hostile.
        """

    @abstractmethod
    def encode_kept(
        self, values: Values, mask: NDArray[np.bool_], noise: np.random.Philox, group: int = 0
    ) -> tuple[Bytes, Bytes]:
        """Scales of a (rows, columns) block, and its values where `mask` says, in order."""

    @abstractmethod
    def decode_kept(
        self, data: memoryview, kept: NDArray[np.int64], rows: int, columns: int, group: int = 0
    ) -> Values:
        """The values (count,) at the flat places `kept`, from scales and values."""


class _Plain(Codec):
    """Values that stand for themselves."""

    stored: ClassVar[Any]  # the little-endian type of a value

    @abstractmethod
    def _code(self, values: Values) -> NDArray[Any]:
        """As they are stored."""

    @abstractmethod
    def _value(self, codes: NDArray[Any]) -> Values:
        """As they were."""

    def encode(
        self, values: Values, noise: np.random.Philox, group: int = 0
    ) -> tuple[Bytes, Bytes]:
        return b"", np.ascontiguousarray(self._code(values), self.stored).data.cast("B")

    def decode(self, data: memoryview, rows: int, columns: int, group: int = 0) -> Values:
        return self._value(np.frombuffer(data, self.stored)).reshape(rows, columns)

    def encode_kept(
        self, values: Values, mask: NDArray[np.bool_], noise: np.random.Philox, group: int = 0
    ) -> tuple[Bytes, Bytes]:
        return self.encode(values[mask], noise)

    def decode_kept(
        self, data: memoryview, kept: NDArray[np.int64], rows: int, columns: int, group: int = 0
    ) -> Values:
        return self._value(np.frombuffer(data, self.stored))


class Float32(_Plain):
    """Values as they are."""

    name: ClassVar[Encoding] = "float32"
    wire_id: ClassVar[int] = 0b000011
    bits: ClassVar[int] = 32
    stored: ClassVar[Any] = "<f4"

    def _code(self, values: Values) -> NDArray[Any]:
        return values

    def _value(self, codes: NDArray[Any]) -> Values:
        """On little-endian machines a view."""
        return codes.astype(np.float32, copy=False)


class BFloat16(_Plain):
    """Upper half of a float32, rounded to nearest even: relative error at most 2**-8."""

    name: ClassVar[Encoding] = "bfloat16"
    wire_id: ClassVar[int] = 0b000101
    bits: ClassVar[int] = 16
    stored: ClassVar[Any] = "<u2"

    def _code(self, values: Values) -> NDArray[Any]:
        """Adds half of the dropped part, less one when the kept part is even, then cuts."""
        bits = values.astype(np.float32).view(np.uint32)
        halves = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype("<u2")
        if np.any((halves & 0x7F80) == 0x7F80):
            raise NonFiniteError("a value above 3.39e38 is too large for bfloat16; use float32")
        return halves

    def _value(self, codes: NDArray[Any]) -> Values:
        """Exact: every bfloat16 is a float32."""
        return (codes.astype(np.uint32) << 16).view(np.float32)


class _Scaled(Codec):
    """Values as a few levels of the scale of their group."""

    scaled: ClassVar[bool] = True
    highest: ClassVar[float]  # level; the peak of a group is this many scales

    @abstractmethod
    def _levels(self) -> Values:
        """The level of each code."""

    @abstractmethod
    def _codes(self, levels: NDArray[np.float64], noise: np.random.Philox) -> NDArray[np.uint8]:
        """The codes (0 .. 2**bits - 1) of values given in scales."""

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
        self, values: Values, noise: np.random.Philox, group: int = 0
    ) -> tuple[Bytes, Bytes]:
        scale, stored = self._scales(values, group)
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
        self, values: Values, mask: NDArray[np.bool_], noise: np.random.Philox, group: int = 0
    ) -> tuple[Bytes, Bytes]:
        scale, stored = self._scales(np.where(mask, values, np.float32(0)), group)
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

    def _scales(self, values: Values, group: int) -> tuple[Values, bytes]:
        """(rows, groups) float32 scales as the reader will have them, and their bytes."""
        peak = self._peaks(values, group)
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

    def _codes(self, levels: NDArray[np.float64], noise: np.random.Philox) -> NDArray[np.uint8]:
        """Whole steps in two's complement of `bits` bits, so that zero is zero."""
        raw = noise.random_raw((levels.size + 1) // 2).astype("<u8").view("<u4")
        # 32 bits of noise and a level of at most 127 add exactly in float64.
        steps = raw[: levels.size].reshape(levels.shape).astype(np.float64)
        steps *= 2.0**-32
        steps += levels
        if self.middle:
            steps += self.middle
        codes = np.floor(steps, out=steps).astype(np.int8).view(np.uint8)
        if self.bits < 8:
            codes &= np.uint8(2**self.bits - 1)
        return codes

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


class Int2(_Rounded):
    """Levels -1.5, -0.5, 0.5 and 1.5; a zero comes back as one of the middle two, on average 0."""

    name: ClassVar[Encoding] = "int2"
    wire_id: ClassVar[int] = 0b001010
    bits: ClassVar[int] = 2
    highest: ClassVar[float] = 1.5
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

    def _codes(self, levels: NDArray[np.float64], noise: np.random.Philox) -> NDArray[np.uint8]:
        return (levels >= 0).astype(np.uint8)

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
