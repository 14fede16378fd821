"""What a device minimises beside the plain loss: PropFair's utility, HetLoRA's tail, Ditto's pull.

Terms are functions of parameters and losses. It knows no batches, optimisers or rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from edge_agent.training.slice import as_rows, parameters
from protos.contract import Objective, Pruning

Term = Callable[[], Tensor]
"""A scalar with gradients that is added to the loss of a step."""


def proportionally_fair(loss: Tensor, objective: Objective) -> Tensor:
    """PropFair's -log(1 - loss / M), arXiv 2202.01666; its gradient has weight 1 / (M - loss).

    Where less than the margin e is left of M - loss, it goes on along its tangent, with weight
    1 / e: the logarithm would grow without bound and then end.
    """
    left = objective.ceiling - loss
    held = left.clamp(min=objective.margin)
    return -torch.log(held / objective.ceiling) + (held - left) / objective.margin


def kept_rows(pruning: Pruning, rank: int) -> int:
    """Rows before the tail: floor(keep * rank), at least one."""
    return max(1, math.floor(pruning.keep * rank + 1e-9))  # 0.29 * 100 is 28.999999999999996


def tail_product(model: Any, first: int) -> Tensor:
    """Sum over modules of ||up's tail|| * ||down's tail|| (Frobenius), rows from `first` on.

    HetLoRA's measure of what the tail contributes, arXiv 2401.06432. Its gradient is zero, not
    undefined, where a tail is zero.
    """
    sizes = []
    for parts in parameters(model).values():
        if "up" in parts:
            up, down = (as_rows(p, parts[p])[first:] for p in ("up", "down"))
            sizes.append(torch.linalg.vector_norm(up) * torch.linalg.vector_norm(down))
    return torch.stack(sizes).sum()


def pull(model: Any, weight: float) -> Term:
    """Ditto's weight / 2 * ||v - w||^2, arXiv 2012.04221; w is what the model holds now."""
    anchors = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]

    def term() -> Tensor:
        return weight / 2 * torch.stack([(p - w).square().sum() for p, w in anchors]).sum()

    return term
