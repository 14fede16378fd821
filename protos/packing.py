"""The one file format of adapter slices, whole adapters and updates (`docs/wire-format.md`).

    header    magic "SKFP", version u16, encoding u16, parts u16, zero u16, modules u32, rows u32,
              kept u64, spec digest 32 bytes, assignment digest 32 bytes        = 92 bytes
    module    its parts in the order up (k, m), down (k, n), core (k, k); modules in the order of
              the spec, then the spec's dense tensors
    float32   k*c little-endian floats
    bfloat16  k*c upper halves of floats, rounded to nearest even
    int8      k float32 scales, then k*c signed bytes; value = scale of its row * byte
    sparse    (kept > 0) a u32 count for each block; then for each block a bitmap of k*c bits, the
              scales, if any, and the values whose bit is set

The layout follows from (spec, payload) alone, so the size is known before a byte is read, and
nothing is ever allocated by what a sender claims. It does not know which rows of the global
adapter these are (`protos.sketch`), nor how bytes travel (`protos.transfer`).
"""

from __future__ import annotations

import io
import math
import os
import struct
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, get_args

import numpy as np
from numpy.typing import NDArray

from protos.codecs import CODECS, Codec, NonFiniteError, PackingError, Values, all_finite, squares
from protos.contract import AdapterSpec, Encoding, Part, Payload
from protos.sketch import keyed_stream

__all__ = [
    "CODECS",
    "HEADER",
    "HEADER_BYTES",
    "NO_ASSIGNMENT",
    "NonFiniteError",
    "PackedFile",
    "PackedReader",
    "PackedWriter",
    "PackingError",
    "Parts",
    "Values",
    "WrongAssignmentError",
    "WrongEncodingError",
    "WrongFormatError",
    "WrongShapeError",
    "WrongSizeError",
    "WrongSpecError",
    "open_packed",
    "pack",
    "packed_bytes",
    "unpack",
]

MAGIC = b"SKFP"
VERSION = 2
HEADER = struct.Struct("<4sHHHHIIQ32s32s")
HEADER_BYTES = HEADER.size
NO_ASSIGNMENT = bytes(32)  # heads slices and adapters, which answer no assignment

PARTS: tuple[Part, ...] = get_args(Part)

Parts = dict[Part, Values]
"""One module: up (k, m), down (k, n), core (k, k); or one dense tensor under "dense"."""
Buffer = bytes | bytearray | memoryview


class WrongSizeError(PackingError):
    """The file is shorter or longer than its spec and payload allow, or holds another k."""


class WrongFormatError(PackingError):
    """Not a packed file, or one of another version."""


class WrongSpecError(PackingError):
    """Packed for another run: base model, rank, alpha, seed or modules differ."""


class WrongAssignmentError(PackingError):
    """The file answers another assignment."""


class WrongEncodingError(PackingError):
    """An encoding that does not exist or was not agreed on."""


class WrongShapeError(PackingError):
    """Factors or k that the spec does not allow."""


@dataclass(frozen=True)
class _Block:
    """One part of one module: where it begins in a file that is not sparse, and its shape."""

    index: int
    offset: int
    rows: int
    columns: int


@dataclass(frozen=True)
class _Layout:
    """Where everything lies. `kept`: values in a sparse file, 0 in one that holds all of them."""

    spec_digest: bytes
    names: frozenset[str]  # all of the spec, whether this file holds any of their parts or not
    modules: int
    blocks: dict[str, dict[Part, _Block]]
    count: int  # blocks
    kept: int
    total_bytes: int


