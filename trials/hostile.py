"""Devices that attack: what they send in place of an honest update.

Each trains like everybody and changes what leaves it, so that the files are well formed and answer
their assignments; only poisoned code changes the training itself. What an attacker knows is its own
update, and under "colluding" those of its fellows: not what honest devices send.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from edge_agent.training.connectors import DataSelection
from edge_agent.training.rows import Rows
from edge_agent.training.workbench import LocalRows
from protos.contract import AdapterSpec, Assignment
from protos.layout import Parts
from protos.packing import pack
from protos.sketch import keyed_stream, slice_rows
from protos.unpacking import open_update
from trials.simulated_bench import SharedBench

Attack = Literal[
    "sign flip", "large sign flip", "scaling", "noise", "label flip", "colluding", "NaN", "replay"
]  # fmt: skip
ATTACKS: tuple[Attack, ...] = get_args(Attack)
ABOUT: Mapping[Attack, str] = {
    "sign flip": "the honest change times -1, which its size does not give away",
    "large sign flip": "the honest change times -1.8",
    "scaling": "the honest change times 20",
    "noise": "random values, 1.8 times the size of the honest change",
    "label flip": "trained on code whose next tokens are permuted, and sent as it is",
    "colluding": "all send one direction, minus their own, 1.8 times as large, each with a little "
    "noise of its own",
    "NaN": "a value that is no number in every row",
    "replay": "the first round's change again in every round, 1.8 times as large",
}
STRENGTH = 1.8  # times the honest size: what screening lets pass while it knows few sizes
Values = dict[str, Parts]


class PoisonedBench(SharedBench):
    """A bench on which some devices' training code is poisoned; what they evaluate on is not."""

    def __init__(self) -> None:
        super().__init__()
        self.poisoned: frozenset[DataSelection] = frozenset()

    def rows(self, folder: Any, base: Any, data: DataSelection, *how: Any) -> LocalRows:
        """As a shared bench's."""
        found = super().rows(folder, base, data, *how)
        if data not in self.poisoned or not isinstance(found.train, Rows):
            return found
        return replace(found, train=flipped(found.train, base.model.config.vocab_size))


def flipped(rows: Rows, vocabulary: int) -> Rows:
    """Every other token replaced under one permutation, and only those predicted.

    A language model's labels are its next tokens. That the tokens between are left as they were
    makes wrong answers to half-true questions, which teaches more harm than code in cipher would.
    """
    keys = keyed_stream("label-flip").random_raw(vocabulary)
    other = np.argsort(keys, kind="stable").astype(np.int64)
    tokens, counted = rows.tokens.copy(), rows.counted.copy()
    tokens[:, 1::2] = other[tokens[:, 1::2]]
    counted[:, 0::2] = False
    return Rows(tokens, rows.document, counted)


class Attacker:
    """The hostile devices of a run; they share what they know. names: in the fleet's order."""

    def __init__(self, attack: Attack, names: Sequence[str], spec: AdapterSpec) -> None:
        self.attack, self.names = attack, tuple(names)
        self._spec = spec
        self._first: dict[str, Values] = {}  # what replays
        self._common: Values = {}  # of this round, whole adapters
        self._common_of = -1

    def tamper(self, task: Assignment, path: Path) -> None:
        """Replaces an honest update by a hostile one, in place."""
        if self.attack == "label flip" or task.device_id not in self.names:
            return
        reader = open_update(path, self._spec, task)
        honest: Values = {
            name: {p: np.array(v) for p, v in reader.module(name).items()} for name in reader.names
        }
        draw = np.random.default_rng([task.round, *task.device_id.encode()])
        sent = self._changed(task, honest, draw)
        if self.attack == "NaN":  # no encoder of ours writes one
            path.write_bytes(not_a_number(pack_as(self._spec, task, honest)))
            return
        path.write_bytes(pack_as(self._spec, task, sent))

    def _changed(self, task: Assignment, honest: Values, draw: np.random.Generator) -> Values:
        match self.attack:
            case "sign flip":
                return _each(honest, lambda v: -v)
            case "large sign flip":
                return _each(honest, lambda v: -STRENGTH * v)
            case "scaling":
                return _each(honest, lambda v: 20 * v)
            case "noise":
                return _each(honest, lambda v: STRENGTH * _rms(v) * _normal(draw, v))
            case "replay":
                first = self._first.setdefault(task.device_id, honest)
                return _each(_fitted(first, honest), lambda v: STRENGTH * v)
            case "colluding":
                return self._collude(task, honest, draw)
        return honest

    def _collude(self, task: Assignment, honest: Values, draw: np.random.Generator) -> Values:
        """The rows of the common direction that the device holds, and a little noise."""
        if self._common_of != task.round:
            self._common_of, self._common = task.round, {}
        sent: Values = {}
        for name, parts in honest.items():
            rows = slice_rows(self._spec, task, name)
            common = self._common.setdefault(name, {})
            sent[name] = {}
            for part, values in parts.items():
                whole = common.setdefault(
                    part, np.full((self._spec.rank, values.shape[1]), np.nan, np.float32)
                )
                mine = whole[rows]
                new = np.isnan(mine).any(axis=1)
                mine[new] = -STRENGTH * values[new]
                whole[rows] = mine
                sent[name][part] = mine + np.float32(0.1) * _rms(mine) * _normal(draw, mine)
        return sent


def pack_as(spec: AdapterSpec, task: Assignment, values: Values) -> bytes:
    """The file that an agent would send of these values."""
    return pack(spec, task.update, values, assignment_digest=task.digest, seed=task.seed)


def not_a_number(packed: bytes) -> bytes:
    """The file with its last two bytes, of a value or of a scale, set to those of a NaN."""
    return packed[:-2] + b"\xff\xff"


def _each(values: Values, change: Any) -> Values:
    return {
        name: {p: np.asarray(change(v), np.float32) for p, v in parts.items()}
        for name, parts in values.items()
    }


def _fitted(old: Values, new: Values) -> Values:
    """Old values, where the device still has as many rows; else its new ones."""
    return {
        name: {p: old[name][p] if old[name][p].shape == v.shape else v for p, v in parts.items()}
        for name, parts in new.items()
    }


def _rms(values: Any) -> Any:
    return np.sqrt(np.mean(np.square(values), dtype=np.float64))


def _normal(draw: np.random.Generator, like: Any) -> Any:
    return draw.standard_normal(like.shape, np.float32)
