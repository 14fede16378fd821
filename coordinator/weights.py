"""Whose update counts how much: what devices reported becomes the weights of a merge.

Usable with any method, since a method only sees weights. Knows losses and sizes; it knows neither
updates nor rounds. What a rule must remember is handed in and out. An update without examples
weighs nothing. Sums are exact, so that the order given changes no bit of a weight.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from profiles.errors import SketchfleetError

SMALLEST_LOSS = 1e-10  # keeps powers of a loss of zero defined
LARGEST_LOSS, LARGEST_OPTION = 1e12, 1e9  # what devices claim is cut, so that nothing overflows
Weighed = tuple[list[float], dict[str, float]]


class WeightRuleError(SketchfleetError):
    """No such rule, or a setting out of its range."""


@dataclass(frozen=True)
class Voice:
    """One update in a round. A device with a late and a fresh one has two.

    examples: training sequences, discounted when late; loss: of the model as received, on its own
    held-out code, nats per token; None if not measured.
    """

    device_id: str
    examples: float
    loss: float | None


@dataclass(frozen=True)
class WeightOptions:
    """The keys of [fairness] that rules take."""

    q: float = 1.0
    t: float = 1.0
    step: float = 0.1


@dataclass(frozen=True)
class WeightRule(ABC):
    """Weights are non-negative and of any scale: merges normalise them."""

    name: ClassVar[str]
    options: WeightOptions

    @abstractmethod
    def weigh(self, voices: Sequence[Voice], memory: Mapping[str, float]) -> Weighed:
        """(weights in the order of `voices`, what to remember, by device id).

        A missing or non-finite loss counts as the mean of the others, weighted by examples.
        """


class Uniform(WeightRule):
    """1 for every update with examples: late ones too, so that a device may count twice."""

    name = "uniform"

    def weigh(self, voices: Sequence[Voice], memory: Mapping[str, float]) -> Weighed:
        """Ones."""
        return [float(v.examples > 0) for v in voices], {}


class Samples(WeightRule):
    """FedAvg: by training sequences. The rules below multiply them by exp(exponent of the loss)."""

    name = "samples"

    def weigh(self, voices: Sequence[Voice], memory: Mapping[str, float]) -> Weighed:
        """The highest exponent is subtracted, so that none overflows. No losses: by samples."""
        of = {i: self._exponent(loss) for i, loss in _losses(voices).items()}
        top = max(of.values(), default=0.0)
        return [v.examples * math.exp(of.get(i, top) - top) for i, v in enumerate(voices)], {}

    def _exponent(self, loss: float) -> float:
        return 0.0


class QFFL(Samples):
    """q-FFL (arXiv 1905.10497): examples * (loss + 1e-10)^q; a negative loss counts as 0.

    This is its direction. Its step length, by the normalisation h_i, presumes that devices take
    plain SGD steps, and is left to the server's learning rate.
    """

    name = "q-ffl"

    def _exponent(self, loss: float) -> float:
        return self.options.q * math.log(max(loss, 0.0) + SMALLEST_LOSS)


class TERM(Samples):
    """TERM (arXiv 2007.01162): examples * exp(t * loss); t < 0 plays down outliers."""

    name = "term"

    def _exponent(self, loss: float) -> float:
        return self.options.t * loss


class AFL(WeightRule):
    """AFL (arXiv 1902.00146): weights lambda <- project(lambda + step * loss) on the simplex.

    Lambda is kept for every device ever seen; a new one enters with the mean of the others. Two
    updates of a device share its lambda and make its loss, both by examples. In the paper all take
    part; here an absent device is taken to have the participants' mean, a step that the projection
    cancels: it would else lose weight to whoever is there, however low their loss.
    """

    name = "afl"

    def weigh(self, voices: Sequence[Voice], memory: Mapping[str, float]) -> Weighed:
        """By samples where nobody has a loss, or all weight lies with absent devices."""
        examples = [float(v.examples) for v in voices]
        if not (losses := _losses(voices)):
            return examples, dict(memory)
        own: dict[str, list[tuple[float, float]]] = {}
        for i, value in losses.items():
            own.setdefault(voices[i].device_id, []).append((examples[i], value))
        loss = {device: _mean(pairs) for device, pairs in own.items()}
        given = {device: math.fsum(e for e, _ in pairs) for device, pairs in own.items()}
        middle = math.fsum(loss.values()) / len(loss)
        entering = math.fsum(memory.values()) / len(memory) if memory else 1.0
        start = {name: memory.get(name, entering) for name in sorted(memory.keys() | own.keys())}
        whole = math.fsum(start.values())
        step = self.options.step
        moved = [lam / whole + step * loss.get(name, middle) for name, lam in start.items()]
        after = dict(zip(start, project_to_simplex(moved).tolist(), strict=True))
        weights = [after[v.device_id] * (v.examples / given[v.device_id]) if i in losses else 0.0
                   for i, v in enumerate(voices)]  # fmt: skip
        return (weights if any(weights) else examples), after


RULES: dict[str, Callable[[WeightOptions], WeightRule]] = {
    rule.name: rule for rule in (Samples, Uniform, QFFL, AFL, TERM)
}


def make_rule(name: str, options: WeightOptions = WeightOptions()) -> WeightRule:
    """The rule of that name. Raises `WeightRuleError`."""
    if name not in RULES:
        raise WeightRuleError(f"weights {name!r} do not exist; choose {', '.join(RULES)}")
    q, t, step = options.q, options.t, options.step
    if not (0 <= q <= LARGEST_OPTION and abs(t) <= LARGEST_OPTION and 0 < step <= LARGEST_OPTION):
        raise WeightRuleError(f"q {q}, t {t}, step {step}: give q >= 0, step > 0, none above 1e9")
    return RULES[name](options)


def project_to_simplex(values: ArrayLike) -> NDArray[np.float64]:
    """The nearest (n,) >= 0 that sums to 1 (Duchi et al., 2008). Raises `WeightRuleError`."""
    v = np.asarray(values, dtype=np.float64)
    if v.ndim != 1 or not v.size or not np.isfinite(v).all():
        raise WeightRuleError(f"shape {v.shape} cannot be projected; give a row of finite values")
    v = v - v.max()  # moves no projection; what stays positive then lies within 1 of zero
    ordered = np.sort(v)[::-1]
    excess = (np.cumsum(ordered) - 1) / np.arange(1, v.size + 1)
    nearest: NDArray[np.float64] = v - excess[np.flatnonzero(ordered > excess)[-1]]
    return nearest.clip(min=0.0)


def _losses(voices: Sequence[Voice]) -> dict[int, float]:
    """Loss of each voice with examples, by place; the mean if missing. {} if nobody has one."""
    known = {
        i: min(max(v.loss, -LARGEST_LOSS), LARGEST_LOSS)
        for i, v in enumerate(voices)
        if v.examples > 0 and v.loss is not None and math.isfinite(v.loss)
    }
    mean = _mean([(voices[i].examples, loss) for i, loss in known.items()])
    return {i: known.get(i, mean) for i, v in enumerate(voices) if known and v.examples > 0}


def _mean(pairs: Sequence[tuple[float, float]]) -> float:
    """Mean loss of (examples, loss)."""
    total = math.fsum(e for e, _ in pairs)
    return math.fsum(e / total * loss for e, loss in pairs)
