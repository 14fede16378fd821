"""Where everything lies in a packed file, and what its header says (`docs/wire-format.md`).

    header    magic "SKFP", version u16, encoding u16, parts u16, group u16, modules u32, rows u32,
              kept u64 (its highest bit: compressed), spec digest 32 bytes, assignment digest 32
              bytes                                                             = 92 bytes
    module    its parts in the order up (k, m), down (k, n), core (k, k); modules in the order of
              the spec, then the spec's dense tensors
    block     the scales, if the encoding has any, and the values of one part

A file of fixed size has a layout that follows from (spec, payload) alone. A sparse or compressed
one has, after the header, a table of two u32 for each block: how many values are kept, and how many
bytes are stored (its highest bit: as a Zstandard frame). Its size has a limit that follows from
(spec, payload), so that nothing is ever allocated by what a sender claims.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import get_args

from protos.codecs import CODECS, Codec, PackingError, Values
from protos.contract import AdapterSpec, Assignment, Encoding, Part, Payload
from protos.gaps import bitmap_bytes

MAGIC = b"SKFP"
VERSION = 3
HEADER = struct.Struct("<4sHHHHIIQ32s32s")
HEADER_BYTES = HEADER.size
NO_ASSIGNMENT = bytes(32)  # heads slices and adapters, which answer no assignment
COMPRESSED = 1 << 63  # in the header's kept
FRAME = 1 << 31  # in a block's stored bytes
MOST_BLOCK_BYTES = FRAME - 1
LEAST_GROUP, MOST_GROUP = 8, 1 << 15

PARTS: tuple[Part, ...] = get_args(Part)

Parts = dict[Part, Values]
"""One module: up (k, m), down (k, n), core (k, k); or one dense tensor under "dense"."""


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
class Block:
    """One part of one module: where it begins in a file of fixed size, and its shape.

    whole_bytes: stored without sparseness or compression; most_bytes: stored at most.
    """

    index: int
    offset: int
    rows: int
    columns: int
    whole_bytes: int
    most_bytes: int

    @property
    def size(self) -> int:
        """Number of values."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Layout:
    """kept: values in a sparse file, 0 in one that holds all of them. fixed: no table is needed.

    most_bytes: the largest file; of one of fixed size, the size of every file.
    """

    spec_digest: bytes
    names: frozenset[str]  # all of the spec, whether this file holds any of their parts or not
    modules: int
    blocks: dict[str, dict[Part, Block]]
    count: int  # blocks
    kept: int
    fixed: bool
    most_bytes: int

    @property
    def table_bytes(self) -> int:
        """Bytes between header and blocks."""
        return 0 if self.fixed else 8 * self.count

    @cached_property
    def spans(self) -> dict[str, tuple[int, int]]:
        """First byte and end of each module and tensor in a file of fixed size; empty of others."""
        found = {
            n: list(parts.values()) for n, parts in self.blocks.items() if parts and self.fixed
        }
        return {n: (b[0].offset, b[-1].offset + b[-1].whole_bytes) for n, b in found.items()}


