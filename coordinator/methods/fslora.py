"""FSLoRA: every device trains a sketch of the global adapter; its rows are added back in place.

Knows how rows that were drawn unevenly are put right; does not know how they were drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from coordinator.methods.base import (
    MethodOptions,
    ModuleState,
    ModuleUpdate,
    Normalisation,
    RowMethod,
    Scaling,
    Shares,
    UnknownMethodError,
)
from coordinator.methods.means import (
    Steps,
    mean_over_owners,
    owners_factors,
    sum_of_changes,
)

Rule = Literal["none", "ipw", "coverage"]

# The r/k in a sketch's gradient makes up for a row being drawn with probability k/r. SGD keeps
# that factor in its step; Adam divides it out again, so there rows are averaged over their owners.
DEFAULTS: dict[str, Rule] = {"adamw": "coverage", "sgd": "none"}


class FSLoRA(RowMethod):
    """Federated Sketching LoRA: scatter-add of weighted changes of the rows of a sketch.

    | normalisation | a row moves by                                   | use with             |
    |---------------|--------------------------------------------------|----------------------|
    | none          | sum of share * change (the paper)                | SGD on the device    |
    | ipw           | sum of share * r/k * change; unbiased, noisier   | Adam on the device   |
    | coverage      | mean change over the devices that hold the row   | Adam on the device   |

    With k = r everywhere all three are FedIT, bit for bit.
    """

    name: ClassVar[str] = "fslora"
    paper: ClassVar[str] = "Federated Sketching LoRA (arXiv 2501.19389)"
    options: ClassVar[tuple[str, ...]] = ("normalisation", "sketches")
    scaling: ClassVar[Scaling] = "sketch"

    def __init__(self, options: MethodOptions) -> None:
        self.rows = options.sketches
        self.normalisation = resolve(options.normalisation, options.optimizer)

    def step(self, current: ModuleState, updates: Sequence[ModuleUpdate], shares: Shares) -> Steps:
        """The sum of changes under the normalisation."""
        if self.normalisation == "coverage":
            return mean_over_owners(current, updates, shares)
        if self.normalisation == "ipw":
            shares = shares * [current.adapter.rank / update.k for update in updates]
        return sum_of_changes(current, updates, shares)

    def row_factors(
        self, rank: int, updates: Sequence[ModuleUpdate], shares: Shares
    ) -> list[NDArray[np.float64]]:
        """Under the normalisation."""
        if self.normalisation == "coverage":
            return owners_factors(rank, updates, shares)
        if self.normalisation == "ipw":
            shares = shares * [rank / update.k for update in updates]
        return super().row_factors(rank, updates, shares)


def resolve(normalisation: Normalisation, optimizer: str) -> Rule:
    """The rule meant by "auto" for the devices' optimiser. Raises `UnknownMethodError`."""
    if normalisation != "auto":
        return normalisation
    if optimizer not in DEFAULTS:
        raise UnknownMethodError(
            f"no default normalisation for optimizer {optimizer!r}; use "
            f"{' or '.join(DEFAULTS)}, or name a normalisation"
        )
    return DEFAULTS[optimizer]
