"""Reads the one file format of adapter slices, whole adapters and updates (`protos.layout`).

Knows files and values, and that a sender may be hostile: nothing is allocated by what a file
claims beyond what its spec and payload allow. It does not know how files are written (`packing`).
"""

from __future__ import annotations

import math
import os
import weakref
from pathlib import Path

import numpy as np
import zstandard
from numpy.typing import NDArray

from protos import gaps
from protos.codecs import NonFiniteError, squares
from protos.contract import AdapterSpec, Assignment, Payload
from protos.layout import (
    FRAME,
    HEADER_BYTES,
    NO_ASSIGNMENT,
    Block,
    Parts,
    WrongSizeError,
    WrongSpecError,
    check_contents,
    check_format,
    chosen_payload,
    codec_of,
    layout_of,
)

Buffer = bytes | bytearray | memoryview
LEAST_WINDOW_BYTES, MOST_WINDOW_BYTES = 1 << 10, 1 << 31  # that Zstandard knows


class PackedReader:
    """Reads a packed file module by module; header and size are checked on construction.

    Raises `PackingError`.
    """

    def __init__(
        self,
        source: Buffer | PackedFile | _Memory,
        spec: AdapterSpec,
        payload: Payload,
        *,
        assignment_digest: bytes = NO_ASSIGNMENT,
    ) -> None:
        self._source = source if isinstance(source, PackedFile | _Memory) else _Memory(source)
        self._payload = payload
        self._codec, self._group = codec_of(payload.encoding), payload.group
        header = self._source.read(0, min(HEADER_BYTES, self._source.size))
        check_format(header, payload)
        self._layout = layout_of(spec, payload)
        check_contents(header, self._source.size, self._layout, payload, assignment_digest)
        if not self._layout.fixed:
            self._counts, self._stored, self._starts = self._read_table()

    @property
    def payload(self) -> Payload:
        """What the file holds."""
        return self._payload

    @property
    def names(self) -> tuple[str, ...]:
        """Modules and dense tensors in the file, in order."""
        return tuple(self._layout.blocks)

    def module(self, name: str, into: memoryview | None = None, *, checked: bool = True) -> Parts:
        """Decodes one module or dense tensor; arrays may be read-only views of the source.

        into: memory of `stored_bytes(name)` for what is read from a file; the arrays may be views
        of it. Fresh memory would have to be paged in, which takes longer than reading. checked:
        False for who finds values that are not finite in what follows. Raises `WrongSpecError`,
        `NonFiniteError`, `WrongSizeError`, `OSError`.
        """
        if name not in self._layout.blocks:
            raise WrongSpecError(f"{name} is not in this file; use the names of its spec")
        parts = self._whole(name, into) if self._layout.fixed else self._by_table(name)
        if checked:
            _energy(name, parts)
        return parts

    def measured(self, name: str) -> tuple[Parts, float]:
        """`module`, and the sum of its squared values, summed in float32 blocks."""
        parts = self.module(name, checked=False)
        return parts, _energy(name, parts)

    def stored_bytes(self, name: str) -> int:
        """Bytes that this module or tensor takes in a file of fixed size; else 0."""
        start, stop = self._layout.spans.get(name, (0, 0))
        return stop - start

    def _whole(self, name: str, into: memoryview | None) -> Parts:
        """A module of a file of fixed size: it lies in one piece."""
        codec, blocks = self._codec, self._layout.blocks[name]
        start, stop = self._layout.spans[name]
        data = self._source.read(start, stop, into)
        parts: Parts = {}
        if not codec.scaled:  # value by value: decoded in one go
            flat = codec.decode(data, 1, sum(block.size for block in blocks.values()))[0]
            at = 0
            for part, block in blocks.items():
                parts[part] = flat[at : at + block.size].reshape(block.rows, block.columns)
                at += block.size
            return parts
        for part, block in blocks.items():
            at = block.offset - start
            own = data[at : at + block.whole_bytes]
            parts[part] = codec.decode(own, block.rows, block.columns, self._group)
        return parts

    def _by_table(self, name: str) -> Parts:
        parts: Parts = {}
        for part, block in self._layout.blocks[name].items():
            data = self._block(block)
            if not self._layout.kept:
                parts[part] = self._codec.decode(data, block.rows, block.columns, self._group)
            else:
                parts[part] = self._sparse(block, data)
        return parts

    def _read_table(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of each block: values kept, bytes stored with their flag, and where it begins."""
        layout = self._layout
        begin = HEADER_BYTES + layout.table_bytes
        if self._source.size < begin:
            raise WrongSizeError("the file ends within its table; the transfer was cut, send again")
        raw = np.frombuffer(self._source.read(HEADER_BYTES, begin), "<u4").astype(np.int64)
        counts, stored = raw[0::2], raw[1::2]
        blocks = [block for parts in layout.blocks.values() for block in parts.values()]
        sizes = np.array([block.size for block in blocks])
        due = layout.kept or int(sizes.sum())
        if int(counts.sum()) != due or (counts > sizes).any():
            raise WrongSizeError("the counts of kept values do not add up; send the file again")
        lengths = stored % FRAME
        most = np.array([block.most_bytes for block in blocks])
        if begin + int(lengths.sum()) != self._source.size or (lengths > most).any():
            raise WrongSizeError("the sizes of its blocks do not add up; send the file again")
        return counts, stored, begin + np.cumsum(lengths) - lengths

    def _block(self, block: Block) -> memoryview:
        """The bytes of a block, decompressed."""
        stored, start = int(self._stored[block.index]), int(self._starts[block.index])
        data = self._source.read(start, start + stored % FRAME)
        if stored < FRAME:
            return self._right_size(block, data)
        try:
            # The frame says how much memory it wants: looked at before it gets any.
            claimed = zstandard.frame_content_size(data)
            if not 0 <= claimed <= block.most_bytes:
                raise WrongSizeError(
                    f"a block would take {claimed} bytes, its spec allows {block.most_bytes}; "
                    "discard the file"
                )
            # It is decoded to that size exactly; max_output_size would be ignored.
            most = min(MOST_WINDOW_BYTES, max(LEAST_WINDOW_BYTES, 2 * block.most_bytes))
            frame = zstandard.ZstdDecompressor(max_window_size=most)
            whole = frame.decompress(data, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise WrongSizeError(
                f"a compressed block is damaged ({error}); send it again"
            ) from None
        return self._right_size(block, memoryview(whole))

    def _right_size(self, block: Block, data: memoryview) -> memoryview:
        if not self._layout.kept and len(data) != block.whole_bytes:
            raise WrongSizeError(
                f"a block has {len(data)} bytes instead of {block.whole_bytes}; send it again"
            )
        return data

    def _sparse(self, block: Block, data: memoryview) -> NDArray[np.float32]:
        """The values of a block that keeps some, zeros elsewhere."""
        codec, count = self._codec, int(self._counts[block.index])
        coded = codec.scale_bytes(block.rows, block.columns, self._group) + codec.code_bytes(
            1, count
        )
        split = len(data) - coded
        if split < 1:
            raise WrongSizeError("a block is too short for its count of values; send it again")
        try:
            kept = gaps.decode(data[:split], count, block.size)
        except gaps.GapError as error:
            raise WrongSizeError(str(error)) from None
        values = np.zeros(block.size, np.float32)
        values[kept] = codec.decode_kept(data[split:], kept, block.rows, block.columns, self._group)
        return values.reshape(block.rows, block.columns)


def _energy(name: str, parts: Parts) -> float:
    """The sum of squares. Raises `NonFiniteError`."""
    energy = sum(map(squares, parts.values()))
    if not math.isfinite(energy):  # squares may also have overflowed
        for part, values in parts.items():
            if not np.isfinite(values).all():
                raise NonFiniteError(
                    f"{name} {part} holds NaN or infinite values after decoding; training "
                    f"diverged or the file is damaged, discard it and train again"
                )
    return energy


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


def open_update(
    source: Path | Buffer, spec: AdapterSpec, task: Assignment, digest: bytes | None = None
) -> PackedReader:
    """Opens the update that answers an assignment, as whatever the device was free to send.

    digest: of the assignment, where it is known already. Raises `PackingError`, `OSError`.
    """
    file = PackedFile(source) if isinstance(source, Path) else _Memory(source)
    header = file.read(0, min(HEADER_BYTES, file.size))
    payload = chosen_payload(header, file.size, spec, task)
    return PackedReader(file, spec, payload, assignment_digest=digest or task.digest)


def unpack(
    buffer: Buffer, spec: AdapterSpec, payload: Payload, *, assignment_digest: bytes = NO_ASSIGNMENT
) -> dict[str, Parts]:
    """Everything in a packed file, decoded, by module or tensor. Raises `PackingError`."""
    reader = PackedReader(buffer, spec, payload, assignment_digest=assignment_digest)
    return {name: reader.module(name) for name in reader.names}