@lru_cache(maxsize=64)  # a merge opens the same layout once per module and participant
def layout_of(spec: AdapterSpec, payload: Payload) -> Layout:
    """The layout of such a file. Raises `WrongShapeError`, `WrongEncodingError`."""
    k, codec = payload.rank, codec_of(payload.encoding)
    if k < 1:
        raise WrongShapeError(f"an adapter of {k} rows cannot be packed; use at least one")
    if not set(payload.parts) <= set(PARTS) or not 0 < payload.density <= 1:
        raise WrongShapeError(
            f"parts {payload.parts} at density {payload.density} cannot be packed; name some of "
            f"{', '.join(PARTS)} and keep a share in (0, 1]"
        )
    if payload.group and (not codec.scaled or not LEAST_GROUP <= payload.group <= MOST_GROUP):
        raise WrongShapeError(
            f"groups of {payload.group} values cannot be packed as {payload.encoding}; use "
            f"{LEAST_GROUP} to {MOST_GROUP} with an encoding that has scales, or 0 for whole rows"
        )
    shapes = _shapes(spec, payload)
    sparse = payload.density < 1
    fixed = not sparse and not payload.compressed
    blocks: dict[str, dict[Part, Block]] = {}
    offset, values, count = HEADER_BYTES, 0, 0
    for name, parts in shapes.items():
        blocks[name] = {}
        for part, (rows, columns) in parts.items():
            whole = codec.scale_bytes(rows, columns, payload.group)
            whole += codec.code_bytes(rows, columns)
            most = whole + (1 + bitmap_bytes(rows * columns) if sparse else 0)
            if most > MOST_BLOCK_BYTES and not fixed:
                raise WrongShapeError(
                    f"{name} {part} of {most} bytes is too large to be sparse or compressed; send "
                    "it whole"
                )
            blocks[name][part] = Block(count, offset, rows, columns, whole, most)
            offset += whole
            values += rows * columns
            count += 1
    if not count:
        raise WrongShapeError(
            f"the spec has nothing of the parts {payload.parts}; leave such a file out"
        )
    kept = max(1, math.ceil(payload.density * values - 1e-9)) if sparse else 0
    if not fixed:
        offset += 8 * count
    if sparse:  # every block's scales and index, and the values that are kept of all of them
        every = (b for parts in blocks.values() for b in parts.values())
        offset = (
            HEADER_BYTES
            + 8 * count
            + sum(
                1 + bitmap_bytes(b.size) + codec.scale_bytes(b.rows, b.columns, payload.group) + 1
                for b in every
            )
            + codec.code_bytes(1, kept)
        )
    names = frozenset(tensor.name for tensor in (*spec.modules, *spec.dense))
    return Layout(spec.digest, names, len(spec.modules), blocks, count, kept, fixed, offset)


def packed_bytes(spec: AdapterSpec, payload: Payload) -> int:
    """Size of a packed file: exact if it is neither sparse nor compressed, else the most."""
    return layout_of(spec, payload).most_bytes


def expected_bytes(spec: AdapterSpec, payload: Payload) -> int:
    """Size of a packed file to plan with: a sparse one at the entropy of a fair draw.

    What compression saves depends on the values and is not counted.
    """
    layout, codec = layout_of(spec, payload), codec_of(payload.encoding)
    if not layout.kept:
        return layout.most_bytes
    every = [b for parts in layout.blocks.values() for b in parts.values()]
    values = sum(b.size for b in every)
    scales = sum(codec.scale_bytes(b.rows, b.columns, payload.group) for b in every)
    found = sparse_bytes(values, layout.count, scales, layout.kept / values, codec.bits)
    return min(layout.most_bytes, found)


def sparse_bytes(values: int, blocks: int, scale_bytes: int, density: float, bits: int) -> int:
    """Size to plan with of a sparse file of so many values: places at the entropy of a fair draw.

    scale_bytes: of all its blocks. bits: of a value.
    """
    entropy = -sum(q * math.log2(q) for q in (density, 1 - density) if q > 0)
    index = values * min(1.0, 1.015 * entropy) / 8
    codes = math.ceil(round(density * values) * bits / 8)
    return math.ceil(HEADER_BYTES + 9 * blocks + index + scale_bytes + codes)


def codec_of(encoding: Encoding) -> Codec:
    """Raises `WrongEncodingError`."""
    if encoding not in CODECS:
        raise WrongEncodingError(f"encoding {encoding!r} is unknown; use {', '.join(CODECS)}")
    return CODECS[encoding]


def header_of(layout: Layout, payload: Payload, assignment_digest: bytes) -> bytes:
    """The header of such a file. Raises `WrongAssignmentError`."""
    if len(assignment_digest) != 32:
        raise WrongAssignmentError(
            f"an assignment digest has 32 bytes, not {len(assignment_digest)}; "
            f"pass Assignment.digest"
        )
    return HEADER.pack(
        MAGIC, VERSION, codec_of(payload.encoding).wire_id, _part_bits(payload), payload.group,
        layout.modules, payload.rank, _kept_field(layout, payload), layout.spec_digest,
        assignment_digest,
    )  # fmt: skip


def most_update_bytes(spec: AdapterSpec, task: Assignment) -> tuple[int, bool]:
    """(size, whether it must be exactly that) of an update. Raises `PackingError`."""
    if task.budget is not None:
        return task.budget.size_bytes, False
    layout = layout_of(spec, task.update)
    return layout.most_bytes, layout.fixed