@lru_cache(maxsize=64)  # a merge opens the same layout once per module and participant
def _layout(spec: AdapterSpec, payload: Payload) -> _Layout:
    k, codec = payload.rank, _codec(payload.encoding)
    if k < 1:
        raise WrongShapeError(f"an adapter of {k} rows cannot be packed; use at least one")
    if not set(payload.parts) <= set(PARTS) or not 0 < payload.density <= 1:
        raise WrongShapeError(
            f"parts {payload.parts} at density {payload.density} cannot be packed; name some of "
            f"{', '.join(PARTS)} and keep a share in (0, 1]"
        )
    names = [tensor.name for tensor in (*spec.modules, *spec.dense)]
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise WrongShapeError(f"the spec names {twice} twice; give every tensor its own name")
    shapes: dict[str, dict[Part, tuple[int, int]]] = {}
    for module in spec.modules:
        m, n = module.out_features, module.in_features
        sides: dict[Part, tuple[int, int]] = {"up": (k, m), "down": (k, n), "core": (k, k)}
        if found := {part: sides[part] for part in sides if part in payload.parts}:
            shapes[module.name] = found
    if "dense" in payload.parts:
        shapes |= {t.name: {"dense": (t.out_features, t.in_features)} for t in spec.dense}
    blocks: dict[str, dict[Part, _Block]] = {}
    offset, values, scales, count = HEADER_BYTES, 0, 0, 0
    bitmaps = 0
    for name, parts in shapes.items():
        blocks[name] = {}
        for part, (rows, columns) in parts.items():
            blocks[name][part] = _Block(count, offset, rows, columns)
            offset += rows * (codec.scale_bytes + columns * codec.value_bytes)
            values += rows * columns
            scales += rows * codec.scale_bytes
            bitmaps += -(-rows * columns // 8)
            count += 1
    if not count:
        raise WrongShapeError(
            f"the spec has nothing of the parts {payload.parts}; leave such a file out"
        )
    kept = 0
    if payload.density < 1:
        kept = max(1, math.ceil(payload.density * values - 1e-9))
        offset = HEADER_BYTES + 4 * count + bitmaps + scales + kept * codec.value_bytes
    return _Layout(spec.digest, frozenset(names), len(spec.modules), blocks, count, kept, offset)


def packed_bytes(spec: AdapterSpec, payload: Payload) -> int:
    """Exact size of a packed file."""
    return _layout(spec, payload).total_bytes


class PackedWriter:
    """Writes a packed file part by part into a binary stream, so that memory holds one module.

    Not for sparse payloads: which values are kept depends on all of them (`pack`). `seed` alone
    keys the rounding noise of int8: pass the assignment's own, which differs by round and device,
    so that devices do not err alike. Its digest keys nothing, since it names the run and where the
    base lies, and plans replayed elsewhere must give the same bits.
    """

    def __init__(
        self,
        stream: IO[bytes],
        spec: AdapterSpec,
        payload: Payload,
        *,
        assignment_digest: bytes = NO_ASSIGNMENT,
        seed: int = 0,
    ) -> None:
        self._layout, self._codec = _layout(spec, payload), _codec(payload.encoding)
        if self._layout.kept:
            raise WrongShapeError("a sparse file cannot be written by parts; use pack")
        self._stream, self._seed = stream, seed
        self._due = [(name, part) for name, parts in self._layout.blocks.items() for part in parts]
        self._due.reverse()
        stream.write(_header(self._layout, payload, assignment_digest))

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
            self._stream.write(self._codec.encode(values, _noise(self._seed, name, part)))
            self._due.pop()

    def finish(self) -> None:
        """Raises `WrongShapeError` unless everything was written."""
        if self._due:
            name, part = self._due[-1]
            raise WrongShapeError(f"{len(self._due)} parts were not written, first {name} {part}")


def pack(
    spec: AdapterSpec,
    payload: Payload,
    factors: Mapping[str, Mapping[Part, Values]],
    *,
    assignment_digest: bytes = NO_ASSIGNMENT,
    seed: int = 0,
) -> bytes:
    """Packs the payload's parts of every module of the spec (`PackedWriter` for `seed`).

    factors: module or tensor name -> part -> values; parts that the payload does not name are
    passed over. A sparse payload keeps the values of largest magnitude over all blocks together,
    the first of equals. Raises `PackingError`.
    """
    layout = _layout(spec, payload)
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
    layout: _Layout,
    payload: Payload,
    factors: Mapping[str, Mapping[Part, Values]],
    assignment_digest: bytes,
    seed: int,
) -> bytes:
    codec = _codec(payload.encoding)
    places = [(name, part) for name, parts in layout.blocks.items() for part in parts]
    for name, part in places:
        if part not in factors[name]:
            raise WrongShapeError(f"{name} {part} is missing; pack what the payload names")
    values = [
        _finite_block(factors[name][part], layout.blocks[name][part], f"{name} {part}")
        for name, part in places
    ]
    masks = _largest(values, layout.kept)
    counts = np.array([int(mask.sum()) for mask in masks], dtype="<u4")
    out = [_header(layout, payload, assignment_digest), counts.tobytes()]
    for (name, part), block, mask in zip(places, values, masks, strict=True):
        thinned = np.where(mask, block, np.float32(0))
        coded = codec.encode(thinned, _noise(seed, name, part))
        split = len(block) * codec.scale_bytes
        whole = np.frombuffer(coded, dtype=f"V{codec.value_bytes}", offset=split)
        out += [np.packbits(mask).tobytes(), bytes(coded[:split]), whole[mask.ravel()].tobytes()]
    return b"".join(out)


