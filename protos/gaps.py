"""Which values of a sparse block are kept, in the fewest bits: Rice-coded gaps, or a bitmap.

    coder     one byte: b, the low bits of a gap that are stored as they are, or 255 for a bitmap
    rice      the b low bits of every gap, then every gap's upper part in unary: that many zeros
              and a one; both filled up with zeros to a byte
    bitmap    one bit a value, filled up with zeros to a byte

Bits fill bytes from the lowest. A gap is how many values lie between one that is kept and the one
before it. Rice codes with the best b come within 0.03 bits a gap of the entropy of a fair draw at
the densities of interest (Golomb, 1966; Rice, 1979). Knows places only, neither values nor files.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from protos.codecs import PackingError

BITMAP = 255
MOST_BITS = 30


class GapError(PackingError):
    """Bytes that are not the places of as many values as they should be."""


def bitmap_bytes(size: int) -> int:
    """Bytes of the bitmap of a block of `size` values: what no index exceeds, less the coder."""
    return -(-size // 8)


def encode(kept: NDArray[np.int64], size: int) -> bytes:
    """The places `kept` (count,), ascending and below `size`, in whichever form is shorter."""
    count = len(kept)
    gaps = np.diff(kept, prepend=-1) - 1
    best = _shortest(gaps, size)[0]
    if best == BITMAP:
        mask = np.zeros(size, np.uint8)
        mask[kept] = 1
        return bytes((BITMAP,)) + np.packbits(mask, bitorder="little").tobytes()
    lows = (gaps[:, None] >> np.arange(best) & 1).astype(np.uint8)
    ends = np.cumsum((gaps >> best) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1 if count else 0, np.uint8)
    unary[ends] = 1
    packed = (np.packbits(part, bitorder="little").tobytes() for part in (lows.reshape(-1), unary))
    return bytes((best,)) + b"".join(packed)


def encoded_bytes(kept: NDArray[np.int64], size: int) -> int:
    """How long `encode` of these is."""
    return 1 + _shortest(np.diff(kept, prepend=-1) - 1, size)[1]


def _shortest(gaps: NDArray[np.int64], size: int) -> tuple[int, int]:
    """(coder, bytes without its own) of the shorter form."""
    count = len(gaps)
    best, least = BITMAP, 8 * bitmap_bytes(size)
    mean = (size - count) / max(1, count)
    guess = int(np.log2(max(1.0, 0.69 * mean)))
    for low in range(max(0, guess - 1), min(MOST_BITS, guess + 2) + 1):
        needed = 8 * -(-count * low // 8) + int((gaps >> low).sum()) + count  # bits
        if needed < least:
            best, least = low, needed
    return best, -(-least // 8)


def decode(data: memoryview, count: int, size: int) -> NDArray[np.int64]:
    """The places (count,), ascending and below `size`. Raises `GapError`."""
    if not len(data) or len(data) > 1 + bitmap_bytes(size):
        raise GapError(f"an index of {len(data)} bytes cannot be that of {size} values")
    coder, data = data[0], data[1:]
    if coder == BITMAP:
        bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        kept = np.flatnonzero(bits)
        if len(data) != bitmap_bytes(size) or len(kept) != count or bits[size:].any():
            raise GapError("a bitmap and its count of kept values differ; send it again")
        return kept
    lows = -(-count * coder // 8)
    if coder > MOST_BITS or lows > len(data):
        raise GapError("an index is too short for its count of kept values; send it again")
    low = np.unpackbits(np.frombuffer(data[:lows], np.uint8), bitorder="little")
    ends = np.flatnonzero(np.unpackbits(np.frombuffer(data[lows:], np.uint8), bitorder="little"))
    if len(ends) != count or low[count * coder :].any():
        raise GapError("an index and its count of kept values differ; send it again")
    # Else there were more bytes than the gaps need, and two files for one meaning.
    if len(data) - lows != (-(-(int(ends[-1]) + 1) // 8) if count else 0):
        raise GapError("an index is longer than its gaps; send it again")
    upper = np.diff(ends, prepend=-1) - 1
    weights = 1 << np.arange(coder, dtype=np.int64)
    gaps = (upper << coder) + low[: count * coder].reshape(count, coder).astype(np.int64) @ weights
    kept = np.cumsum(gaps + 1) - 1
    if count and not (kept[-1] < size and (gaps >= 0).all()):
        raise GapError(f"an index names a value beyond the {size} of its block; send it again")
    return kept
