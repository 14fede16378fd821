"""Pools of labelled examples or of code by domain -> files of devices with mixtures of them.

Every device gets files of its own and reads them as an agent would; every class gets one that is
measured on and never trained. Knows files and classes; neither runs nor ranks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.training.connectors import DataSelection, collect
from edge_agent.training.labelled import Columns, Labelled
from trials.domains import domain_devices
from trials.shift import Shares, ShiftError, deal, mixtures, shares_of
from trials.simulated_types import SimulatedDevice

PIECE_CHARACTERS = 400  # of code, cut at line ends: about two rows of 64 tokens
COLUMNS = Columns("first", "second", "label")
SINGLE = Columns("first", "", "label")


@dataclass(frozen=True)
class Pool:
    """What there is to be dealt. held_out: by class, a selection that is only measured on.

    records: (n,) as JSON lines hold them; classes: (n,) the class of each.
    """

    names: tuple[str, ...]
    records: tuple[dict[str, Any], ...]
    classes: tuple[int, ...]
    held_out: tuple[DataSelection, ...]
    pairs: bool = False
    sample: tuple[str, ...] = ()  # files of a few held-out examples

    @property
    def classifies(self) -> bool:
        """Whether the classes are labels to be predicted."""
        return bool(self.records) and "label" in self.records[0]


def labelled_pool(
    train: Sequence[str], held_out: Sequence[str], labels: Sequence[str], folder: Path
) -> Pool:
    """Of labelled files. folder: for held-out files by label.

    Raises `CorpusError`, `ShiftError`.
    """
    chosen = Labelled(tuple(train), tuple(held_out))
    corpus = collect(DataSelection(labelled=chosen), held_out_share=0.1)
    known = {label: i for i, label in enumerate(labels)}
    by_label: dict[str, list[dict[str, Any]]] = {label: [] for label in labels}
    records, classes = [], []
    for document in corpus.files:
        if document.label not in known:
            raise ShiftError(
                f"{document.origin} has label {document.label!r}; the study's are "
                f"{', '.join(labels)}"
            )
        record = dict(zip(("first", "second"), (text for text, _ in document.parts), strict=False))
        record["label"] = document.label
        if document.split == "held_out":
            by_label[document.label].append(record)
        else:
            records.append(record)
            classes.append(known[document.label])
    if empty := [label for label, found in by_label.items() if not found]:
        raise ShiftError(f"no held-out example has label {empty[0]!r}; give other files")
    pairs = bool(records) and "second" in records[0]
    columns = COLUMNS if pairs else SINGLE
    selections = []
    for i, found in enumerate(by_label.values()):
        path = str(_write(folder / f"held-out-{i}.jsonl", found))
        selections.append(DataSelection(labelled=Labelled((path,), (path,), columns)))
    few = _write(folder / "sample.jsonl", [found[0] for found in by_label.values()])
    return Pool(
        tuple(labels), tuple(records), tuple(classes), tuple(selections), pairs, (str(few),)
    )


def code_pool(domains: tuple[str, ...], held_out_share: float) -> Pool:
    """Of code that every installation holds, in pieces; a file is trained on or held out."""
    records, classes = [], []
    devices = domain_devices(domains)
    for i, device in enumerate(devices):
        for document in collect(device.data, held_out_share).of("train"):
            pieces = _pieces(document.text)
            records += [{"text": piece} for piece in pieces]
            classes += [i] * len(pieces)
    return Pool(domains, tuple(records), tuple(classes), tuple(d.data for d in devices))


def _pieces(text: str) -> list[str]:
    found, piece = [], ""
    for line in text.splitlines(keepends=True):
        if piece and len(piece) + len(line) > PIECE_CHARACTERS:
            found.append(piece)
            piece = ""
        piece += line
    return [*found, piece] if piece.strip() else found


@dataclass(frozen=True)
class Shifted:
    """A fleet with its classes. shares: (devices, C) as dealt. probes: one by class, of held-out
    data; they are measured and take part in no round.
    """

    devices: tuple[SimulatedDevice, ...]
    probes: tuple[SimulatedDevice, ...]
    shares: Shares


def shifted_fleet(
    pool: Pool, sizes: Sequence[int], alpha: float, seed: int, folder: Path
) -> Shifted:
    """Deals the pool and writes a file for each device. Raises `ShiftError`."""
    counts = Counter(pool.classes)
    prior = np.array([counts[i] for i in range(len(pool.names))], dtype=np.float64)
    dealt = deal(pool.classes, mixtures(prior, len(sizes), alpha, seed), sizes, seed)
    devices = []
    for i, which in enumerate(dealt):
        path = str(_write(folder / f"device-{i}.jsonl", [pool.records[j] for j in which]))
        if pool.classifies:
            # What a device holds out of its own is hardly looked at: the probes are.
            columns = COLUMNS if pool.pairs else SINGLE
            data = DataSelection(labelled=Labelled((path,), pool.sample, columns))
        else:
            data = DataSelection(jsonl=(path,))
        devices.append(SimulatedDevice(f"device-{i}", data))
    probes = tuple(SimulatedDevice(f"class-{i}", data) for i, data in enumerate(pool.held_out))
    return Shifted(tuple(devices), probes, shares_of(pool.classes, dealt, len(pool.names)))


def _write(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
