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
from enum import StrEnum
from typing import Any, Literal, TypeVar

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.message import Message
from pydantic import TypeAdapter, ValidationError

from profiles.errors import SketchfleetError
from profiles.model import ModuleShape

Precision = Literal["nf4", "int8", "bf16", "fp32"]
Encoding = Literal["float32", "bfloat16", "int8"]
Subject = Literal["global", "slice"]
Stage = Literal["received", "trained"]
Outcome = Literal["done", "out_of_memory", "no_data", "base_mismatch", "crashed"]

T = TypeVar("T")
M = TypeVar("M", bound=Message)


class Reason(StrEnum):
    """Why a call was refused."""

    BAD_TOKEN = "BAD_TOKEN"  # noqa: S105 - a reason, not a secret
    BAD_CREDENTIAL = "BAD_CREDENTIAL"
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
    INTERNAL = "INTERNAL"


class ContractError(SketchfleetError):
    """A message does not hold what its type promises."""


class RefusalError(SketchfleetError):
    """A request the coordinator turns down, with the reason an agent can branch on."""

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


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
        """The factor on up'down for an adapter of `rank` rows cut from this one.

        LoRA's alpha / rank is FSLoRA's r / k seen from the device. rsLoRA's alpha / sqrt(rank)
        is not, so there a device of k rows uses alpha * sqrt(r / k) (arXiv 2501.19389).
        """
        return self.device_alpha(rank) / (rank**0.5 if self.use_rslora else rank)

    def device_alpha(self, rank: int) -> float:
        """The `lora_alpha` of a stock PEFT adapter of `rank` rows."""
        return self.alpha * (self.rank / rank) ** 0.5 if self.use_rslora else self.alpha


@dataclass(frozen=True)
class BlobRef:
    """Bytes by content: SHA-256 (hex), size, and how the values inside are encoded."""

    digest: str
    size_bytes: int
    encoding: Encoding


@dataclass(frozen=True)
class Assignment:
    """What one device is asked to do in one round.

    `slice` absent means nothing to train; `global_adapter` present means: fetch the whole adapter
    and evaluate it on held-out code first.
    """

    assignment_id: str
    run_id: str
    round: int
    device_id: str
    method: str
    rank: int  # sketch size k: rows of the slice
    sketch_offset: int  # where the device's rows begin in each module's permutation
    precision: Precision
    sequence_tokens: int
    micro_batch: int
    accumulation: int  # micro-batches per optimiser step
    checkpointing: bool
    local_steps: int
    learning_rate: float
    optimizer: str  # "adamw" | "sgd"
    update_encoding: Encoding
    evaluation_sequences: int  # held-out sequences per evaluation
    held_out_share: float
    seed: int
    deadline_s: float  # length of the round
    reason: str  # why this k, in words with numbers
    slice: BlobRef | None = None
    global_adapter: BlobRef | None = None

    @property
    def digest(self) -> bytes:
        """SHA-256 of the canonical JSON, 32 bytes; heads the update it answers."""
        return hashlib.sha256(canonical_json(self)).digest()

    @property
    def trains(self) -> bool:
        """Whether the device is to train, not only to evaluate."""
        return self.slice is not None


@dataclass(frozen=True)
class Evaluation:
    """Mean next-token loss (nats) and accuracy on the device's own held-out code."""

    subject: Subject  # "global": the whole adapter; "slice": the assigned rows only
    stage: Stage
    loss: float
    token_accuracy: float
    tokens: int


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
