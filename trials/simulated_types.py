"""What a simulated run is made of: devices, what they send, and what is seen of them.

Plain facts; knows neither training nor merging.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from coordinator.merge import MergeResult
from coordinator.screening_types import Outcome
from edge_agent.training.connectors import DataSelection
from profiles.errors import SketchfleetError
from protos.contract import Assignment, Encoding, LocalReport


class SimulationError(SketchfleetError):
    """A run that cannot be simulated."""


@dataclass(frozen=True)
class SimulatedDevice:
    """One device: its code, and how many training sequences of it it has (None: all)."""

    name: str
    data: DataSelection
    train_sequences: int | None = None


@dataclass(frozen=True)
class Sending:
    """What one device trains and how its updates travel, where devices differ.

    rank: rows trained, 0 for all. density: share of the values that is sent. share: of the bytes of
    the whole adapter in float32 that an update may have; within them the device chooses. 0: no
    limit.
    """

    encoding: Encoding = "float32"
    rank: int = 0
    density: float = 1.0
    group: int = 0
    compressed: bool = False
    share: float = 0.0


@dataclass(frozen=True)
class TierAdapters:
    """An adapter for each tier, beside the global one: its devices start from it, train it and are
    measured on it. of: the tier of every device.

    A tier's updates are merged into it at their weight and all others at `others` of theirs: 0
    lets every tier learn by itself (clustered federated learning), 1 is the global adapter, and
    what lies between is data interpolation by tier (Mansour et al., arXiv 2002.10619).
    No byte more is sent.
    """

    of: Mapping[str, int]
    others: float

    def __post_init__(self) -> None:
        """Refuses a share that is none."""
        if not 0 <= self.others <= 1:
            raise SimulationError(
                f"others {self.others} is no share of a weight; give one from 0 to 1"
            )


@dataclass(frozen=True)
class DeviceRound:
    """One device in one round. Bytes as packed; weight as it entered the merge."""

    task: Assignment
    report: LocalReport
    up_bytes: int
    down_bytes: int
    weight: float
    update_share: float  # 0 where the model took no step


@dataclass(frozen=True)
class Measured:
    """One adapter on one device's held-out sequences: summed nats and predicted tokens of each."""

    nats: tuple[float, ...]
    tokens: tuple[int, ...]
    accuracy: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return sum(self.nats) / sum(self.tokens)


@dataclass(frozen=True)
class SimulatedRound:
    """What a round came to.

    merge: None where nothing was merged. refused: why an update was refused when it arrived, by
    device; those have no part in `devices`. screening: what it found; None where it is off.
    """

    devices: Mapping[str, DeviceRound]
    merge: MergeResult | None
    refused: Mapping[str, str] = field(default_factory=dict)
    screening: Outcome | None = None

    @property
    def up_bytes(self) -> int:
        """Of all devices."""
        return sum(d.up_bytes for d in self.devices.values())

    @property
    def down_bytes(self) -> int:
        """Of all devices."""
        return sum(d.down_bytes for d in self.devices.values())


def fleet_loss(measured: Mapping[str, Measured]) -> float:
    """Mean over devices, nats per token."""
    return float(np.mean([m.loss for m in measured.values()]))
