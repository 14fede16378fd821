"""What one device would be asked to do in one round: the settings that decide what it costs.

Facts only. What they cost in memory is `profiles.memory`, in seconds and bytes `profiles.cost`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BasePrecision = Literal["nf4", "int8", "bf16", "fp32"]


@dataclass(frozen=True)
class LocalWork:
    """What one device would be asked to do in one round. `local_steps` 0: evaluate only."""

    precision: BasePrecision
    rank: int  # k, rows that are trained
    parameters_per_rank: int  # c = sum of (in + out) over adapted modules
    global_rank: int  # r, rows of the whole adapter
    sequence_tokens: int
    micro_batch: int
    accumulation: int
    local_steps: int
    checkpointing: bool
    evaluation_sequences: int
    evaluates_global: bool
    slice_bytes: int
    update_bytes: int
    global_bytes: int
    density: float = 1.0  # share of the adapter's values that travels
    side_rank: int = 0  # rows of the frozen branch beside the base
    dense_parameters: int = 0  # of tensors that are trained whole
    targets: tuple[str, ...] = ()  # adapted projections ("q_proj"); empty: all of them
    optimizer: str = "adamw"  # "adamw" | "adamw8bit" | "sgd"
    local_only: bool = False  # the same once more, for an adapter that stays on the device

    @property
    def step_tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.micro_batch * self.sequence_tokens

    @property
    def micro_steps(self) -> int:
        """Passes forward and backward in the whole round."""
        return self.local_steps * self.accumulation * (2 if self.local_only else 1)

    @property
    def train_tokens(self) -> int:
        """Tokens through forward, backward and step."""
        return self.micro_steps * self.step_tokens

    @property
    def evaluations(self) -> int:
        """Passes over the held-out code: the slice before and after, and the adapters beside it."""
        return (2 if self.local_steps else 0) + self.evaluates_global + self.local_only

    @property
    def trained_parameters(self) -> int:
        """Values that an optimiser moves."""
        return self.rank * self.parameters_per_rank + self.dense_parameters


@dataclass(frozen=True)
class Correction:
    """What a device's reports taught about its predictions (`coordinator.corrections`).

    memory, time: factors on predicted peaks and on seconds of training and evaluating. variation:
    mean relative error that is left of the latter. memory_share, work_share: what a device is
    trusted with after it ran out of memory, or failed or vanished, of its memory and its steps.
    """

    memory: float = 1.0
    time: float = 1.0
    variation: float = 0.1  # of compute, before anything was reported; assumed
    load_s: float = 0.0  # until base and code are in memory; reported
    memory_share: float = 1.0
    work_share: float = 1.0
    note: str = ""  # why one of the two is below 1, for the sentence


NOTHING_LEARNT = Correction()
