"""What a plan is made from and what it says: policies, levels, plans. No decision is made here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from profiles.cost import Cost
from profiles.errors import SketchfleetError
from protos.contract import Encoding, ErrorCurve, Part, Payload, Precision, UpdateBudget
from protos.layout import codec_of

AUTO_PRECISIONS: tuple[Precision, ...] = ("bf16", "int8", "nf4")  # most precise first
AUTO_SEQUENCES = (1024, 512, 256, 128)  # tokens; longest first
AUTO_ENCODINGS: tuple[Encoding, ...] = ("bfloat16", "int8")  # most precise first
BUDGET_ENCODINGS: tuple[Encoding, ...] = (*AUTO_ENCODINGS, "int4", "int2")  # rounded without bias
GROUPS = (0, 64)  # under a byte budget, where the run names none
DENSE: tuple[Part, ...] = ("dense",)  # tensors trained whole: a file of their own
Aim = Literal["fastest", "fairest", "cheapest"]


class PlanError(SketchfleetError):
    """No device can take part; the message gives every device's reason, `plan` holds them."""

    def __init__(self, sentence: str, plan: RoundPlan) -> None:
        super().__init__(sentence)
        self.plan = plan


class Level(NamedTuple):
    """How large a part a device takes: rows of its slice, and the share of values that travels."""

    rank: int
    density: float


def update_payload(
    level: Level, encoding: Encoding, parts: tuple[Part, ...], *, group: int, compressed: bool
) -> Payload:
    """What an update of these parts is to hold; encodings without scales have no groups."""
    own = group if codec_of(encoding).scaled else 0
    return Payload(level.rank, encoding, parts, level.density, own, compressed)


