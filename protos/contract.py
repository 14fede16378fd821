"""Facts that cross the wire, as frozen values, and their protobuf and JSON forms.

The dataclasses are what the code thinks in; the messages of fleet.proto are how they travel. The
two are kept equal field by field (`tests/protos/test_contract.py`), so one generic conversion
serves all of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.message import Message
from pydantic import TypeAdapter, ValidationError

from profiles.compat import StrEnum
from profiles.errors import SketchfleetError
from profiles.model import ModuleShape

Precision = Literal["nf4", "int8", "bf16", "fp32"]
Encoding = Literal["float32", "bfloat16", "int8", "int4", "int2", "sign"]
Part = Literal["up", "down", "core", "dense"]
RowChoice = Literal["prefix", "stratified", "independent"]
MirrorRows = Literal["slice", "rest", "all"]
Subject = Literal["global", "slice", "personal", "local"]
Stage = Literal["received", "trained"]
Outcome = Literal["done", "out_of_memory", "no_data", "base_mismatch", "crashed"]

MOST_EXAMPLES = 240  # of an evaluation that are told one by one: less than 2 kB of a report

T = TypeVar("T")
M = TypeVar("M", bound=Message)


class Reason(StrEnum):
    """Why a call was refused."""

    BAD_TOKEN = "BAD_TOKEN"  # noqa: S105 - a reason, not a secret
    BAD_CREDENTIAL = "BAD_CREDENTIAL"
    REVOKED = "REVOKED"
    PENDING = "PENDING"
    BAD_REQUEST = "BAD_REQUEST"
    DOES_NOT_FIT = "DOES_NOT_FIT"
    UNKNOWN_BLOB = "UNKNOWN_BLOB"
    UNKNOWN_UPLOAD = "UNKNOWN_UPLOAD"
    UNKNOWN_ASSIGNMENT = "UNKNOWN_ASSIGNMENT"
    WRONG_OFFSET = "WRONG_OFFSET"
    CORRUPT_CHUNK = "CORRUPT_CHUNK"
    DIGEST_MISMATCH = "DIGEST_MISMATCH"
    WRONG_SIZE = "WRONG_SIZE"
    BAD_UPDATE = "BAD_UPDATE"
    EQUIVOCATION = "EQUIVOCATION"
    TOO_LATE = "TOO_LATE"
    SLOW_DOWN = "SLOW_DOWN"  # asked too often, or for too many bytes: wait, then go on
    NO_ROOM = "NO_ROOM"  # the coordinator's disk is full: wait, then go on
    INTERNAL = "INTERNAL"


class ContractError(SketchfleetError):
    """A message does not hold what its type promises."""


class RefusalError(SketchfleetError):
    """A request the coordinator turns down, with the reason an agent can branch on.

    retry_s: how long to wait before asking again, where that helps.
    """

    def __init__(self, reason: Reason, sentence: str, retry_s: float = 0.0) -> None:
        super().__init__(sentence)
        self.reason, self.retry_s = reason, retry_s


@dataclass(frozen=True)
class Classification:
    """A run whose model names one of some labels for a text or a pair of texts."""

    labels: tuple[str, ...]  # in the order of the model's outputs
    head: str  # the module that gives them ("classifier", "score"): drawn, not the base's own


@dataclass(frozen=True)
class AdapterSpec:
    """What every device of a run must agree on; its digest heads every packed file."""

    run_id: str
    base: str  # hub id or folder name; where the base lies, not which it is
    base_revision: str
    base_digest: str  # SHA-256, hex (`profiles.model.base_digest`)
    rank: int  # r of the global adapter
    alpha: float  # lora_alpha; the same on every device whatever its k (`docs/methods.md`)
    use_rslora: bool
    seed: int
    modules: tuple[ModuleShape, ...]
    dense: tuple[ModuleShape, ...] = ()  # tensors trained whole (PEFT's modules_to_save)
    classification: Classification | None = None  # None: the model predicts the next token

    @property
    def digest(self) -> bytes:
        """SHA-256 of the canonical JSON less `base` and `base_revision`, 32 bytes.

        Those two say where the base lies; which one it is, `base_digest` says.
        """
        plain = to_plain(self)
        del plain["base"], plain["base_revision"]
        return hashlib.sha256(_compact(plain)).digest()

    @property
    def parameters_per_rank(self) -> int:
        """Adapter parameters that one rank component has: sum of (in + out) over modules."""
        return sum(m.out_features + m.in_features for m in self.modules)

    def scale(self, rank: int) -> float:
        """LoRA's alpha / rank or rsLoRA's alpha / sqrt(rank): the factor on up'down."""
        return self.alpha / self.divisor(rank)

    def divisor(self, rank: int) -> float:
        """What PEFT divides `lora_alpha` by for an adapter of `rank` rows."""
        return rank**0.5 if self.use_rslora else float(rank)


