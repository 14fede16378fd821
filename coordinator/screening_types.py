"""What screening is given and what it says: claims, verdicts, quarantines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Claims:
    """What a device reports of a round. None, or 0: not known.

    losses: nats per token; of training over all steps, and of the slice as received on its own
    held-out code. tokens, most_tokens: trained on, and what the assignment comes to at most.
    step_s, own_step_s: of this round, and as its own profile predicts.
    """

    examples: int
    train_loss: float
    received_loss: float | None = None
    tokens: int = 0
    most_tokens: int = 0
    step_s: float = 0.0
    own_step_s: float = 0.0


@dataclass(frozen=True)
class Entry:
    """One update to be judged. allowance: how much larger than others it may be."""

    assignment_id: str
    device_id: str
    claims: Claims
    steps: int
    scale: float = 1.0  # of its adapter, where sizes follow it


@dataclass(frozen=True, eq=False)
class Screened:
    """One update as it was judged. round: into which it would be merged. shadow: its device was
    quarantined, so that it is not merged however good it is. size: root mean square over parts;
    agreement: median cosine with the others; signature (d,).
    """

    assignment_id: str
    device_id: str
    round: int
    accepted: bool
    shadow: bool
    reasons: tuple[str, ...]
    size: float
    agreement: float | None
    examples: int
    signature: NDArray[np.float32]

    @property
    def merged(self) -> bool:
        """Whether it enters the merge."""
        return self.accepted and not self.shadow


@dataclass(frozen=True)
class Quarantine:
    """A device that trains and is not merged. round: since which. needed: clean rounds in a row
    until it is back, of which it has `clean`.
    """

    device_id: str
    round: int
    reason: str
    needed: int
    clean: int = 0

    @property
    def told(self) -> str:
        """What the device is told."""
        left = self.needed - self.clean
        return (
            f"in quarantine since round {self.round}: {self.reason}; its updates are checked and "
            f"not merged, and it is back after {left} more clean round{'s' if left != 1 else ''}, "
            "or once the fleet's owner releases it"
        )


@dataclass(frozen=True)
class Outcome:
    """A round screened. imposed, served: quarantines that begin and those that end with it; ran:
    all that go on, with their clean rounds counted.
    """

    screened: tuple[Screened, ...]
    imposed: tuple[Quarantine, ...]
    served: tuple[str, ...]
    ran: tuple[Quarantine, ...]