def _largest(values: list[Values], kept: int) -> list[NDArray[np.bool_]]:
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


class PackedReader:
    """Reads a packed file module by module; header and exact size are checked on construction.

    Raises `PackingError`.
    """

    def __init__(
        self,
        source: Buffer | PackedFile,
        spec: AdapterSpec,
        payload: Payload,
        *,
        assignment_digest: bytes = NO_ASSIGNMENT,
    ) -> None:
        self._source = source if isinstance(source, PackedFile) else _Memory(source)
        self._codec = _codec(payload.encoding)
        header = self._source.read(0, min(HEADER_BYTES, self._source.size))
        _check_format(header, payload)
        self._layout = _layout(spec, payload)
        _check_contents(header, self._source.size, self._layout, payload, assignment_digest)
        self._starts = self._sparse_starts() if self._layout.kept else []

    @property
    def names(self) -> tuple[str, ...]:
        """Modules and dense tensors in the file, in order."""
        return tuple(self._layout.blocks)

    def module(self, name: str) -> Parts:
        """Decodes one module or dense tensor; arrays may be read-only views of the source.

        Raises `WrongSpecError`, `NonFiniteError`, `WrongSizeError`, `OSError`.
        """
        return self.measured(name)[0]

    def measured(self, name: str, into: memoryview | None = None) -> tuple[Parts, float]:
        """`module`, and the sum of its squared values, summed in float32 blocks.

        into: memory of `stored_bytes(name)` for what is read from a file; the arrays may be views
        of it. Fresh memory would have to be paged in, which takes longer than reading.
        """
        if name not in self._layout.blocks:
            raise WrongSpecError(f"{name} is not in this file; use the names of its spec")
        parts, energy = self._whole(name, into) if not self._layout.kept else self._sparse(name)
        if not math.isfinite(energy):  # squares may also have overflowed
            for part, values in parts.items():
                if not np.isfinite(values).all():
                    raise NonFiniteError(
                        f"{name} {part} holds NaN or infinite values after decoding; training "
                        f"diverged or the file is damaged, discard it and train again"
                    )
        return parts, energy

    def stored_bytes(self, name: str) -> int:
        """Bytes that this module or tensor takes in a file that is not sparse; 0 if it is not in
        it, or the file is sparse.
        """
        start, stop = self._span(name)
        return stop - start

    def _span(self, name: str) -> tuple[int, int]:
        blocks = list(self._layout.blocks.get(name, {}).values())
        if not blocks or self._layout.kept:
            return 0, 0
        return blocks[0].offset, blocks[-1].offset + self._size(blocks[-1])

    def _size(self, block: _Block) -> int:
        return block.rows * (self._codec.scale_bytes + block.columns * self._codec.value_bytes)

    def _whole(self, name: str, into: memoryview | None) -> tuple[Parts, float]:
        """A module that lies in one piece."""
        codec, blocks = self._codec, self._layout.blocks[name]
        start, stop = self._span(name)
        data = self._source.read(start, stop, into)
        parts: Parts = {}
        if not codec.scale_bytes:  # value by value: decoded and looked at in one go
            flat = codec.decode(data, 1, (stop - start) // codec.value_bytes)[0]
            at = 0
            for part, block in blocks.items():
                count = block.rows * block.columns
                parts[part] = flat[at : at + count].reshape(block.rows, block.columns)
                at += count
            return parts, squares(flat)
        for part, block in blocks.items():
            at = block.offset - start
            parts[part] = codec.decode(data[at : at + self._size(block)], block.rows, block.columns)
        return parts, sum(map(squares, parts.values()))

    def _sparse(self, name: str) -> tuple[Parts, float]:
        parts: Parts = {
            part: self._codec.decode(self._expanded(block), block.rows, block.columns)
            for part, block in self._layout.blocks[name].items()
        }
        return parts, sum(map(squares, parts.values()))

    def _sparse_starts(self) -> list[int]:
        """Where each block begins, from the counts. Raises `WrongSizeError`."""
        layout, codec = self._layout, self._codec
        data = self._source.read(HEADER_BYTES, HEADER_BYTES + 4 * layout.count)
        counts = np.frombuffer(data, "<u4").astype(np.int64)
        if int(counts.sum()) != layout.kept:
            raise WrongSizeError("the counts of kept values do not add up; send the file again")
        self._counts = counts
        starts, offset = [], HEADER_BYTES + 4 * layout.count
        for parts in layout.blocks.values():
            for block in parts.values():
                starts.append(offset)
                offset += -(-block.rows * block.columns // 8) + block.rows * codec.scale_bytes
                offset += int(counts[block.index]) * codec.value_bytes
        return starts

    def _expanded(self, block: _Block) -> memoryview:
        """The bytes of a sparse block as if nothing had been left out."""
        codec, size = self._codec, block.rows * block.columns
        start = self._starts[block.index]
        scales = start + -(-size // 8)
        kept = scales + block.rows * codec.scale_bytes
        count = int(self._counts[block.index])
        end = kept + count * codec.value_bytes
        data = self._source.read(start, end)
        bits = np.unpackbits(np.frombuffer(data[: scales - start], np.uint8))
        mask = bits[:size]
        if int(mask.sum()) != count or bits[size:].any():
            raise WrongSizeError("a bitmap and its count of kept values differ; send it again")
        whole = bytearray(kept - scales + size * codec.value_bytes)
        whole[: kept - scales] = data[scales - start : kept - start]
        values = np.frombuffer(whole, f"V{codec.value_bytes}", offset=kept - scales)
        values[mask.view(np.bool_)] = np.frombuffer(data[kept - start :], values.dtype)
        return memoryview(whole)


class PackedFile:
    """A file on disk, read where asked; it stays open while this object lives.

    Read, not mapped: a file that shrinks meanwhile is an error here and the end of the process
    there. Raises `OSError`.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self.size = os.fstat(self._file).st_size

    def read(self, start: int, stop: int, into: memoryview | None = None) -> memoryview:
        """These bytes, in `into` if given. Raises `WrongSizeError`, `OSError`."""
        data = np.empty(stop - start, np.uint8).data if into is None else into
        data, at = data[: stop - start], 0
        while at < stop - start:
            count = os.preadv(self._file, [data[at:]], start + at)
            if not count:
                raise WrongSizeError(
                    f"the file ends at byte {start + at} of {stop}; it was cut while in use, send "
                    "it again"
                )
            at += count
        return data


class _Memory:
    """A file in memory."""

    def __init__(self, buffer: Buffer) -> None:
        self._data = memoryview(buffer)
        self.size = self._data.nbytes

    def read(self, start: int, stop: int, into: memoryview | None = None) -> memoryview:
        return self._data[start:stop]


def open_packed(
    path: Path, spec: AdapterSpec, payload: Payload, *, assignment_digest: bytes = NO_ASSIGNMENT
) -> PackedReader:
    """Opens a packed file; it stays open while the reader lives.

    Raises `PackingError`, `OSError`.
    """
    return PackedReader(PackedFile(path), spec, payload, assignment_digest=assignment_digest)


def unpack(
    buffer: Buffer, spec: AdapterSpec, payload: Payload, *, assignment_digest: bytes = NO_ASSIGNMENT
) -> dict[str, Parts]:
    """Everything in a packed file, decoded, by module or tensor. Raises `PackingError`."""
    reader = PackedReader(buffer, spec, payload, assignment_digest=assignment_digest)
    return {name: reader.module(name) for name in reader.names}


def _header(layout: _Layout, payload: Payload, assignment_digest: bytes) -> bytes:
    if len(assignment_digest) != 32:
        raise WrongAssignmentError(
            f"an assignment digest has 32 bytes, not {len(assignment_digest)}; "
            f"pass Assignment.digest"
        )
    return HEADER.pack(
        MAGIC, VERSION, _codec(payload.encoding).wire_id, _part_bits(payload), 0, layout.modules,
        payload.rank, layout.kept, layout.spec_digest, assignment_digest,
    )  # fmt: skip


def _part_bits(payload: Payload) -> int:
    return sum(1 << PARTS.index(part) for part in set(payload.parts))


def _noise(seed: int, name: str, part: Part) -> np.random.Philox:
    return keyed_stream("pack", seed, part, name)


def _codec(encoding: Encoding) -> Codec:
    if encoding not in CODECS:
        raise WrongEncodingError(f"encoding {encoding!r} is unknown; use {', '.join(CODECS)}")
    return CODECS[encoding]


def _finite_block(values: Values, block: _Block, what: str) -> Values:
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


def _check_format(data: memoryview, payload: Payload) -> None:
    """Checks magic, version and encoding."""
    if data.nbytes < HEADER_BYTES:
        raise WrongSizeError(
            f"{data.nbytes} bytes are fewer than the header's {HEADER_BYTES}; fetch the file again"
        )
    magic, version, wire_id = struct.unpack_from("<4sHH", data)
    if magic != MAGIC:
        raise WrongFormatError(
            f"starts with {magic!r}, not {MAGIC!r}; this is no packed adapter file"
        )
    if version != VERSION:
        raise WrongFormatError(
            f"format version {version} is not the {VERSION} this side reads; bring agent and "
            f"coordinator to the same release"
        )
    codec = next((c for c in CODECS.values() if c.wire_id == wire_id), None)
    if codec is None:
        raise WrongEncodingError(f"encoding id {wire_id} is unknown; use {', '.join(CODECS)}")
    if codec.name != payload.encoding:
        raise WrongEncodingError(
            f"values are {codec.name}, {payload.encoding} was agreed on; pack with the assigned "
            "encoding"
        )


def _check_contents(
    header: memoryview, size: int, layout: _Layout, payload: Payload, assignment_digest: bytes
) -> None:
    """Checks digests, counts and the exact size."""
    _, _, _, parts, zero, modules, rows, kept, spec_digest, assignment = HEADER.unpack_from(header)
    if spec_digest != layout.spec_digest:
        raise WrongSpecError(
            f"packed for adapter spec {spec_digest.hex()[:12]}, this run's is "
            f"{layout.spec_digest.hex()[:12]}; enrol the device in this run again"
        )
    if modules != layout.modules:
        raise WrongSpecError(
            f"header counts {modules} modules, the spec has {layout.modules}; fetch again"
        )
    if assignment != assignment_digest:
        raise WrongAssignmentError(
            f"answers assignment {assignment.hex()[:12]}, expected {assignment_digest.hex()[:12]}; "
            f"send each update with the assignment it was trained for"
        )
    if parts != _part_bits(payload) or zero:
        raise WrongFormatError(
            f"holds other parts than {', '.join(payload.parts)}; bring agent and coordinator to "
            "the same release"
        )
    if (rows, kept) != (payload.rank, layout.kept):
        raise WrongSizeError(
            f"holds {rows} rows per module and {kept} kept values, the assignment allows "
            f"{payload.rank} and {layout.kept}; agent and coordinator disagree about it, restart "
            "the agent"
        )
    if size != layout.total_bytes:
        raise WrongSizeError(
            f"has {size} bytes where {payload.rank} rows take exactly "
            f"{layout.total_bytes}; the transfer was cut or the file is damaged, send it again"
        )
