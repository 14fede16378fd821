"""What the trainer keeps between jobs: one loaded base, and the rows of the local code.

Knows which base and which rows are there and when they may be used again. It knows no jobs and
no events.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from edge_agent.training.backbone import Backbone, load_base, pick_device
from edge_agent.training.classification import encode_examples
from edge_agent.training.connectors import DataSelection, collect
from edge_agent.training.documents import Corpus, Split
from edge_agent.training.fill_in_middle import FillInMiddle, middle_tokens
from edge_agent.training.memory import give_back, is_tight, resident_bytes, used_bytes
from edge_agent.training.row_packing import pack_documents
from edge_agent.training.rows import Sequences
from profiles.errors import SketchfleetError
from profiles.model import base_digest
from protos.contract import AdapterSpec, Precision

SPLITS: tuple[Split, ...] = ("train", "held_out")

log = logging.getLogger("sketchfleet.trainer")


class BaseMismatchError(SketchfleetError):
    """The base model on this device is not the one the run fine-tunes."""


class NoDataError(SketchfleetError):
    """There is too little local code to train on or to evaluate with."""


@dataclass(frozen=True)
class LocalRows:
    """The two splits in rows of the same length; `main_language` is "" when none is known."""

    train: Sequences
    held_out: Sequences
    main_language: str

    def require(self, trains: bool) -> None:
        """Raises `NoDataError` when there is nothing to evaluate on, or to train on."""
        for rows, kind in ((self.held_out, "held-out"), (self.train, "training")):
            if len(rows) == 0 and (trains or rows is self.held_out):
                raise NoDataError(
                    f"there is no {kind} code, but {len(self.train) + len(self.held_out)} "
                    f"sequences of {rows.length} tokens in all; add code under [data]"
                )


class Workbench:
    """Loads a base and tokenises code once, for as many jobs as ask for the same.

    The code is read when a selection is first asked for; what changes in the folders later is
    seen by the next trainer process.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or pick_device()
        self.baseline_bytes = resident_bytes()  # before any base is loaded
        self._base: tuple[tuple[object, ...], Backbone] | None = None
        self._digests: dict[Path, str] = {}
        self._rows: dict[tuple[object, ...], LocalRows] = {}

    def base(self, folder: Path, precision: Precision, spec: AdapterSpec) -> Backbone:
        """The base of the run, loaded now or kept from the last job.

        Raises `BaseMismatchError` when the folder holds other bytes than the run's base, and what
        `load_base` raises.
        """
        key = (folder, precision, spec.classification, spec.seed if spec.classification else 0)
        if self._base is not None and self._base[0] == key:
            self._require_digest(folder, spec)
            return self._base[1]
        self._base = None  # first free the old one: both may not fit
        give_back()
        self._digests.pop(folder, None)
        self._require_digest(folder, spec)
        self._base = (key, load_base(folder, precision, self.device, spec))
        return self._base[1]

    def make_room(self, cap_bytes: int | None) -> None:
        """Lets go of the base when keeping it would cost others memory.

        That is when this process holds more than `cap_bytes`, the owner's, or when the machine is
        short of memory. The next job loads it again.
        """
        if self._base is None:
            return
        used = used_bytes(self.device)
        if (cap_bytes is not None and used > cap_bytes) or is_tight(self.device):
            log.info("the base is let go", extra={"used_bytes": used, "cap_bytes": cap_bytes})
            self._base = None
            give_back()

    def rows(
        self,
        folder: Path,
        base: Backbone,
        data: DataSelection,
        sequence_tokens: int,
        held_out_share: float,
        fill_in_middle: float = 0.0,
        seed: int = 0,
    ) -> LocalRows:
        """The local data in the tokens of the base in `folder`: code, or examples to classify.

        fill_in_middle: share of the training documents that are rearranged, chosen and cut by
        `seed`; give one seed for a run, since another is another set of rows. Raises `CorpusError`
        when the selection holds no code.
        """
        key = (
            folder, base.labels, data, sequence_tokens, held_out_share, fill_in_middle, seed,
        )  # fmt: skip
        if key not in self._rows:
            self._rows.clear()  # one run at a time; the rows of another may be large
            corpus = collect(data, held_out_share)
            log.info("corpus", extra=asdict(corpus.summary))  # counts, no names
            train: Sequences
            held_out: Sequences
            if base.labels:
                train, held_out = (
                    encode_examples(corpus.of(split), base.labels, base, sequence_tokens)
                    for split in SPLITS
                )
            else:
                _refuse_labelled(corpus)
                middle = _fill_in_middle(base, fill_in_middle, seed)
                how = (base.encode, base.separator_id, sequence_tokens)
                train = pack_documents(corpus.of("train"), *how, middle)
                held_out = pack_documents(corpus.of("held_out"), *how)
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


def _refuse_labelled(corpus: Corpus) -> None:
    """Raises `NoDataError` on examples to classify in a run that predicts text."""
    if any(document.label is not None for document in corpus.files):
        raise NoDataError(
            "[data] names labelled files, but this run predicts text; name code, or join a run "
            "with [model] task = sequence-classification"
        )


def _fill_in_middle(base: Backbone, share: float, seed: int) -> FillInMiddle | None:
    """How training text is rearranged; None when it is not asked for or the base cannot."""
    if share <= 0:
        return None
    tokens = middle_tokens(base.tokenizer)
    if tokens is None:
        log.info("fill in the middle is off: the tokenizer of this base has no tokens for it")
        return None
    return FillInMiddle(tokens, share, seed)