@dataclass(frozen=True)
class Payload:
    """What a packed file holds; with the spec, its layout and size follow from this alone."""

    rank: int  # rows of up, down and core per module
    encoding: Encoding
    parts: tuple[Part, ...] = ("up", "down")  # core is (rank, rank); dense, the spec's tensors
    density: float = 1.0  # share of the values that is kept, those of largest magnitude
    group: int = 0  # values that share a scale; 0: a row of a part
    compressed: bool = False  # blocks may be Zstandard frames, where that is shorter


@dataclass(frozen=True)
class UpdateBudget:
    """What a device that knows its values may choose for its update, in place of the planned one.

    The file's header tells what it chose (`protos.layout.chosen_payload`).
    """

    size_bytes: int  # of the packed file, at most
    encodings: tuple[Encoding, ...]
    sparse: bool  # whether it may leave values out
    groups: tuple[int, ...] = (0, 64)  # of encodings that have scales


@dataclass(frozen=True)
class ErrorCurve:
    """What an update would have lost as this: relative squared errors at densities 1, 1/2, 1/4 …

    (`protos.distortion.DENSITIES`)
    """

    encoding: Encoding
    group: int
    errors: tuple[float, ...]


@dataclass(frozen=True)
class BlobRef:
    """Bytes by content: SHA-256 (hex), size, and what the file holds."""

    digest: str
    size_bytes: int
    payload: Payload


@dataclass(frozen=True)
class MirrorFile:
    """New values of some rows of a mirror, or what is to be added to them (`protos.mirror`)."""

    blob: BlobRef
    rows: MirrorRows  # of every module: those of the slice, the others, or all
    adds: bool  # to what the mirror holds; else it takes its place


@dataclass(frozen=True)
class MirrorStep:
    """How a device's own copy of the global adapter, its mirror, becomes the next one.

    Slice and whole adapter are then cut from it. Who lacks `base` fetches `result` as it is.
    """

    files: tuple[MirrorFile, ...]
    result: BlobRef  # float32, all rows; a mirror is named by its digest
    up_factor: float  # on the rows of up that make a slice
    base: BlobRef | None = None  # None: the adapter that every run starts from


@dataclass(frozen=True)
class Objective:
    """PropFair's batch loss -log(1 - loss / ceiling), arXiv 2202.01666."""

    ceiling: float  # M, nats per token; above any loss worth training on
    margin: float  # below ceiling - loss = margin the loss goes on as a straight line


@dataclass(frozen=True)
class Pruning:
    """HetLoRA's self-pruning (arXiv 2401.06432): the tail is pulled to zero and may be dropped."""

    keep: float  # gamma: the tail begins at row floor(gamma k)
    penalty: float  # lambda: factor on ||tail of up|| * ||tail of down|| in the loss


