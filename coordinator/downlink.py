"""What a device is sent of the global adapter: what it lacks, as differences where that is cheaper.

The coordinator knows to the bit what each device holds (`protos.mirror`). What it packs is the
model less that, and so whatever earlier files lost is in the next one: error feedback, as EF21 has
it (arXiv 2106.05203), for a downlink as in DoubleSqueeze (arXiv 1905.05957). Knows values and their
errors; it asks no method's name, and does not know which device holds what.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coordinator.state import StateReader
from coordinator.store.blobs import BlobStore
from profiles.model import ModuleShape
from protos.codecs import CODECS, Values
from protos.contract import (
    AdapterSpec,
    Assignment,
    BlobRef,
    Encoding,
    MirrorFile,
    MirrorRows,
    MirrorStep,
    Part,
    Payload,
)
from protos.layout import packed_bytes
from protos.mirror import MirrorReader, advance, mirror_payload, place, sent_whole
from protos.packing import PackedWriter, pack
from protos.unpacking import unpack

# Differences are tried as these, with the group that gives the least error for its bits; signs also
# with few scales, of which groups of 64 are a fifth.
LADDER: tuple[tuple[Encoding, int], ...] = (
    ("sign", 512), ("sign", 64), ("int2", 32), ("int4", 64), ("int8", 0), ("int8", 32),
    ("bfloat16", 0),
)  # fmt: skip
ENOUGH: Encoding = "bfloat16"  # what is closer than this is not worth a byte
SAMPLE_MODULES, SAMPLE_ROWS = 8, 64  # that encodings are compared on
Rows = NDArray[np.float64]


@dataclass(frozen=True)
class Cut:
    """A file that a device may need: these rows of a part, in what run.toml asks for them."""

    part: Part
    rows: MirrorRows
    encoding: Encoding


def cuts_of(
    task: Assignment, spec: AdapterSpec, parts: Sequence[Part], slice_: Encoding, whole: Encoding
) -> tuple[Cut, ...]:
    """What an assignment takes: the rows it trains, and the others where it evaluates all."""
    found: list[Cut] = []
    for part in parts:
        first = slice_ if task.trains else whole
        every = task.rank == spec.rank or not task.trains or part == "dense"
        if every or (task.evaluates_global and (part == "core" or slice_ == whole)):
            found.append(Cut(part, "all", first))
            continue
        found.append(Cut(part, "slice", slice_))
        if task.evaluates_global:
            found.append(Cut(part, "rest", whole))
    return tuple(found)


class Downlink:
    """Makes the steps from one mirror to the next."""

    def __init__(self, spec: AdapterSpec, blobs: BlobStore) -> None:
        self._spec, self._blobs = spec, blobs

    def step(
        self,
        model: StateReader,
        task: Assignment,
        parts: Sequence[Part],
        cuts: Sequence[Cut],
        base: BlobRef | None,
    ) -> MirrorStep:
        """Brings these cuts of a mirror close to the model; its files and its result are stored.

        Each file is the smallest that leaves no more error, row by row and relative to it, than
        the cut sent whole in its own encoding would. A device that begins from the run's start
        lacks the model itself, not what a round changed of it, so that `sent_whole` decides.
        Raises `PackingError`, `OSError`.
        """
        if base is None:
            cuts = [replace(c, encoding=sent_whole(c.encoding)) for c in cuts]
        spec, payload = self._spec, mirror_payload(self._spec, parts)
        held = MirrorReader(spec, base, None if base is None else self._blobs.path(base.digest))
        source = _Source(spec, model, held, task)
        chosen = [(cut, way) for cut in cuts if (way := _way(source, cut)) is not None]
        files = self._written(source, chosen)
        if not files and base is not None and base.payload == payload:
            return MirrorStep((), base, 1.0, base)
        unnamed = MirrorStep(files, BlobRef("", 0, payload), 1.0, base)
        out = self._blobs.draft()
        advance(
            spec, replace(task, mirror=unnamed),
            None if base is None else self._blobs.path(base.digest),
            [self._blobs.path(file.blob.digest) for file in files], out,
        )  # fmt: skip
        return replace(unnamed, result=self._blobs.adopt(out, payload))

    def _written(
        self, source: _Source, chosen: Sequence[tuple[Cut, _Way]]
    ) -> tuple[MirrorFile, ...]:
        """The files of these cuts, all written in one pass over the model."""
        drafts: list[Path] = []
        with contextlib.ExitStack() as stack:
            writers: list[PackedWriter] = []
            for _, way in chosen:
                drafts.append(self._blobs.draft())
                stream = stack.enter_context(drafts[-1].open("wb"))
                writers.append(PackedWriter(stream, self._spec, way.payload, seed=way.seed))
            names = {part: source.names(part) for part in {cut.part for cut, _ in chosen}}
            for name in source.order:
                for (cut, way), writer in zip(chosen, writers, strict=True):
                    if name in names[cut.part]:
                        want, have = source.rows(name, cut)
                        writer.write(name, {cut.part: want - have if way.adds else want})
            for writer in writers:
                writer.finish()
        return tuple(
            MirrorFile(self._blobs.adopt(draft, way.payload), cut.rows, way.adds)
            for (cut, way), draft in zip(chosen, drafts, strict=True)
        )


@dataclass(frozen=True)
class _Way:
    """How a cut travels."""

    payload: Payload
    adds: bool

    @property
    def seed(self) -> int | None:
        """Differences go to the nearest level: what that loses is sent with the next ones."""
        return None if self.adds else 0


class _Source:
    """The model and what a device holds of it, side by side; one module in memory."""

    def __init__(
        self, spec: AdapterSpec, model: StateReader, held: MirrorReader, task: Assignment
    ) -> None:
        self.spec, self.task = spec, task
        self._model, self._held = model, held
        self._last: tuple[str, Part, Values, Values] | None = None
        self.order = [t.name for t in (*spec.modules, *spec.dense)]

    def names(self, part: Part) -> frozenset[str]:
        """The tensors that have this part."""
        return frozenset(
            t.name for t in (self.spec.dense if part == "dense" else self.spec.modules)
        )

    def rows(self, name: str, cut: Cut) -> tuple[Values, Values]:
        """(wanted, held) of a cut, of equal shape (rows, columns)."""
        if self._last is None or self._last[:2] != (name, cut.part):
            if cut.part == "dense":
                want = self._model.dense(name)[0]
            else:
                want = self._model.module(name).values(cut.part)
            self._last = (name, cut.part, want, self._held.module(name, (cut.part,))[cut.part])
        where = place(self.spec, self.task, name, cut.part, cut.rows)
        return self._last[2][where], self._last[3][where]


def _way(source: _Source, cut: Cut) -> _Way | None:
    """The cheapest way for a cut; None if nothing need travel."""
    names = [name for name in source.order if name in source.names(cut.part)]
    if _is_close(source, cut, names):
        return None
    picked = names[:: -(-len(names) // SAMPLE_MODULES)]
    sample = {name: _sampled(*source.rows(name, cut)) for name in picked}
    want = {name: pair[0] for name, pair in sample.items()}
    owed = {name: pair[0] - pair[1] for name, pair in sample.items()}
    whole, packed, lost = _tried(want, cut.encoding, 0, 0)
    most_bits = CODECS[cut.encoding].bits
    options = [(whole, 1.0, packed, False)]
    for encoding, group in LADDER:
        if CODECS[encoding].bits <= most_bits:
            size, packed, left = _tried(owed, encoding, group, None)
            if (ratio := _ratio(left, lost)) <= 1.0:
                options.append((size, ratio, packed, True))
    _, _, packed, adds = min(options, key=lambda option: option[:2])
    return _Way(replace(packed, rank=_height(source, cut), parts=(cut.part,)), adds)


def _height(source: _Source, cut: Cut) -> int:
    """Rows of a module in a cut's file."""
    r, k = source.spec.rank, source.task.rank
    if cut.part == "dense":
        return r
    return {"all": r, "slice": k, "rest": r - k}[cut.rows]


