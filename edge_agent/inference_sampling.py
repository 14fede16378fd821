"""Which token comes next: the most likely, or one drawn from the nucleus."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_agent.inference_folder import InferenceError

LIKELIEST = 512  # looked at before all are sorted


class Sampler:
    """Draws for one request; its stream of random numbers is nobody else's."""

    def __init__(self, temperature: float, top_p: float, seed: int | None) -> None:
        """Greedy at temperature 0; seed None draws one. Raises `InferenceError`."""
        if not 0 <= temperature < float("inf"):
            raise InferenceError(f"a temperature of {temperature} cannot be used; give 0 or more")
        if not 0 < top_p <= 1:
            raise InferenceError(f"top_p of {top_p} cannot be used; give a share in (0, 1]")
        if seed is not None and seed < 0:
            raise InferenceError(f"a seed of {seed} cannot be used; give 0 or more")
        self._temperature, self._top_p = temperature, top_p
        self._draw = np.random.default_rng(seed)

    def pick(self, logits: NDArray[np.float32]) -> int:
        """A token of logits (vocabulary,).

        Nucleus sampling, arXiv 1904.09751: the smallest set of the likeliest tokens that has
        `top_p` of the probability.
        """
        if self._temperature == 0:
            return int(logits.argmax())
        raised = (logits - logits.max()).astype(np.float64) / self._temperature
        chances = np.exp(raised)
        chances /= chances.sum()
        if self._top_p == 1:
            order: NDArray[np.intp] | None = None
            ordered = chances
        else:
            order = self._nucleus(chances)
            ordered = chances[order]
        up_to = ordered.cumsum()
        drawn = int(np.searchsorted(up_to, self._draw.random() * up_to[-1], side="right"))
        drawn = min(drawn, len(ordered) - 1)  # rounding
        return drawn if order is None else int(order[drawn])

    def _nucleus(self, chances: NDArray[np.float64]) -> NDArray[np.intp]:
        """The tokens of the nucleus, likeliest first."""
        some = min(LIKELIEST, len(chances))
        likely = np.argpartition(chances, -some)[-some:]
        if chances[likely].sum() < self._top_p:
            likely = np.arange(len(chances))
        order = likely[np.argsort(-chances[likely], kind="stable")]
        before = chances[order].cumsum() - chances[order]
        return order[before <= self._top_p]