@dataclass(frozen=True)
class Assignment:
    """What one device is asked to do in one round.

    `local_steps` 0: nothing to train. `evaluates_global`: first evaluate the whole adapter, from
    `global_adapter` and `global_side`, on held-out code. A part that neither `slice` nor the
    device's home holds starts as zeros; with `fresh`, down starts as drawn for this round.
    """

    assignment_id: str
    run_id: str
    round: int
    device_id: str
    method: str
    rank: int  # rows of the slice: LoRA rank r_i or sketch size k
    rows: RowChoice  # which rows of the global adapter these are (`protos.sketch.slice_rows`)
    sketch_offset: int  # where the device's rows begin in each module's permutation
    alpha: float  # lora_alpha of the device's adapter
    trained: tuple[Part, ...]  # what the optimiser moves
    personal: tuple[Part, ...]  # what stays at home and starts from there
    keeps_basis: bool  # row j means the same as last round
    keeps_state: bool  # the optimiser goes on where it stopped
    error_feedback: bool  # what the update leaves out is added to the next one
    fresh: bool
    precision: Precision
    sequence_tokens: int
    micro_batch: int
    accumulation: int  # micro-batches per optimiser step
    checkpointing: bool
    local_steps: int
    learning_rate: float
    optimizer: str  # "adamw" | "adamw8bit" | "sgd"
    update: Payload
    evaluation_sequences: int  # held-out sequences per evaluation
    held_out_share: float
    evaluates_global: bool
    seed: int
    deadline_s: float  # length of the round
    reason: str  # why this k, in words with numbers
    slice: tuple[BlobRef, ...] = ()
    side: BlobRef | None = None  # frozen branch beside the base while training, at scale 1
    global_adapter: tuple[BlobRef, ...] = ()
    global_side: BlobRef | None = None
    objective: Objective | None = None
    pruning: Pruning | None = None
    fill_in_middle: float = 0.0  # share of training documents rearranged, if the tokenizer can
    completions: int = 0  # of held-out code to be generated and compared, per evaluation
    local_only: bool = False  # also train an adapter of the same budget that is never merged
    budget: UpdateBudget | None = None  # the device chooses; `update` is what was planned
    mirror: MirrorStep | None = None  # in place of `slice` and `global_adapter`

    @property
    def digest(self) -> bytes:
        """SHA-256 of the canonical JSON, 32 bytes; heads the update it answers."""
        return hashlib.sha256(canonical_json(self)).digest()

    @property
    def trains(self) -> bool:
        """Whether the device is to train, not only to evaluate."""
        return self.local_steps > 0

    @property
    def blobs(self) -> tuple[BlobRef, ...]:
        """Everything to be fetched, each once, by a device that holds the base of its mirror."""
        branches = tuple(b for b in (self.side, self.global_side) if b is not None)
        files = () if self.mirror is None else tuple(file.blob for file in self.mirror.files)
        return tuple(dict.fromkeys((*self.slice, *self.global_adapter, *files, *branches)))


@dataclass(frozen=True)
class Evaluation:
    """Mean next-token loss (nats) and accuracy on the device's own held-out code.

    exact_match, edit_similarity: of `completions` generated lines against the held-out ones;
    pass_at_1, pass_at_k: unbiased, from `samples` programs for each of `problems`.
    example_millinats, example_tokens: summed loss, in thousandths of a nat, and predicted tokens of
    single held-out sequences, at most `MOST_EXAMPLES`; of the subject "global" only.
    """

    # "global": the whole adapter; "slice": the assigned rows; "personal": Ditto's; "local": one
    # that is trained on this device's code alone
    subject: Subject
    stage: Stage
    loss: float
    token_accuracy: float
    tokens: int
    completions: int = 0
    exact_match: float | None = None
    edit_similarity: float | None = None
    problems: int = 0
    samples: int = 0  # programs per problem; also the k of pass_at_k
    pass_at_1: float | None = None
    pass_at_k: float | None = None
    example_millinats: tuple[int, ...] = ()
    example_tokens: tuple[int, ...] = ()
    macro_f1: float | None = None  # of a classifier: mean over the labels that occur


@dataclass(frozen=True)
class Progress:
    """How far a local round is; travels with the heartbeat."""

    step: int
    steps: int
    tokens_per_s: float
    memory_bytes: int
    temperature_c: float | None = None
    joules: float | None = None  # since the round began, where the board tells
    paused: str = ""  # why training waits, in words; empty while it does not


