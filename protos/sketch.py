"""Which rows of a module a device's sketch holds, derived alike at both ends of the wire.

One permutation per (seed, round, module); a device takes a cyclic block of it, so consecutive
blocks cover every row floor(sum k / r) or ceil(sum k / r) times and each row is in a device's
sketch with probability k / r (FSLoRA, arXiv 2501.19389, needs the latter to be unbiased).
It does not know who the devices are or how blocks are dealt out: the planner hands in offsets.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from profiles.errors import SketchfleetError


class SketchError(SketchfleetError, ValueError):
    """A sketch size that the global rank does not allow."""


def keyed_stream(purpose: str, *parts: int | str) -> np.random.Philox:
    """A counter-based stream that depends on its key alone: Philox under SHA-256 of the parts.

    Draw with `random_raw` only. NumPy keeps the streams of bit generators stable across versions;
    the methods of `Generator` it may change (NEP 19), and two ends with different NumPy would
    then disagree about rows without any error. Put free text last: parts are joined by "/".
    """
    text = "/".join(("sketchfleet", purpose, *map(str, parts)))
    digest = hashlib.sha256(text.encode()).digest()
    return np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64))


def sketch_rows(
    seed: int, round_: int, module: str, rank: int, offset: int, k: int
) -> NDArray[np.int64]:
    """Sorted indices (k,) int64 of the rows a device holds, the same for both factors.

    `seed` is the run's, `rank` the global r, `offset` where the device's cyclic block of k begins
    in the module's permutation (any integer; taken modulo r). Raises `SketchError`.
    """
    if not 1 <= k <= rank:
        raise SketchError(
            f"a sketch of {k} rows does not fit a global rank of {rank}; assign k in 1..{rank}"
        )
    if k == rank:
        return np.arange(rank, dtype=np.int64)
    block = np.arange(offset % rank, offset % rank + k) % rank
    return np.sort(_permutation(seed, round_, module, rank)[block])


@lru_cache(maxsize=4096)  # a merge asks for each module's permutation once per participant
def _permutation(seed: int, round_: int, module: str, rank: int) -> NDArray[np.int64]:
    keys = keyed_stream("sketch", seed, round_, module).random_raw(rank)
    order = np.argsort(keys, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order