@dataclass(frozen=True)
class PlanPolicy:
    """What the run asks for, and how far the planner may go below it.

    An evaluate-only round has `local_steps` 0 and `evaluates_global`. What varies between devices:
    the rows of their slice, the share of values they send (FLASC), or nothing: then a device
    trains the whole adapter or none. `complement`: a device gets the rows it does not train as a
    frozen branch (Fed-PLoRA). "auto" leaves a setting to the planner; anything else stays.
    """

    rank: int  # r
    precision: Precision | Literal["auto"]
    sequence_tokens: int | Literal["auto"]
    micro_batch: int
    accumulation: int
    local_steps: int
    update_encoding: Encoding | Literal["auto"]
    slice_encoding: Encoding
    global_encoding: Encoding
    evaluation_sequences: int
    max_round_s: float
    round_s: float | None = None  # None: the planner chooses
    min_rank: int = 1
    rank_multiple: int = 1
    min_local_steps: int = 1
    checkpointing: bool | Literal["auto"] = "auto"
    coverage: float = 1.0  # kappa: the sum of k is to reach kappa * r
    varies: Literal["rank", "density", "nothing"] = "rank"
    density: float = 1.0  # the largest
    most_rank: int | None = None  # no device gets more rows
    files: tuple[tuple[Part, ...], ...] = (("up", "down"),)
    resting: tuple[tuple[Part, ...], ...] = ()  # of these, files that every device has already
    update_parts: tuple[Part, ...] = ("up", "down")
    update_group: int = 0  # of encodings that have scales
    compressed: bool = False  # updates; what that saves is not counted on
    side_rank: int = 0
    complement: bool = False
    evaluates_global: bool = False
    optimizer: str = "adamw"
    aim: Aim = "fastest"
    rounds_left: int = 1  # that a device's byte budget is to last for, at most
    feeds_back: bool = False  # what an update leaves out comes later
    local_only: bool = False  # devices train twice, the second time for themselves

    @property
    def measuring(self) -> tuple[bool, ...]:
        """Whether to evaluate the whole adapter: what is wanted, then what may be given up to."""
        if not self.evaluates_global:
            return (False,)
        return (True, False) if self.local_steps else (True,)

    @property
    def deadline_s(self) -> float:
        """The longest a round may be."""
        return self.max_round_s if self.round_s is None else min(self.round_s, self.max_round_s)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """What the base may be held in, most precise first."""
        return AUTO_PRECISIONS if self.precision == "auto" else (self.precision,)

    @property
    def sequences(self) -> tuple[int, ...]:
        """Lengths that rows may have, longest first."""
        return AUTO_SEQUENCES if self.sequence_tokens == "auto" else (self.sequence_tokens,)

    @property
    def encodings(self) -> tuple[Encoding, ...]:
        """What updates may travel as, most precise first."""
        return AUTO_ENCODINGS if self.update_encoding == "auto" else (self.update_encoding,)

    def budget(self, size_bytes: int) -> UpdateBudget:
        """What a device may choose for an update of at most these bytes.

        Leaving values out is biased, and signs alone never tell sizes: both need error feedback
        (or a method that is made for the former).
        """
        encodings = self.encodings
        if self.update_encoding == "auto":
            signs: tuple[Encoding, ...] = ("sign",) if self.feeds_back else ()
            encodings = BUDGET_ENCODINGS + signs
        sparse = self.feeds_back or self.varies == "density"
        groups = (self.update_group,) if self.update_group else GROUPS
        return UpdateBudget(size_bytes, encodings, sparse, groups)

    @property
    def levels(self) -> tuple[Level, ...]:
        """What a device may be given, ascending.

        Ranks: multiples, and both ends whether they are multiples or not. Densities: halvings
        down to the share that `min_rank` is of the rank.
        """
        if self.varies == "nothing":
            return (Level(self.rank, self.density),)
        most = min(self.rank, self.most_rank or self.rank)
        low = min(self.min_rank, most)
        if self.varies == "density":
            halvings = max(0, math.floor(math.log2(self.density * self.rank / low) + 1e-9))
            return tuple(Level(self.rank, self.density / 2**i) for i in range(halvings, -1, -1))
        step = max(1, self.rank_multiple)
        inner = (k for k in range(low, most) if k % step == 0)
        return tuple(Level(k, self.density) for k in sorted({low, most, *inner}))

    def update(self, level: Level, encoding: Encoding) -> Payload:
        """What a device sends at this level."""
        return update_payload(
            level, encoding, self.update_parts, group=self.update_group, compressed=self.compressed
        )

    def share(self, level: Level) -> float:
        """Of the adapter's rows, or of the values that may travel, what a level covers."""
        return level.rank / self.rank * level.density / self.density


@dataclass(frozen=True)
class UpdateTerms:
    """What limits a device's update, and what is known of its values.

    size_bytes: at most, None without a limit. curves: what its last one would have lost, empty if
    it was never told.
    """

    size_bytes: int | None = None
    curves: tuple[ErrorCurve, ...] = ()


@dataclass(frozen=True)
class DevicePlan:
    """What one device is asked to do, why, and what it is expected to cost."""

    device_id: str
    rank: int  # k
    sketch_offset: int  # first row in each module's permutation
    precision: Precision
    sequence_tokens: int
    micro_batch: int
    accumulation: int
    checkpointing: bool
    local_steps: int
    evaluates_global: bool
    reason: str
    predicted: Cost
    predicted_peak_bytes: int
    density: float = 1.0
    update_encoding: Encoding | None = None  # of plans recorded before it could vary: the run's
    uncorrected_peak_bytes: int = 0  # as the report would tell it, had nothing been learnt
    time_factor: float = 1.0  # learnt, and part of the predicted seconds
    # Under a byte budget: the terms, what is expected to be chosen, and the relative squared error
    # of what arrives against an update of all rows.
    budget: UpdateBudget | None = None
    update: Payload | None = None
    expected_error: float | None = None


@dataclass(frozen=True)
class RoundPlan:
    """A round: its length, who does what (sorted by name), and who was left out and why."""

    round_s: float
    devices: tuple[DevicePlan, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    unfit: frozenset[str] = frozenset()  # left out for memory: no round will be long enough