@dataclass(frozen=True)
class LocalReport:
    """What one local round did and measured, or why it could not be done."""

    assignment_id: str
    outcome: Outcome
    message: str = ""
    evaluations: tuple[Evaluation, ...] = ()
    train_examples: int = 0  # sequences in the device's training split: its weight
    train_tokens: int = 0
    train_loss: float = 0.0
    trained_parameters: int = 0
    peak_bytes: int = 0
    fetch_s: float = 0.0
    train_s: float = 0.0
    evaluate_s: float = 0.0
    push_s: float = 0.0
    fetched_bytes: int = 0
    pushed_bytes: int = 0
    resumes: int = 0
    main_language: str = ""
    kept_rank: int = 0  # rows left after HetLoRA's self-pruning; 0: nothing was pruned
    step_s: float = 0.0  # median of the optimiser steps
    load_s: float = 0.0  # until base and code were in memory; 0 where they were kept
    paused_s: float = 0.0  # waiting for the owner, the heat or the hour; not in train_s
    resumed_step: int = 0  # steps found done in a checkpoint
    temperature_c: float | None = None  # the highest during training
    joules: float | None = None
    wait_s: float = 0.0  # ready for work and without any, before this round
    pack_s: float = 0.0  # encoding the update; not in train_s
    resent_bytes: int = 0  # of files, both ways, that crossed the link more than once
    sent: Payload | None = None  # what a device with a byte budget chose
    update_error: float = 0.0  # ||sent - due||^2 / ||due||^2, of the same
    error_curves: tuple[ErrorCurve, ...] = ()  # what it could have chosen, for the next plan

    def evaluation(self, subject: Subject, stage: Stage) -> Evaluation | None:
        """The evaluation of that subject at that stage, if it was made."""
        return next((e for e in self.evaluations if (e.subject, e.stage) == (subject, stage)), None)


@dataclass(frozen=True)
class ProfileRequest:
    """How a device is to measure its compute: a few steps as the run would ask for them."""

    precision: Precision
    sequence_tokens: int
    micro_batch: int
    rank: int


_adapters: dict[Any, TypeAdapter[Any]] = {}  # building one costs a hundred conversions


def _adapter(kind: Any) -> TypeAdapter[Any]:
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]


def to_plain(fact: Any) -> dict[str, Any]:
    """A fact as plain JSON values."""
    plain: dict[str, Any] = _adapter(type(fact)).dump_python(fact, mode="json", exclude_none=True)
    return plain


def from_plain(kind: type[T], plain: Any) -> T:
    """A fact from plain JSON values.

    Raises `ContractError` on missing or ill-typed fields, and on numbers that are not finite.
    """
    try:
        fact: T = _adapter(kind).validate_python(plain)
    except ValidationError as error:
        raise ContractError(_explain(kind, error)) from error
    if (where := _not_finite(fact)) is not None:
        raise ContractError(f"{kind.__name__}: {where}: must be a finite number")
    return fact


def canonical_json(fact: Any) -> bytes:
    """The one JSON of a fact: sorted keys, no spaces. What digests are taken of."""
    return _compact(to_plain(fact))


def _compact(plain: dict[str, Any]) -> bytes:
    return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()


def from_json(kind: type[T], text: bytes | str) -> T:
    """A fact from its JSON. Raises `ContractError`."""
    try:
        plain = json.loads(text)
    except ValueError as error:
        raise ContractError(f"not the JSON of a {kind.__name__}: {error}") from error
    return from_plain(kind, plain)


def to_message(fact: Any, message: type[M]) -> M:
    """A fact as a protobuf message with the same field names.

    Raises `ContractError` on numbers that the message cannot hold.
    """
    try:
        return ParseDict(to_plain(fact), message())
    except ParseError as error:
        raise ContractError(f"{type(fact).__name__} cannot be sent: {error}") from error


def from_message(message: Message, kind: type[T]) -> T:
    """The fact a message carries. Raises `ContractError`."""
    plain = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return from_plain(kind, plain)


def _explain(kind: type[Any], error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "value"
    return f"{kind.__name__}: {where}: {first['msg'].lower()}"


def _not_finite(fact: Any, where: str = "") -> str | None:
    """Where in a fact a float is NaN or infinite; None if nowhere."""
    if isinstance(fact, float):
        return None if math.isfinite(fact) else where
    parts: list[tuple[str, Any]] = []
    if dataclasses.is_dataclass(fact) and not isinstance(fact, type):
        parts = [(field.name, getattr(fact, field.name)) for field in dataclasses.fields(fact)]
    elif isinstance(fact, tuple):
        parts = [(str(i), part) for i, part in enumerate(fact)]
    found = (_not_finite(part, f"{where}.{name}".lstrip(".")) for name, part in parts)
    return next((place for place in found if place is not None), None)
