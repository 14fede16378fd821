"""The one file format of adapter slices, whole adapters and updates (`docs/wire-format.md`).

    header    magic "SKFP", version u16, encoding u16, modules u32, rows u32,
              spec digest 32 bytes, assignment digest 32 bytes                  = 80 bytes
    module    up (k, m), then down (k, n); modules in the order of the spec
    float32   k*c little-endian floats
    bfloat16  k*c upper halves of floats, rounded to nearest even
    int8      k float32 scales, then k*c signed bytes; value = scale of its row * byte

The layout follows from (spec, k, encoding) alone, so the size is known before a byte is read, and
nothing is ever allocated by what a sender claims. It does not know which rows of the global
adapter these are (`protos.sketch`), nor how bytes travel (`protos.transfer`).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from profiles.errors import SketchfleetError
from protos.contract import AdapterSpec, Encoding
from protos.sketch import keyed_stream

MAGIC = b"SKFP"
VERSION = 1
HEADER = struct.Struct("<4sHHII32s32s")
HEADER_BYTES = HEADER.size
NO_ASSIGNMENT = bytes(32)  # heads slices and adapters, which answer no assignment

Values = NDArray[np.float32]
Buffer = bytes | bytearray | memoryview | mmap.mmap


class PackingError(SketchfleetError):
    """Factors cannot be packed, or bytes are not the packed file they should be."""


class WrongSizeError(PackingError):
    """The file is shorter or longer than its spec and k allow, or holds another k."""


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


class NonFiniteError(PackingError):
    """A value or scale is NaN, infinite, or too large for the encoding."""


@dataclass(frozen=True, eq=False)
class Factors:
    """Rows of one module's adapter, rank-first. up: (k, m) float32; down: (k, n) float32."""

    up: Values
    down: Values