def _is_close(source: _Source, cut: Cut, names: Sequence[str]) -> bool:
    """Whether a device holds these rows as well as the finest encoding would bring them.

    Looks at every value: of an embedding, a round may move a few rows only.
    """
    left: list[Rows] = []
    lost: list[Rows] = []
    exact = cut.encoding == "float32"
    for name in names:
        want, have = source.rows(name, cut)
        if exact:
            if not np.array_equal(want, have):
                return False
            continue
        left.append(_energy(want - have))
        lost.append(_energy(want - _halves(want)))
    return exact or _ratio(left, lost) <= 1.0


def _halves(values: Values) -> Values:
    """As they come back from `ENOUGH`."""
    codec = CODECS[ENOUGH]
    _, codes = codec.encode(np.ascontiguousarray(values), None)
    return codec.decode(memoryview(codes), *values.shape)


def _sampled(want: Values, have: Values) -> tuple[Values, Values]:
    """Of a tall block the rows that have changed most."""
    if len(want) <= SAMPLE_ROWS:
        return want, have
    most = np.sort(np.argsort(-_energy(want - have), kind="stable")[:SAMPLE_ROWS])
    return want[most], have[most]


def _tried(
    blocks: Mapping[str, Values], encoding: Encoding, group: int, seed: int | None
) -> tuple[int, Payload, list[Rows]]:
    """(bytes, how they are packed, squared error of each row) of these blocks in this encoding."""
    shapes = tuple(ModuleShape(name, *values.shape) for name, values in blocks.items())
    spec = AdapterSpec("", "", "", "", 1, 1.0, False, 0, (), shapes)
    plain = Payload(1, encoding, ("dense",), group=group)
    payload = replace(plain, compressed=encoding != "float32")
    packed = pack(spec, payload, {n: {"dense": v} for n, v in blocks.items()}, seed=seed)
    back = unpack(packed, spec, payload)
    left = [_energy(v - back[n]["dense"]) for n, v in blocks.items()]
    # Where compression finds nothing, its table of blocks is all it adds.
    fixed = packed_bytes(spec, plain)
    return (fixed, plain, left) if fixed <= len(packed) else (len(packed), payload, left)


def _energy(values: Values) -> Rows:
    """Sum of squares of each row, float64."""
    found: Rows = np.einsum("ij,ij->i", values, values, dtype=np.float64)
    return found


def _ratio(left: Sequence[Rows], lost: Sequence[Rows]) -> float:
    """Mean over rows of error by error, so that small rows count as much as large ones.

    A row that loses nothing is compared with a hundredth of what rows lose on average.
    """
    ours, theirs = np.concatenate(left), np.concatenate(lost)
    floor = 0.01 * float(theirs.mean())
    if floor == 0.0:
        return float("inf") if ours.any() else 0.0
    return float(np.mean(ours / (theirs + floor)))
