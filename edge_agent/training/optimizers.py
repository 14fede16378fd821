"""The optimisers a run may ask for, by name.

Knows torch's and bitsandbytes' classes. It knows no rounds and no files.
"""

from __future__ import annotations

from typing import Any

import torch

from profiles.errors import MissingExtraError, SketchfleetError


class OptimizerError(SketchfleetError):
    """The assignment names an optimiser that this agent does not have."""


def make_optimizer(name: str, model: Any, learning_rate: float) -> torch.optim.Optimizer:
    """A fresh optimiser over the trainable parameters: "adamw", "adamw8bit" or "sgd".

    No weight decay: it would pull every device's rows towards zero whatever its data, and the
    merge would add those pulls up. "adamw8bit" holds its moments in 8 bits, in blocks of 256,
    those of tensors below 4096 values in 32. It is never the paged one: that needs memory which
    card and processor page between them, which Jetsons and processors lack, and for an adapter's
    moments (2 bytes a parameter) there is nothing to gain elsewhere. Raises `OptimizerError` on
    another name, `MissingExtraError` without bitsandbytes.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate)
    if name == "adamw8bit":
        try:
            from bitsandbytes.optim.adamw import AdamW8bit
        except ImportError as error:
            raise MissingExtraError("bitsandbytes", "train") from error
        make: Any = AdamW8bit  # untyped
        found: torch.optim.Optimizer = make(parameters, lr=learning_rate, weight_decay=0.0)
        return found
    raise OptimizerError(
        f"optimiser {name!r} is not known; the run may ask for adamw, adamw8bit or sgd"
    )
