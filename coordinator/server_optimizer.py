"""FedOpt (Reddi et al., arXiv 2003.00295): how the step that a method proposes is taken.

Works on one tensor at a time. Knows neither methods nor files: moments come in and go out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from profiles.errors import SketchfleetError

Step = NDArray[np.floating[Any]]
Moments = dict[str, NDArray[np.float32]]


ADAM_RATE = 1e-2  # its steps are about this long, whatever the size of the change


class ServerOptimizerError(SketchfleetError):
    """No such optimiser, or a setting out of its range."""


class ServerOptimizer(ABC):
    """`moments` names the arrays that are kept for each tensor, in its shape."""

    name: ClassVar[str]
    moments: ClassVar[tuple[str, ...]] = ()

    def __init__(self, learning_rate: float = 1.0) -> None:
        self.learning_rate = learning_rate

    @abstractmethod
    def step(self, proposed: Step, kept: Mapping[str, NDArray[np.float32]]) -> tuple[Step, Moments]:
        """(what to add, new moments). `proposed` is what the method would add; none kept: zeros."""


class Plain(ServerOptimizer):
    """The step itself, times the learning rate."""

    name = "plain"

    def step(self, proposed: Step, kept: Mapping[str, NDArray[np.float32]]) -> tuple[Step, Moments]:
        """With learning rate 1 the very same array."""
        return (proposed if self.learning_rate == 1 else self.learning_rate * proposed), {}


class Momentum(ServerOptimizer):
    """FedAvgM: v <- beta1 v + step; add learning_rate * v."""

    name = "momentum"
    moments: ClassVar[tuple[str, ...]] = ("first",)

    def __init__(self, learning_rate: float = 1.0, beta1: float = 0.9) -> None:
        super().__init__(learning_rate)
        self.beta1 = beta1

    def step(self, proposed: Step, kept: Mapping[str, NDArray[np.float32]]) -> tuple[Step, Moments]:
        """Coasts on when nothing is proposed."""
        first = proposed + self.beta1 * _kept(kept, "first", proposed)
        return self.learning_rate * first, {"first": first.astype(np.float32)}


class Adam(ServerOptimizer):
    """FedAdam, without bias correction as in the paper: add learning_rate * m / (sqrt v + tau)."""

    name = "adam"
    moments: ClassVar[tuple[str, ...]] = ("first", "second")

    def __init__(
        self,
        learning_rate: float = ADAM_RATE,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
    ) -> None:
        super().__init__(learning_rate)
        self.beta1, self.beta2, self.tau = beta1, beta2, tau

    def step(self, proposed: Step, kept: Mapping[str, NDArray[np.float32]]) -> tuple[Step, Moments]:
        """Every entry moves by about the learning rate while its steps agree."""
        first = self.beta1 * _kept(kept, "first", proposed) + (1 - self.beta1) * proposed
        second = self.beta2 * _kept(kept, "second", proposed)
        second = second + (1 - self.beta2) * np.square(proposed)
        taken = self.learning_rate * first / (np.sqrt(second) + self.tau)
        new = {"first": first.astype(np.float32), "second": second.astype(np.float32)}
        return taken, new


def make_optimizer(
    name: str,
    *,
    learning_rate: float | None = None,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> ServerOptimizer:
    """The optimiser of that name; learning rate 1 unless given, Adam's `ADAM_RATE`.

    Raises `ServerOptimizerError`.
    """
    if learning_rate is None:
        learning_rate = ADAM_RATE if name == "adam" else 1.0
    numbers = (learning_rate, beta1, beta2, tau)
    sound = all(map(math.isfinite, numbers)) and learning_rate > 0 and tau > 0
    if not sound or not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ServerOptimizerError(
            f"learning rate {learning_rate}, beta1 {beta1}, beta2 {beta2}, tau {tau}: rate and tau "
            "must be positive, both betas in [0, 1)"
        )
    match name:
        case "plain":
            return Plain(learning_rate)
        case "momentum":
            return Momentum(learning_rate, beta1)
        case "adam":
            return Adam(learning_rate, beta1, beta2, tau)
    raise ServerOptimizerError(f"server optimiser {name!r} is not plain, momentum or adam")


def _kept(kept: Mapping[str, NDArray[np.float32]], name: str, like: Step) -> Step:
    found = kept.get(name)
    return np.zeros_like(like) if found is None else found.astype(np.float64)
