"""Draws follow the model's probabilities within the nucleus."""

from __future__ import annotations

import numpy as np
import pytest

from edge_agent import inference_sampling
from edge_agent.inference_sampling import Sampler


def shares(temperature, top_p, chances, draws=4000):
    sampler = Sampler(temperature, top_p, 1)
    logits = np.log(np.asarray(chances, np.float32))
    return np.bincount([sampler.pick(logits) for _ in range(draws)], minlength=len(chances)) / draws


def test_tokens_come_as_often_as_they_are_likely():
    chances = np.array([0.1, 0.5, 0.05, 0.35])
    assert shares(1.0, 1.0, chances) == pytest.approx(chances, abs=0.03)
    cold = chances**2 / (chances**2).sum()
    assert shares(0.5, 1.0, chances) == pytest.approx(cold, abs=0.03)


@pytest.mark.parametrize("looked_at", [512, 1])
def test_the_nucleus_is_the_smallest_likely_set(monkeypatch, looked_at):
    monkeypatch.setattr(inference_sampling, "LIKELIEST", looked_at)
    found = shares(1.0, 0.8, [0.1, 0.5, 0.05, 0.35])
    assert found == pytest.approx([0, 0.5 / 0.85, 0, 0.35 / 0.85], abs=0.03)


def test_a_nucleus_below_the_likeliest_token_is_that_token():
    assert shares(1.0, 0.01, [0.3, 0.3001, 0.3999], draws=50)[2] == 1


def test_temperature_0_takes_the_likeliest():
    assert Sampler(0.0, 0.5, None).pick(np.array([0, 3, 1], np.float32)) == 1
