"""What the trainer keeps between jobs: one loaded base, and the rows of the local code.

Knows which base and which rows are there and when they may be used again. It knows no jobs and
no events.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edge_agent.training.backbone import Backbone, load_base, pick_device
from edge_agent.training.corpus import scan, tokenise
from edge_agent.training.memory import give_back, resident_bytes
from profiles.errors import SketchfleetError
from profiles.model import base_digest
from protos.contract import AdapterSpec, Precision

log = logging.getLogger("sketchfleet.trainer")


class BaseMismatchError(SketchfleetError):
    """The base model on this device is not the one the run fine-tunes."""


class NoDataError(SketchfleetError):
    """There is too little local code to train on or to evaluate with."""


@dataclass(frozen=True)
class DataSelection:
    """Which local files count as this device's code (`corpus.scan`)."""

    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    max_files: int | None = None


@dataclass(frozen=True)
class LocalRows:
    """Packed tokens of the two splits, each (sequences, sequence_tokens) int64."""

    train: NDArray[np.int64]
    held_out: NDArray[np.int64]
    main_language: str

    def require(self, trains: bool) -> None:
        """Raises `NoDataError` when there is nothing to evaluate on, or to train on."""
        for rows, kind in ((self.held_out, "held-out"), (self.train, "training")):
            if len(rows) == 0 and (trains or rows is self.held_out):
                raise NoDataError(
                    f"{kind} code is shorter than one sequence of {rows.shape[1]} tokens; "
                    "add code under [data] include"
                )


class Workbench:
    """Loads a base and tokenises code once, for as many jobs as ask for the same.

    The code is read when a selection is first asked for; what changes in the folders later is
    seen by the next trainer process.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or pick_device()
        self.baseline_bytes = resident_bytes()  # before any base is loaded
        self._base: tuple[tuple[Path, Precision], Backbone] | None = None
        self._digests: dict[Path, str] = {}
        self._rows: dict[tuple[Path, DataSelection, int, float], LocalRows] = {}

    def base(self, folder: Path, precision: Precision, spec: AdapterSpec) -> Backbone:
        """The base of the run, loaded now or kept from the last job.

        Raises `BaseMismatchError` when the folder holds other bytes than the run's base, and what
        `load_base` raises.
        """
        key = (folder, precision)
        if self._base is not None and self._base[0] == key:
            self._require_digest(folder, spec)
            return self._base[1]
        self._base = None  # first free the old one: both may not fit
        give_back()
        self._digests.pop(folder, None)
        self._require_digest(folder, spec)
        self._base = (key, load_base(folder, precision, self.device))
        return self._base[1]

    def rows(
        self,
        folder: Path,
        base: Backbone,
        data: DataSelection,
        sequence_tokens: int,
        held_out_share: float,
    ) -> LocalRows:
        """The local code in the tokens of the base in `folder`.

        Raises `CorpusError` when the selection holds no code.
        """
        key = (folder, data, sequence_tokens, held_out_share)
        if key not in self._rows:
            self._rows.clear()  # one run at a time; the rows of another may be large
            corpus = scan(
                data.include,
                exclude=data.exclude,
                languages=data.languages,
                held_out_share=held_out_share,
                max_files=data.max_files,
            )
            log.info("corpus", extra=asdict(corpus.summary))  # counts, no names
            train, held_out = (
                tokenise(corpus.of(split), base.encode, base.separator_id, sequence_tokens)
                for split in ("train", "held_out")
            )
            self._rows[key] = LocalRows(train, held_out, corpus.summary.main_language)
        return self._rows[key]

    def _require_digest(self, folder: Path, spec: AdapterSpec) -> None:
        if folder not in self._digests:
            self._digests[folder] = base_digest(folder)
        if self._digests[folder] != spec.base_digest:
            raise BaseMismatchError(
                f"the base model in {folder} has digest {self._digests[folder][:12]}, the run uses "
                f"{spec.base} with {spec.base_digest[:12]}; point [model] base at the run's base"
            )
