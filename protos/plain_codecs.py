"""What a codec is, and those whose values stand for themselves: floats and halves.

Knows one (rows, columns) block at a time, or the values that a sparse file keeps of it. It does
not know files, modules or parts (`packing`), nor which values are kept (`gaps`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from profiles.errors import SketchfleetError
from protos.contract import Encoding

Values = NDArray[np.float32]
Bytes = bytes | memoryview


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
    """How finite float32 become bytes. Zero decodes to zero wherever it can.

    noise: seeded, for rounding without bias. None rounds to the nearest level under the scale of
    least error, which is biased and loses far less: for updates with error feedback.

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
        self, values: Values, noise: np.random.Philox | None, group: int = 0
    ) -> tuple[Bytes, Bytes]:
        """Scales and values of a (rows, columns) block. Raises `NonFiniteError` on overflow."""

    @abstractmethod
    def decode(self, data: memoryview, rows: int, columns: int, group: int = 0) -> Values:
        """A (rows, columns) array from scales and values, perhaps a read-only view of `data`.

        May hold non-finite values when `data` is hostile.
        """

    @abstractmethod
    def encode_kept(
        self,
        values: Values,
        mask: NDArray[np.bool_],
        noise: np.random.Philox | None,
        group: int = 0,
    ) -> tuple[Bytes, Bytes]:
        """Scales of a (rows, columns) block, and its values where `mask` says, in order."""

    @abstractmethod
    def decode_kept(
        self, data: memoryview, kept: NDArray[np.int64], rows: int, columns: int, group: int = 0
    ) -> Values:
        """The values (count,) at the flat places `kept`, from scales and values."""

    @abstractmethod
    def squared_errors(
        self, values: Values, mask: NDArray[np.bool_] | None, group: int, *, nearest: bool
    ) -> float:
        """Expected sum of squared errors of a (rows, columns) block, or of what `mask` keeps of it.

        values: zeros where the mask says no. nearest: as without noise. Raises `NonFiniteError`.
        """


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
        self, values: Values, noise: np.random.Philox | None, group: int = 0
    ) -> tuple[Bytes, Bytes]:
        return b"", np.ascontiguousarray(self._code(values), self.stored).data.cast("B")

    def decode(self, data: memoryview, rows: int, columns: int, group: int = 0) -> Values:
        return self._value(np.frombuffer(data, self.stored)).reshape(rows, columns)

    def encode_kept(
        self,
        values: Values,
        mask: NDArray[np.bool_],
        noise: np.random.Philox | None,
        group: int = 0,
    ) -> tuple[Bytes, Bytes]:
        return self.encode(values[mask], noise)

    def decode_kept(
        self, data: memoryview, kept: NDArray[np.int64], rows: int, columns: int, group: int = 0
    ) -> Values:
        return self._value(np.frombuffer(data, self.stored))

    def squared_errors(
        self, values: Values, mask: NDArray[np.bool_] | None, group: int, *, nearest: bool
    ) -> float:
        return squares(self._value(self._code(values)) - values)


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
