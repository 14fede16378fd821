"""Writes the one file format of adapter slices, whole adapters and updates (`protos.layout`).

Knows values and files. It does not know which rows of the global adapter these are
(`protos.sketch`), how files are read (`unpacking`), nor how bytes travel (`transfer`).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import IO

import numpy as np
import zstandard
from numpy.typing import NDArray

from protos import gaps
from protos.codecs import Bytes, NonFiniteError, Values, all_finite
from protos.contract import AdapterSpec, Part, Payload
from protos.layout import (
    FRAME,
    HEADER_BYTES,
    NO_ASSIGNMENT,
    Block,
    Layout,
    WrongShapeError,
    codec_of,
    header_of,
    layout_of,
)
from protos.sketch import keyed_stream

ZSTD_LEVEL = 1  # values are noise to it: higher levels find nothing more in them


class PackedWriter:
    """Writes a packed file part by part into a binary stream, so that memory holds one module.

    The stream must be seekable if the payload is compressed. Not for sparse payloads: which values
    are kept depends on all of them (`pack`). Without a seed values go to their nearest level, for
    files with error feedback. `seed` alone keys the rounding noise: pass the
    assignment's own, which differs by round and device, so that devices do not err alike. Its
    digest keys nothing, since it names the run and where the base lies, and plans replayed
    elsewhere must give the same bits.
    """

    def __init__(
        self,
        stream: IO[bytes],
        spec: AdapterSpec,
        payload: Payload,
        *,
        assignment_digest: bytes = NO_ASSIGNMENT,
        seed: int | None = 0,
    ) -> None:
        self._layout, self._codec = layout_of(spec, payload), codec_of(payload.encoding)
        if self._layout.kept:
            raise WrongShapeError("a sparse file cannot be written by parts; use pack")
        self._stream, self._group = stream, payload.group
        self._seed = seed if self._codec.scaled else None  # others round without noise
        self._due = [(name, part) for name, parts in self._layout.blocks.items() for part in parts]
        self._due.reverse()
        self._begin = stream.tell() if payload.compressed else 0
        self._table: list[int] = []
        stream.write(header_of(self._layout, payload, assignment_digest))
        stream.write(bytes(self._layout.table_bytes))

    def write(self, name: str, parts: Mapping[Part, Values]) -> None:
        """The next module or dense tensor of the spec; nothing, if the file holds none of it.

        Raises `PackingError`.
        """
        if name not in self._layout.names:
            raise WrongShapeError(f"{name} is unknown; write the tensors of the spec")
        for part, block in self._layout.blocks.get(name, {}).items():
            if self._due[-1:] != [(name, part)] or part not in parts:
                raise WrongShapeError(f"{name} {part} is missing or out of turn; follow the spec")
            values = _finite_block(parts[part], block, f"{name} {part}")
            noise = _noise(self._seed, name, part)
            scales, codes = self._codec.encode(values, noise, self._group)
            if self._layout.fixed:
                self._stream.write(scales)
                self._stream.write(codes)
            else:
                stored, length = _shorter(b"".join((scales, codes)))
                self._stream.write(stored)
                self._table += [values.size, length]
            self._due.pop()

    def finish(self) -> None:
        """Raises `WrongShapeError` unless everything was written."""
        if self._due:
            name, part = self._due[-1]
            raise WrongShapeError(f"{len(self._due)} parts were not written, first {name} {part}")
        if not self._layout.fixed:
            end = self._stream.tell()
            self._stream.seek(self._begin + HEADER_BYTES)
            self._stream.write(np.array(self._table, "<u4").tobytes())
            self._stream.seek(end)


def pack(
    spec: AdapterSpec,
    payload: Payload,
    factors: Mapping[str, Mapping[Part, Values]],
    *,
    assignment_digest: bytes = NO_ASSIGNMENT,
    seed: int | None = 0,
) -> bytes:
    """Packs the payload's parts of every module of the spec (`PackedWriter` for `seed`).

    factors: module or tensor name -> part -> values; parts that the payload does not name are
    passed over. A sparse payload keeps the values of largest magnitude over all blocks together,
    the first of equals. Raises `PackingError`.
    """
    layout = layout_of(spec, payload)
    if missing := [name for name in layout.blocks if name not in factors]:
        raise WrongShapeError(
            f"{len(missing)} modules are missing, first {missing[0]}; pack all of the spec"
        )
    if unknown := [name for name in factors if name not in layout.names]:
        raise WrongShapeError(
            f"{len(unknown)} modules are unknown, first {unknown[0]}; pack those of the spec"
        )
    if layout.kept:
        return _pack_sparse(layout, payload, factors, assignment_digest, seed)
    stream = io.BytesIO()
    writer = PackedWriter(stream, spec, payload, assignment_digest=assignment_digest, seed=seed)
    for name in layout.blocks:
        writer.write(name, factors[name])
    writer.finish()
    return stream.getvalue()


def _pack_sparse(
    layout: Layout,
    payload: Payload,
    factors: Mapping[str, Mapping[Part, Values]],
    assignment_digest: bytes,
    seed: int | None,
) -> bytes:
    codec = codec_of(payload.encoding)
    places = [(name, part) for name, parts in layout.blocks.items() for part in parts]
    for name, part in places:
        if part not in factors[name]:
            raise WrongShapeError(f"{name} {part} is missing; pack what the payload names")
    values = [
        _finite_block(factors[name][part], layout.blocks[name][part], f"{name} {part}")
        for name, part in places
    ]
    table: list[int] = []
    body: list[Bytes] = []
    for (name, part), block, mask in zip(places, values, largest(values, layout.kept), strict=True):
        kept = np.flatnonzero(mask)
        scales, codes = codec.encode_kept(block, mask, _noise(seed, name, part), payload.group)
        stored = b"".join((gaps.encode(kept, block.size), scales, codes))
        length = len(stored)
        if payload.compressed:
            stored, length = _shorter(stored)
        table += [len(kept), length]
        body.append(stored)
    head = header_of(layout, payload, assignment_digest)
    return b"".join((head, np.array(table, "<u4").tobytes(), *body))


def _shorter(block: bytes) -> tuple[bytes, int]:
    """A block as it is, or as a Zstandard frame where that is shorter, and its table entry."""
    frame = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(block)
    return (frame, len(frame) | FRAME) if len(frame) < len(block) else (block, len(block))


def largest(values: Sequence[Values], kept: int) -> list[NDArray[np.bool_]]:
    """Masks of the `kept` largest magnitudes over all blocks; the first of equals."""
    sizes = np.concatenate([np.abs(block).ravel() for block in values])
    threshold = np.partition(sizes, len(sizes) - kept)[len(sizes) - kept]
    chosen = sizes > threshold
    ties = np.flatnonzero(sizes == threshold)
    chosen[ties[: kept - int(chosen.sum())]] = True
    ends = np.cumsum([block.size for block in values])
    return [
        part.reshape(block.shape)
        for part, block in zip(np.split(chosen, ends[:-1]), values, strict=True)
    ]


def _noise(seed: int | None, name: str, part: Part) -> np.random.Philox | None:
    return None if seed is None else keyed_stream("pack", seed, part, name)


def _finite_block(values: Values, block: Block, what: str) -> Values:
    shape = (block.rows, block.columns)
    if values.shape != shape:
        raise WrongShapeError(
            f"{what} has shape {values.shape}, the spec and k ask for {shape}; "
            f"rows come first, pass (k, features)"
        )
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is refused
        found = np.ascontiguousarray(values, dtype=np.float32)
    if not all_finite(found):
        raise NonFiniteError(
            f"{what} holds NaN or infinite values; only finite factors are packed, lower the "
            f"learning rate and train again"
        )
    return found