class Codec(Protocol):
    """How a (rows, columns) block of finite float32 becomes bytes. `noise` is seeded."""

    name: Encoding
    wire_id: int  # pairwise two bits apart, so that no single flipped bit turns one into another

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row, scale included."""

    def encode(self, values: Values, noise: np.random.Philox) -> bytes:
        """Exactly rows * row_bytes(columns) bytes. Raises `NonFiniteError` on overflow."""

    def decode(self, data: memoryview, rows: int, columns: int) -> Values:
        """A fresh (rows, columns) array; may hold non-finite values when `data` is hostile."""


class Float32:
    """Values as they are."""

    name: Encoding = "float32"
    wire_id = 1

    def row_bytes(self, columns: int) -> int:
        """Four bytes a value."""
        return 4 * columns

    def encode(self, values: Values, noise: np.random.Philox) -> bytes:
        """Little-endian floats."""
        return values.astype("<f4").tobytes()

    def decode(self, data: memoryview, rows: int, columns: int) -> Values:
        """The same values, bit for bit."""
        return np.frombuffer(data, dtype="<f4").reshape(rows, columns).astype(np.float32)


class BFloat16:
    """Upper half of a float32, rounded to nearest even: relative error at most 2**-8."""

    name: Encoding = "bfloat16"
    wire_id = 2

    def row_bytes(self, columns: int) -> int:
        """Two bytes a value."""
        return 2 * columns

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
    1610.02132). The noise is keyed by seed, side and module, hence packing again gives the same
    bytes.
    """

    name: Encoding = "int8"
    wire_id = 4

    def row_bytes(self, columns: int) -> int:
        """One byte a value and four for the scale."""
        return 4 + columns

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
        raw = noise.random_raw((values.size + 1) // 2).astype("<u8").view("<u4")
        # 32 bits of noise and a quotient of at most 127 add exactly in float64.
        offset = raw[: values.size].reshape(values.shape).astype(np.float64) * 2.0**-32
        divisor = np.where(scale == 0, np.float32(1), scale).astype(np.float64)
        steps = np.floor(values / divisor[:, None] + offset).astype(np.int8)
        return b"".join((scale.astype("<f4").tobytes(), steps.tobytes()))

    def decode(self, data: memoryview, rows: int, columns: int) -> Values:
        """Byte times the scale of its row, float32."""
        scale = np.frombuffer(data[: 4 * rows], dtype="<f4").astype(np.float32)
        steps = np.frombuffer(data[4 * rows :], dtype=np.int8).reshape(rows, columns)
        with np.errstate(over="ignore", invalid="ignore"):
            return steps.astype(np.float32) * scale[:, None]


CODECS: dict[Encoding, Codec] = {codec.name: codec for codec in (Float32(), BFloat16(), Int8())}


@dataclass(frozen=True)
class _Layout:
    """Where everything lies. `modules`: name -> (offset of up, m, n)."""

    spec_digest: bytes
    modules: dict[str, tuple[int, int, int]]
    total_bytes: int


@lru_cache(maxsize=64)  # a merge opens the same layout once per module and participant
def _layout(spec: AdapterSpec, k: int, encoding: Encoding) -> _Layout:
    if not 1 <= k <= spec.rank:
        raise WrongShapeError(
            f"{k} rows do not fit an adapter of rank {spec.rank}; use k in 1..{spec.rank}"
        )
    codec = _codec(encoding)
    modules, offset = {}, HEADER_BYTES
    for module in spec.modules:
        m, n = module.out_features, module.in_features
        modules[module.name] = (offset, m, n)
        offset += k * (codec.row_bytes(m) + codec.row_bytes(n))
    return _Layout(spec.digest, modules, offset)


def packed_bytes(spec: AdapterSpec, k: int, encoding: Encoding) -> int:
    """Exact size of a packed file of k rows per module."""
    return _layout(spec, k, encoding).total_bytes


def pack(
    spec: AdapterSpec,
    k: int,
    factors: Mapping[str, Factors],
    *,
    encoding: Encoding,
    assignment_digest: bytes = NO_ASSIGNMENT,
    seed: int = 0,
) -> bytes:
    """Packs the rows of every module of the spec; `seed` alone keys the rounding noise of int8.

    Pass the assignment's own seed, which differs by round and device, so that devices do not err
    alike; its digest keys nothing, since it names the run and where the base lies, and plans
    replayed elsewhere must give the same bits.

    factors: module name -> up (k, m), down (k, n). Raises `PackingError`.
    """
    layout, codec = _layout(spec, k, encoding), _codec(encoding)
    if len(assignment_digest) != 32:
        raise WrongAssignmentError(
            f"an assignment digest has 32 bytes, not {len(assignment_digest)}; "
            f"pass Assignment.digest"
        )
    if factors.keys() != layout.modules.keys():
        odd = sorted(factors.keys() ^ layout.modules.keys())
        raise WrongShapeError(
            f"{len(odd)} modules are missing or unknown, first {odd[0]}; "
            f"pack exactly the {len(layout.modules)} modules of the spec"
        )
    header = HEADER.pack(
        MAGIC, VERSION, codec.wire_id, len(layout.modules), k, layout.spec_digest, assignment_digest
    )
    parts = [header]
    for name, (_, m, n) in layout.modules.items():
        sides = (("up", factors[name].up, m), ("down", factors[name].down, n))
        for side, values, columns in sides:
            block = _finite_block(values, (k, columns), f"{name} {side}")
            noise = keyed_stream("pack", seed, side, name)
            parts.append(codec.encode(block, noise))
    return b"".join(parts)


class PackedReader:
    """Reads a packed file module by module; header and exact size are checked on construction.

    `encoding` None accepts any known encoding. Raises `PackingError`.
    """

    def __init__(
        self,
        buffer: Buffer,
        spec: AdapterSpec,
        k: int,
        *,
        assignment_digest: bytes = NO_ASSIGNMENT,
        encoding: Encoding | None = None,
    ) -> None:
        self._data = memoryview(buffer)
        self._k = k
        self._codec = _check_format(self._data, encoding)
        self._layout = _layout(spec, k, self._codec.name)
        _check_contents(self._data, self._layout, k, assignment_digest)

    @property
    def encoding(self) -> Encoding:
        """How the values inside are encoded."""
        return self._codec.name

    def module(self, name: str) -> Factors:
        """Decodes one module into fresh arrays. Raises `WrongSpecError`, `NonFiniteError`."""
        if name not in self._layout.modules:
            raise WrongSpecError(f"{name} is not a module of this run; use the names of its spec")
        offset, m, n = self._layout.modules[name]
        middle = offset + self._k * self._codec.row_bytes(m)
        return Factors(up=self._block(offset, m, name), down=self._block(middle, n, name))

    def _block(self, offset: int, columns: int, name: str) -> Values:
        end = offset + self._k * self._codec.row_bytes(columns)
        values = self._codec.decode(self._data[offset:end], self._k, columns)
        if not np.isfinite(values).all():
            raise NonFiniteError(
                f"{name} holds NaN or infinite values after decoding; training diverged or the "
                f"file is damaged, discard it and train again"
            )
        return values


def open_packed(
    path: Path,
    spec: AdapterSpec,
    k: int,
    *,
    assignment_digest: bytes = NO_ASSIGNMENT,
    encoding: Encoding | None = None,
) -> PackedReader:
    """Maps a packed file into memory; the map lives as long as the reader.

    The file must not shrink meanwhile. Raises `PackingError`, `OSError`.
    """
    with path.open("rb") as stream:
        empty = stream.seek(0, 2) == 0  # an empty file cannot be mapped
        buffer = b"" if empty else mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    return PackedReader(buffer, spec, k, assignment_digest=assignment_digest, encoding=encoding)


def unpack(
    buffer: Buffer,
    spec: AdapterSpec,
    k: int,
    *,
    assignment_digest: bytes = NO_ASSIGNMENT,
    encoding: Encoding | None = None,
) -> dict[str, Factors]:
    """Every module of a packed file, decoded. Raises `PackingError`."""
    reader = PackedReader(buffer, spec, k, assignment_digest=assignment_digest, encoding=encoding)
    return {module.name: reader.module(module.name) for module in spec.modules}


def _codec(encoding: Encoding) -> Codec:
    if encoding not in CODECS:
        raise WrongEncodingError(f"encoding {encoding!r} is unknown; use {', '.join(CODECS)}")
    return CODECS[encoding]


def _finite_block(values: Values, shape: tuple[int, int], what: str) -> Values:
    if values.shape != shape:
        raise WrongShapeError(
            f"{what} has shape {values.shape}, the spec and k ask for {shape}; "
            f"rows come first, pass (k, features)"
        )
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is refused
        block = np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(block).all():
        raise NonFiniteError(
            f"{what} holds NaN or infinite values; only finite factors are packed, lower the "
            f"learning rate and train again"
        )
    return block


def _check_format(data: memoryview, expected: Encoding | None) -> Codec:
    """Checks magic, version and encoding; answers the codec."""
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
    if expected is not None and codec.name != expected:
        raise WrongEncodingError(
            f"values are {codec.name}, {expected} was agreed on; pack with the assigned encoding"
        )
    return codec


def _check_contents(data: memoryview, layout: _Layout, k: int, assignment_digest: bytes) -> None:
    """Checks digests, counts and the exact size."""
    _, _, _, modules, rows, spec_digest, assignment = HEADER.unpack_from(data)
    if spec_digest != layout.spec_digest:
        raise WrongSpecError(
            f"packed for adapter spec {spec_digest.hex()[:12]}, this run's is "
            f"{layout.spec_digest.hex()[:12]}; enrol the device in this run again"
        )
    if modules != len(layout.modules):
        raise WrongSpecError(
            f"header counts {modules} modules, the spec has {len(layout.modules)}; fetch again"
        )
    if assignment != assignment_digest:
        raise WrongAssignmentError(
            f"answers assignment {assignment.hex()[:12]}, expected {assignment_digest.hex()[:12]}; "
            f"send each update with the assignment it was trained for"
        )
    if rows != k:
        raise WrongSizeError(
            f"holds {rows} rows per module, the assignment allows {k}; agent and coordinator "
            f"disagree about k, run `sketchfleet-agent doctor`"
        )
    if data.nbytes != layout.total_bytes:
        raise WrongSizeError(
            f"has {data.nbytes} bytes where {k} rows take exactly {layout.total_bytes}; the "
            f"transfer was cut or the file is damaged, send it again"
        )
