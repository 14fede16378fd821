"""What both ends of the wire derive alike: which rows a device holds, and where draws start.

Stratified sketches share one permutation per (seed, round, module); a device takes a cyclic block
of it, so consecutive blocks cover every row floor(sum k / r) or ceil(sum k / r) times. Independent
sketches draw a permutation per device as well. Either way each row is in a device's sketch with
probability k / r (FSLoRA, arXiv 2501.19389, needs that to be unbiased). Prefixes are the first k
rows. It does not know how blocks are dealt out: the planner hands in offsets.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from profiles.errors import SketchfleetError
from protos.contract import AdapterSpec, Assignment


class SketchError(SketchfleetError, ValueError):
    """A slice that the global rank does not allow."""


def keyed_stream(purpose: str, *parts: int | str) -> np.random.Philox:
    """A counter-based stream that depends on its key alone: Philox under SHA-256 of the parts.

    Draw with `random_raw` only. NumPy keeps the streams of bit generators stable across versions;
    the methods of `Generator` it may change (NEP 19), and two ends with different NumPy would
    then disagree about rows without any error. Put free text last: parts are joined by "/".
    """
    text = "/".join(("sketchfleet", purpose, *map(str, parts)))
    digest = hashlib.sha256(text.encode()).digest()
    return np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64))


def slice_rows(spec: AdapterSpec, task: Assignment, module: str) -> NDArray[np.int64]:
    """The global rows that an assignment's slice of this module holds. Raises `SketchError`."""
    k = task.rank
    if not 1 <= k <= spec.rank:
        raise SketchError(
            f"a slice of {k} rows does not fit a global rank of {spec.rank}; assign k in "
            f"1..{spec.rank}"
        )
    if task.rows == "prefix":
        return np.arange(k, dtype=np.int64)
    device = task.device_id if task.rows == "independent" else ""
    return sketch_rows(
        spec.seed, task.round, module, spec.rank, task.sketch_offset, k, device_id=device
    )


def sketch_rows(
    seed: int, round_: int, module: str, rank: int, offset: int, k: int, *, device_id: str = ""
) -> NDArray[np.int64]:
    """Sorted indices (k,) int64 of the rows a device holds, the same for both factors.

    `seed` is the run's, `rank` the global r, `offset` where the device's cyclic block of k begins
    in the module's permutation (any integer; taken modulo r). With a `device_id` the permutation
    is the device's own. Raises `SketchError`.
    """
    if not 1 <= k <= rank:
        raise SketchError(
            f"a sketch of {k} rows does not fit a global rank of {rank}; assign k in 1..{rank}"
        )
    if k == rank:
        return np.arange(rank, dtype=np.int64)
    block = np.arange(offset % rank, offset % rank + k) % rank
    return np.sort(_permutation(seed, round_, module, rank, device_id)[block])


def initial_down(
    seed: int, module: str, rank: int, features: int, *, round_: int = 0, device_id: str = ""
) -> NDArray[np.float32]:
    """The down factor (rank, features) float32 that an adapter starts from.

    PEFT's own start, U(-1/sqrt(n), 1/sqrt(n)) (Kaiming uniform with a = sqrt 5), from a key. With
    a `device_id` it is that device's fresh draw for the round (FLoRA, arXiv 2409.05976).
    """
    parts = ("fresh", seed, round_, device_id, module) if device_id else ("initial", seed, module)
    raw = keyed_stream(*parts).random_raw(rank * features)
    unit = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53  # [0, 1)
    drawn: NDArray[np.float64] = (2.0 * unit - 1.0) / math.sqrt(features)
    return drawn.reshape(rank, features).astype(np.float32)


@lru_cache(maxsize=4096)  # a merge asks for each module's permutation once per participant
def _permutation(
    seed: int, round_: int, module: str, rank: int, device_id: str
) -> NDArray[np.int64]:
    whose = (seed, round_, device_id, module) if device_id else (seed, round_, module)
    keys = keyed_stream("sketch", *whose).random_raw(rank)
    order = np.argsort(keys, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order
