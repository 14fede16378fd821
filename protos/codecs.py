"""How blocks of numbers become bytes: float32, bfloat16, int8 with unbiased rounding.

Knows one (rows, columns) block at a time. It does not know files, modules or parts (`packing`).
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from profiles.errors import SketchfleetError
from protos.contract import Encoding

Values = NDArray[np.float32]
AT_ONCE = 1 << 16  # values that int8 rounds together


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


class Codec(Protocol):
    """How a (rows, columns) block of finite float32 becomes bytes. `noise` is seeded."""

    name: Encoding
    wire_id: int  # pairwise two bits apart, so that no single flipped bit turns one into another
    value_bytes: int
    scale_bytes: int  # per row, ahead of the values

    def encode(self, values: Values, noise: np.random.Philox) -> bytes | memoryview:
        """Exactly rows * (scale_bytes + columns * value_bytes) bytes; zero becomes zero bytes.

        Raises `NonFiniteError` on overflow.
        """

    def decode(self, data: memoryview, rows: int, columns: int) -> Values:
        """A (rows, columns) array, perhaps a read-only view of `data`.

        May hold non-finite values when `data` is hostile.
        """


class Float32:
    """Values as they are."""

    name: Encoding = "float32"
    wire_id = 1
    value_bytes = 4
    scale_bytes = 0

    def encode(self, values: Values, noise: np.random.Philox) -> memoryview:
        """Little-endian floats: where that is this machine's form, the values themselves."""
        return np.ascontiguousarray(values, dtype="<f4").data.cast("B")

    def decode(self, data: memoryview, rows: int, columns: int) -> Values:
        """The same values, bit for bit: on little-endian machines a view of `data`."""
        found = np.frombuffer(data, dtype="<f4").reshape(rows, columns)
        return found.astype(np.float32, copy=False)


class BFloat16:
    """Upper half of a float32, rounded to nearest even: relative error at most 2**-8."""

    name: Encoding = "bfloat16"
    wire_id = 2
    value_bytes = 2
    scale_bytes = 0

    def encode(self, values: Values, noise: np.random.Philox) -> bytes:
        """Adds half of the dropped part, less one when the kept part is even, then cuts."""
        bits = values.astype(np.float32).view(np.uint32)
        halves = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype("<u2")
        if np.any((halves & 0x7F80) == 0x7F80):
            raise NonFiniteError("a value above 3.39e38 is too large for bfloat16; use float32")
        return halves.tobytes()

    def decode(self, data: memoryview, rows: int, columns: int) -> Values:
        """Exact: every bfloat16 is a float32."""
        bits = np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(rows, columns)


class Int8:
    """Signed bytes under a per-row scale (absmax / 127), rounded up or down at random.

    A value lands on its upper neighbour with probability equal to its distance from the lower
    one, so the expectation is the value itself and the error is below one scale (QSGD, arXiv
    1610.02132). The noise is keyed by seed, part and module (`packing`), hence packing again gives
    the same bytes.
    """

    name: Encoding = "int8"
    wire_id = 4
    value_bytes = 1
    scale_bytes = 4

    def encode(self, values: Values, noise: np.random.Philox) -> bytes:
        """Scales (rows,) float32, then bytes (rows, columns)."""
        peak = np.abs(values).max(axis=1).astype(np.float64)
        scale = (peak / 127).astype(np.float32)
        # A scale rounded down would put the peak beyond 127, where clipping biases it.
        low = scale.astype(np.float64) * 127 < peak
        scale = np.where(low, np.nextafter(scale, np.float32(np.inf)), scale)
        with np.errstate(over="ignore"):
            if not np.isfinite(scale * np.float32(127)).all():
                raise NonFiniteError("a value above 3.40e38 is too large for int8; use float32")
        divisor = np.where(scale == 0, np.float32(1), scale).astype(np.float64)
        steps = np.empty(values.shape, dtype=np.int8)
        # A few rows at a time: float64 takes 24 bytes a value, and a dense tensor may be large.
        # An even number of them, since one draw of 64 bits rounds two values.
        at_once = 2 * max(1, AT_ONCE // (2 * values.shape[1]))
        for start in range(0, len(values), at_once):
            rows = slice(start, start + at_once)
            some = values[rows]
            raw = noise.random_raw((some.size + 1) // 2).astype("<u8").view("<u4")
            # 32 bits of noise and a quotient of at most 127 add exactly in float64.
            offset = raw[: some.size].reshape(some.shape).astype(np.float64) * 2.0**-32
            steps[rows] = np.floor(some / divisor[rows, None] + offset)
        return b"".join((scale.astype("<f4").tobytes(), steps.tobytes()))

    def decode(self, data: memoryview, rows: int, columns: int) -> Values:
        """Byte times the scale of its row, float32."""
        scale = np.frombuffer(data[: 4 * rows], dtype="<f4").astype(np.float32)
        steps = np.frombuffer(data[4 * rows :], dtype=np.int8).reshape(rows, columns)
        with np.errstate(over="ignore", invalid="ignore"):
            return steps.astype(np.float32) * scale[:, None]


CODECS: dict[Encoding, Codec] = {codec.name: codec for codec in (Float32(), BFloat16(), Int8())}
