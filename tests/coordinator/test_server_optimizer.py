"""Server optimisers step as their papers and torch say."""

import math

import numpy as np
import pytest
import torch

from coordinator.server_optimizer import Plain, ServerOptimizerError, make_optimizer

SHAPE, ROUNDS = (3, 5), 25
NAMES = ["plain", "momentum", "adam"]
every_optimizer = pytest.mark.parametrize("name", NAMES)


def make(name, learning_rate=0.1, beta1=0.9, beta2=0.99, tau=1e-3):
    return make_optimizer(name, learning_rate=learning_rate, beta1=beta1, beta2=beta2, tau=tau)


def proposals(seed=0, rounds=ROUNDS):
    return list(np.random.default_rng(seed).normal(size=(rounds, *SHAPE)))


def walk(optimizer, proposed):
    """Where a tensor stands after each round, starting at zero."""
    at, kept, track = np.zeros(SHAPE), {}, []
    for one in proposed:
        step, kept = optimizer.step(one, kept)
        at = at + step
        track.append(at)
    return track


# --- against others -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "beta"), [("plain", 0.0), ("momentum", 0.9), ("momentum", 0.0)])
def test_plain_and_momentum_are_sgd_on_the_negative_step(name, beta):
    weights = torch.zeros(SHAPE, dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([weights], lr=0.3, momentum=beta)
    ours = walk(make(name, 0.3, beta), proposals())
    for one, at in zip(proposals(), ours, strict=True):
        weights.grad = -torch.from_numpy(one)
        sgd.step()
        np.testing.assert_allclose(at, weights.detach().numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.99), (0.0, 0.999), (0.5, 0.0)])
def test_adam_is_what_the_paper_writes_entry_by_entry(beta1, beta2):
    proposed = proposals(1)
    ours = walk(make("adam", 0.02, beta1, beta2, 1e-2), proposed)
    for i in np.ndindex(SHAPE):
        at = m = v = 0.0
        for one, track in zip(proposed, ours, strict=True):
            p = float(one[i])
            m = beta1 * m + (1 - beta1) * p
            v = beta2 * v + (1 - beta2) * p * p
            at += 0.02 * m / (math.sqrt(v) + 1e-2)
            assert track[i] == pytest.approx(at, rel=1e-5, abs=1e-7)


def test_adam_settles_at_the_learning_rate_while_steps_agree():
    kept = {}
    for _ in range(2000):
        step, kept = make("adam", 0.01, tau=1e-9).step(np.full(SHAPE, -3.0), kept)
    np.testing.assert_allclose(step, -0.01, rtol=1e-5)


# --- what each promises -------------------------------------------------------------------------


def test_plain_at_rate_one_is_the_method_itself():
    (proposed,) = proposals(rounds=1)
    step, kept = Plain().step(proposed, {})
    assert step is proposed
    assert kept == {}
    assert make("plain", 1.0).step(proposed, {})[0] is proposed


def test_plain_scales_by_the_learning_rate():
    (proposed,) = proposals(rounds=1)
    np.testing.assert_array_equal(make("plain", 0.5).step(proposed, {})[0], 0.5 * proposed)


@every_optimizer
def test_the_first_step_goes_the_way_of_the_proposal(name):
    (proposed,) = proposals(rounds=1)
    np.testing.assert_array_equal(np.sign(make(name).step(proposed, {})[0]), np.sign(proposed))


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_a_round_that_proposes_nothing_coasts(name):
    (proposed,) = proposals(rounds=1)
    first, kept = make(name).step(proposed, {})
    second, kept_then = make(name).step(np.zeros(SHAPE), kept)
    ratio = 0.9 if name == "momentum" else None
    np.testing.assert_array_equal(np.sign(second), np.sign(proposed))
    assert (np.abs(second) < np.abs(first)).all()
    if ratio:
        np.testing.assert_allclose(second, ratio * first, rtol=1e-6)
    np.testing.assert_allclose(kept_then["first"], 0.9 * kept["first"], rtol=1e-6)


@every_optimizer
def test_nothing_proposed_and_nothing_kept_moves_nothing(name):
    step, _ = make(name).step(np.zeros(SHAPE), {})
    assert not step.any()


@every_optimizer
def test_missing_moments_are_zeros(name):
    (proposed,) = proposals(rounds=1)
    optimizer = make(name)
    zeros = {moment: np.zeros(SHAPE, np.float32) for moment in optimizer.moments}
    for kept in ({}, dict(list(zeros.items())[:1])):
        step, after = optimizer.step(proposed, kept)
        expected, expected_after = optimizer.step(proposed, zeros)
        np.testing.assert_array_equal(step, expected)
        assert all(np.array_equal(after[m], expected_after[m]) for m in optimizer.moments)


@every_optimizer
def test_what_is_kept_is_what_is_declared(name):
    optimizer = make(name)
    step, kept = optimizer.step(proposals(rounds=1)[0], {})
    assert optimizer.name == name
    assert set(kept) == set(optimizer.moments)
    assert step.dtype == np.float64 and step.shape == SHAPE
    assert all(value.dtype == np.float32 and value.shape == SHAPE for value in kept.values())


@every_optimizer
def test_the_same_rounds_give_the_same_bits_and_inputs_stay(name):
    proposed = proposals()
    first = walk(make(name), proposed)
    again = walk(make(name), proposals())
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, again, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(proposed, proposals(), strict=True))
    optimizer = make(name)
    _, kept = optimizer.step(proposed[0], {})
    before = {moment: value.copy() for moment, value in kept.items()}
    optimizer.step(proposed[1], kept)
    assert all(np.array_equal(kept[moment], before[moment]) for moment in before)


# --- what is refused ----------------------------------------------------------------------------


def test_an_unknown_optimizer_is_refused_with_the_choices():
    with pytest.raises(ServerOptimizerError, match=r"'sgd'.*plain.*momentum.*adam"):
        make("sgd")


@every_optimizer
@pytest.mark.parametrize("wrong", [
    {"learning_rate": 0.0}, {"learning_rate": -1.0}, {"learning_rate": math.nan},
    {"learning_rate": math.inf}, {"beta1": 1.0}, {"beta1": -0.1}, {"beta1": math.nan},
    {"beta2": 1.0}, {"beta2": -0.1}, {"tau": 0.0}, {"tau": math.inf},
])  # fmt: skip
def test_values_out_of_range_are_refused(name, wrong):
    with pytest.raises(ServerOptimizerError, match=next(iter(wrong)).replace("_", " ")):
        make(name, **wrong)