def chosen_payload(header: memoryview, size: int, spec: AdapterSpec, task: Assignment) -> Payload:
    """What an update holds: as assigned, or as its header says where the device may choose.

    size: of the whole file, bytes. A choice beyond the budget's terms is refused; that the header
    is right besides, `check_contents` sees to. Raises `PackingError`.
    """
    if task.budget is None:
        return task.update
    if header.nbytes < HEADER_BYTES or size > task.budget.size_bytes:
        raise WrongSizeError(
            f"an update of {size:,} bytes, where {HEADER_BYTES} to {task.budget.size_bytes:,} are "
            "allowed; restart the agent"
        )
    _, _, wire_id, _, group, _, _, kept_field, _, _ = HEADER.unpack_from(header)
    codec = next((c for c in CODECS.values() if c.wire_id == wire_id), None)
    if codec is None or codec.name not in task.budget.encodings:
        raise WrongEncodingError(
            f"encoding id {wire_id} is none of {', '.join(task.budget.encodings)}, among which the "
            "device may choose; bring agent and coordinator to the same release"
        )
    if codec.scaled and group not in task.budget.groups:
        raise WrongFormatError(
            f"groups of {group} values are none of {list(task.budget.groups)}, among which the "
            "device may choose; bring agent and coordinator to the same release"
        )
    whole = Payload(
        task.update.rank, codec.name, task.update.parts, 1.0, group, task.update.compressed
    )
    kept = kept_field % COMPRESSED
    if not kept:
        return whole
    blocks = layout_of(spec, whole).blocks
    values = sum(block.size for parts in blocks.values() for block in parts.values())
    if not task.budget.sparse or kept > values:
        raise WrongSizeError(
            f"{kept} of {values} values are kept, which this assignment does not allow; restart "
            "the agent"
        )
    return dataclasses.replace(whole, density=density_of(kept, values))


def density_of(kept: int, values: int) -> float:
    """A density at which a file of so many values keeps so many: clear of rounding."""
    return (kept - 0.5) / values


def check_format(header: memoryview, payload: Payload) -> None:
    """Checks magic, version and encoding. Raises `PackingError`."""
    if header.nbytes < HEADER_BYTES:
        raise WrongSizeError(
            f"{header.nbytes} bytes are fewer than the header's {HEADER_BYTES}; fetch the file "
            "again"
        )
    magic, version, wire_id = struct.unpack_from("<4sHH", header)
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


def check_contents(
    header: memoryview, size: int, layout: Layout, payload: Payload, assignment_digest: bytes
) -> None:
    """Checks digests, counts and the size. Raises `PackingError`."""
    found = HEADER.unpack_from(header)
    _, _, _, parts, group, modules, rows, kept, spec_digest, assignment = found
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
    if parts != _part_bits(payload) or group != payload.group:
        raise WrongFormatError(
            f"holds other parts than {', '.join(payload.parts)}, or groups of {group} instead of "
            f"{payload.group}; bring agent and coordinator to the same release"
        )
    if (rows, kept) != (payload.rank, _kept_field(layout, payload)):
        raise WrongSizeError(
            f"holds {rows} rows per module and {kept % COMPRESSED} kept values, the assignment "
            f"allows {payload.rank} and {layout.kept}; agent and coordinator disagree about it, "
            "restart the agent"
        )
    if size > layout.most_bytes or (layout.fixed and size < layout.most_bytes):
        raise WrongSizeError(
            f"has {size} bytes where {payload.rank} rows take "
            f"{'exactly' if layout.fixed else 'at most'} {layout.most_bytes}; the transfer was cut "
            "or the file is damaged, send it again"
        )


def _kept_field(layout: Layout, payload: Payload) -> int:
    return layout.kept | (COMPRESSED if payload.compressed else 0)


def _shapes(spec: AdapterSpec, payload: Payload) -> dict[str, dict[Part, tuple[int, int]]]:
    """(rows, columns) of every block, in order."""
    names = [tensor.name for tensor in (*spec.modules, *spec.dense)]
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise WrongShapeError(f"the spec names {twice} twice; give every tensor its own name")
    k, found = payload.rank, {}
    for module in spec.modules:
        m, n = module.out_features, module.in_features
        sides: dict[Part, tuple[int, int]] = {"up": (k, m), "down": (k, n), "core": (k, k)}
        if named := {part: sides[part] for part in sides if part in payload.parts}:
            found[module.name] = named
    if "dense" in payload.parts:
        found |= {t.name: {"dense": (t.out_features, t.in_features)} for t in spec.dense}
    return found


def _part_bits(payload: Payload) -> int:
    return sum(1 << PARTS.index(part) for part in set(payload.parts))
