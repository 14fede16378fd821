"""FSLoRA: every device trains a sketch of the global adapter; its rows are added back in place.

Knows how rows that were drawn unevenly are put right; does not know how they were drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from coordinator.lowrank import Bundle, Matrix64
from coordinator.methods.base import Method, ModuleUpdate, UnknownMethodError, left_sum

Normalisation = Literal["none", "ipw", "coverage"]

# The r/k in a sketch's gradient makes up for a row being drawn with probability k/r. SGD keeps
# that factor in its step; Adam divides it out again, so there rows are averaged over their owners.
DEFAULTS: dict[str, Normalisation] = {"adamw": "coverage", "sgd": "none"}


class FSLoRA(Method):
    """Federated Sketching LoRA (arXiv 2501.19389): scatter-add of weighted deltas.

    | normalisation | a row moves by                                   | use with             |
    |---------------|--------------------------------------------------|----------------------|
    | none          | sum of share * delta (the paper)                 | SGD on the device    |
    | ipw           | sum of share * r/k * delta; unbiased, noisier    | Adam on the device   |
    | coverage      | mean of delta over the devices that own the row  | Adam on the device   |

    With k = r everywhere all three are FedIT, bit for bit.
    """

    name: ClassVar[str] = "fslora"
    heterogeneous: ClassVar[bool] = True

    def __init__(self, normalisation: Normalisation) -> None:
        self.normalisation = normalisation

    def step(
        self, current: Bundle, updates: Sequence[ModuleUpdate], shares: NDArray[np.float64]
    ) -> tuple[Matrix64, Matrix64]:
        """What to add to up (r, m) and down (r, n)."""
        rank = current.rank
        up, down = np.zeros(current.up.shape), np.zeros(current.down.shape)
        cover = np.zeros(rank)  # share of the fleet that owns each row
        for update, share in zip(updates, shares, strict=True):
            factor = share * (rank / update.k) if self.normalisation == "ipw" else share
            up[update.rows] += factor * update.delta.up.astype(np.float64)
            down[update.rows] += factor * update.delta.down.astype(np.float64)
            cover[update.rows] += share
        if self.normalisation == "coverage":
            # Shares need not add to exactly 1. Against their sum in the same order, a row that
            # everybody owns has ratio exactly 1 and keeps its bits.
            ratio = np.where(cover > 0, cover, 1.0) / left_sum(shares)
            ratio[cover == 0] = 1.0
            up /= ratio[:, None]
            down /= ratio[:, None]
        return up, down


def resolve(normalisation: str, optimizer: str) -> Normalisation:
    """The normalisation meant by "auto" for the devices' optimiser. Raises `UnknownMethodError`."""
    if normalisation == "auto":
        if optimizer not in DEFAULTS:
            raise UnknownMethodError(
                f"no default normalisation for optimizer {optimizer!r}; use "
                f"{' or '.join(DEFAULTS)}, or name a normalisation"
            )
        return DEFAULTS[optimizer]
    for known in get_args(Normalisation):
        if normalisation == known:
            return known  # type: ignore[no-any-return]
    raise UnknownMethodError(
        f"normalisation {normalisation!r} does not exist; choose auto, "
        f"{', '.join(get_args(Normalisation))}"
    )
