"""Weight rules give what their papers say, and survive what devices may report."""

import itertools
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.weights import (
    RULES,
    Voice,
    WeightOptions,
    WeightRuleError,
    make_rule,
    project_to_simplex,
)

every_rule = pytest.mark.parametrize("name", RULES)
loss_rules = pytest.mark.parametrize("name", ["q-ffl", "afl", "term"])
without_memory = pytest.mark.parametrize("name", ["samples", "uniform", "q-ffl", "term"])

reported = st.none() | st.floats(0, 20) | st.sampled_from([math.nan, math.inf, -math.inf, 1e4])
voices = st.lists(
    st.builds(Voice, st.sampled_from("abcdef"), st.floats(0, 1e4), reported), min_size=1, max_size=8
)


def rule(name, **options):
    return make_rule(name, WeightOptions(**options))


def weigh(name, *said, memory=None, **options):
    """Weights of (device, examples, loss), and the memory."""
    return rule(name, **options).weigh([Voice(*one) for one in said], memory or {})


def shares(weights):
    return [w / math.fsum(weights) for w in weights]


# --- every rule ---------------------------------------------------------------------------------


@every_rule
@given(said=voices, seed=st.integers(0, 99))
def test_order_changes_no_bit_of_any_weight(name, said, seed):
    memory = {"a": 0.25, "b": 0.5, "z": 0.25} if name == "afl" else {}
    order = list(range(len(said)))
    random.Random(seed).shuffle(order)
    weights, after = rule(name).weigh(said, memory)
    shuffled, after_too = rule(name).weigh([said[i] for i in order], memory)
    assert shuffled == [weights[i] for i in order]
    assert after == after_too


@every_rule
@given(said=voices)
def test_weights_are_usable_whatever_is_reported(name, said):
    weights, memory = rule(name).weigh(said, {})
    assert len(weights) == len(said)
    assert all(type(w) is float and math.isfinite(w) and w >= 0 for w in weights)
    assert any(weights) == any(voice.examples > 0 for voice in said)
    assert all(w == 0 for w, voice in zip(weights, said, strict=True) if voice.examples == 0)
    assert json.loads(json.dumps(memory)) == memory


@every_rule
@pytest.mark.parametrize("options", [
    {"q": 1e9, "t": 1e9, "step": 1e9}, {"q": 0.5, "t": -1e9, "step": 1e-300},
])  # fmt: skip
def test_wild_reports_and_options_leave_somebody_a_weight(name, options):
    said = [("a", 1.0, 1e308), ("b", 1.0, -1e308), ("c", 0.0, 1e308), ("d", 3.0, 0.0)]
    with np.errstate(all="raise", under="ignore"):
        weights, _ = weigh(name, *said, **options)
    assert all(math.isfinite(w) and w >= 0 for w in weights) and any(weights)


@every_rule
def test_one_update_gets_everything(name):
    (weight,), _ = weigh(name, ("a", 5.0, 2.0))
    assert weight > 0


@every_rule
def test_nobody_gives_no_weights(name):
    assert rule(name).weigh([], {})[0] == []


@every_rule
def test_inputs_are_left_alone(name):
    memory = {"a": 0.5, "b": 0.5}
    weigh(name, ("a", 1.0, 1.0), ("c", 1.0, 2.0), memory=memory)
    assert memory == {"a": 0.5, "b": 0.5}


@without_memory
def test_rules_without_memory_keep_none(name):
    assert weigh(name, ("a", 1.0, 1.0), memory={"a": 1.0})[1] == {}


# --- losses that are not there ------------------------------------------------------------------


@loss_rules
@pytest.mark.parametrize("lost", [None, math.nan, math.inf, -math.inf])
def test_a_missing_loss_counts_as_the_weighted_mean_of_the_others(name, lost):
    found = weigh(name, ("a", 1.0, 1.0), ("b", 3.0, 5.0), ("c", 2.0, lost))
    assert found == weigh(name, ("a", 1.0, 1.0), ("b", 3.0, 5.0), ("c", 2.0, 4.0))


@loss_rules
@pytest.mark.parametrize("lost", [None, math.nan])
def test_without_any_loss_examples_decide(name, lost):
    memory = {"a": 0.9, "b": 0.1} if name == "afl" else {}
    weights, after = weigh(name, ("a", 1.0, lost), ("b", 3.0, lost), memory=memory)
    assert (weights, after) == ([1.0, 3.0], memory)


@loss_rules
def test_the_loss_of_an_update_without_examples_moves_nobody(name):
    said = [("a", 1.0, 1.0), ("b", 3.0, 2.0)]
    weights, memory = weigh(name, *said, ("c", 0.0, 1e4))
    assert (weights[:2], memory) == weigh(name, *said)


# --- samples, uniform, q-FFL, TERM --------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [
    ("samples", {}), ("q-ffl", {"q": 0.0}), ("term", {"t": 0.0}),
])  # fmt: skip
@given(said=voices)
def test_without_tilt_examples_decide(name, options, said):
    assert rule(name, **options).weigh(said, {})[0] == [voice.examples for voice in said]


@pytest.mark.parametrize("t", [1e-9, -1e-9])
def test_term_approaches_samples_as_t_vanishes(t):
    weights, _ = weigh("term", ("a", 1.0, 1.0), ("b", 3.0, 5.0), t=t)
    assert shares(weights) == pytest.approx([0.25, 0.75], rel=1e-7)


@pytest.mark.parametrize("name", ["q-ffl", "term"])
@given(loss=st.floats(0, 1e4))
def test_equal_losses_give_samples(name, loss):
    assert weigh(name, ("a", 1.0, loss), ("b", 3.0, loss))[0] == [1.0, 3.0]


def test_uniform_counts_updates():
    said = [("a", 1.0, 1.0), ("b", 9.0, None), ("b", 4.0, 2.0), ("c", 0.0, 1.0)]
    assert weigh("uniform", *said)[0] == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("q", [0.1, 1.0, 2.5])
def test_q_ffl_weighs_by_powers_of_the_loss(q):
    weights, _ = weigh("q-ffl", ("a", 2.0, 0.5), ("b", 1.0, 3.0), q=q)
    expected = [2.0 * 0.5**q, 3.0**q]
    assert shares(weights) == pytest.approx(shares(expected), rel=1e-8)


def test_q_ffl_with_no_loss_left_is_by_samples():
    assert weigh("q-ffl", ("a", 2.0, 0.0), ("b", 1.0, 0.0), q=2.0)[0] == [2.0, 1.0]


@pytest.mark.parametrize("t", [-2.0, -0.1, 0.1, 2.0])
def test_term_weighs_by_exponentials_of_the_loss(t):
    weights, _ = weigh("term", ("a", 2.0, 0.5), ("b", 1.0, 3.0), ("c", 4.0, 1.0), t=t)
    expected = [2 * math.exp(0.5 * t), math.exp(3 * t), 4 * math.exp(t)]
    assert shares(weights) == pytest.approx(shares(expected), rel=1e-12)


@pytest.mark.parametrize(("t", "chosen"), [(1.0, "high"), (-1.0, "low")])
def test_term_is_stable_at_huge_losses(t, chosen):
    weights, _ = weigh("term", ("low", 1.0, 1e4 - 50), ("high", 1.0, 1e4), t=t)
    assert sorted(weights)[-1] == 1.0
    assert weights.index(1.0) == ["low", "high"].index(chosen)
    assert min(weights) == pytest.approx(math.exp(-50), rel=1e-9)


# --- AFL ----------------------------------------------------------------------------------------


def test_afl_steps_up_the_losses_and_projects():
    memory = {"a": 0.2, "b": 0.3, "c": 0.5}
    losses = {"a": 4.0, "b": 1.0, "c": 2.0}
    said = [(device, 7.0, loss) for device, loss in losses.items()]
    weights, after = weigh("afl", *said, memory=memory, step=0.05)
    expected = project_to_simplex([memory[d] + 0.05 * losses[d] for d in "abc"])
    assert weights == pytest.approx(expected.tolist(), abs=1e-12)
    assert [after[d] for d in "abc"] == weights


@given(seed=st.integers(0, 10_000), step=st.sampled_from([0.01, 0.1, 1.0, 10.0]))
def test_afl_stays_on_the_simplex_while_participants_change(seed, step):
    rng = random.Random(seed)
    memory, seen = {}, set()
    for _ in range(40):
        here = rng.sample("abcdefgh", rng.randint(1, 8))
        seen |= set(here)
        said = [(device, 1.0, rng.choice([None, rng.expovariate(0.3)])) for device in here]
        heard = any(loss is not None for _, _, loss in said)
        weights, after = weigh("afl", *said, memory=memory, step=step)
        assert any(weights)
        if heard:
            assert seen >= set(after) >= set(here)
        else:
            assert after == memory
        memory = after
        if memory:
            assert math.fsum(memory.values()) == pytest.approx(1, abs=1e-12)
            assert min(memory.values()) >= 0


def test_afl_moves_weight_to_the_worst_device_though_it_is_seldom_there():
    memory = {}
    for round_ in range(60):
        here = ["a", "b", "worst"] if round_ % 3 == 0 else ["a", "b"]
        said = [(device, 1.0, 3.0 if device == "worst" else 1.0) for device in here]
        _, memory = weigh("afl", *said, memory=memory, step=0.1)
    assert memory == pytest.approx({"a": 0.0, "b": 0.0, "worst": 1.0}, abs=1e-9)


def test_afl_keeps_lambda_where_losses_are_equal():
    memory = {"a": 0.1, "b": 0.2, "c": 0.7}
    for here in ("a", "ab", "bc", "abc"):
        weights, after = weigh("afl", *((d, 9.0, 4.0) for d in here), memory=memory)
        assert after == pytest.approx(memory, abs=1e-12)
        assert weights == pytest.approx([memory[d] for d in here], abs=1e-12)


def test_afl_being_away_neither_gains_nor_costs():
    _, after = weigh(
        "afl", ("a", 1.0, 2.0), ("b", 1.0, 1.0), memory={"a": 0.3, "b": 0.3, "c": 0.4}, step=0.1
    )
    assert after == pytest.approx({"a": 0.35, "b": 0.25, "c": 0.4}, abs=1e-12)


def test_afl_newcomers_enter_at_the_mean():
    _, first = weigh("afl", ("a", 1.0, 2.0), ("b", 8.0, 2.0))
    assert first == pytest.approx({"a": 0.5, "b": 0.5}, abs=1e-12)
    _, then = weigh("afl", ("c", 1.0, 2.0), ("d", 5.0, 2.0), memory={"a": 0.9, "b": 0.1})
    assert then == pytest.approx({"a": 0.45, "b": 0.05, "c": 0.25, "d": 0.25}, abs=1e-12)


def test_afl_two_updates_of_a_device_share_its_lambda():
    memory = {"a": 0.4, "b": 0.6}
    once, after = weigh("afl", ("a", 4.0, 2.5), ("b", 1.0, 1.0), memory=memory)
    said = [("a", 1.0, 4.0), ("b", 1.0, 1.0), ("a", 3.0, 2.0)]  # a: the weighted mean is 2.5
    twice, after_too = weigh("afl", *said, memory=memory)
    assert after_too == pytest.approx(after, abs=1e-12)
    assert twice == pytest.approx([once[0] / 4, once[1], once[0] * 3 / 4], abs=1e-12)


def test_afl_without_weight_among_participants_is_by_samples():
    memory = {"a": 0.0, "b": 0.0, "c": 1.0}
    weights, after = weigh("afl", ("a", 2.0, 1.0), ("b", 5.0, 1.0), memory=memory)
    assert weights == [2.0, 5.0]
    assert after == pytest.approx(memory, abs=1e-12)


def test_afl_a_device_without_weight_can_win_it_back():
    _, after = weigh("afl", ("a", 1.0, 5.0), ("c", 1.0, 1.0), memory={"a": 0.0, "c": 1.0})
    assert after["a"] == pytest.approx(0.2)


# --- the projection -----------------------------------------------------------------------------


def nearest_by_trial(values):
    """The projection, by solving for every set of positive entries."""
    best, least = None, math.inf
    for size in range(1, len(values) + 1):
        for kept in itertools.combinations(range(len(values)), size):
            point = np.zeros(len(values))
            chosen = list(kept)
            point[chosen] = values[chosen] - (values[chosen].sum() - 1) / size
            distance = float(((point - values) ** 2).sum())
            if point.min() >= 0 and distance < least:
                best, least = point, distance
    return best


entries = st.lists(st.floats(-5, 5), min_size=1, max_size=6)


@given(entries)
def test_projection_is_the_nearest_point_of_the_simplex(values):
    found = project_to_simplex(values)
    assert found == pytest.approx(nearest_by_trial(np.array(values)), abs=1e-9)


@given(entries, st.floats(-1e3, 1e3))
def test_projection_is_idempotent_and_blind_to_a_common_shift(values, shift):
    once = project_to_simplex(values)
    assert once.min() >= 0 and once.sum() == pytest.approx(1, abs=1e-12)
    assert project_to_simplex(once) == pytest.approx(once, abs=1e-12)
    assert project_to_simplex(np.array(values) + shift) == pytest.approx(once, abs=1e-9)


def test_projection_keeps_its_sum_among_huge_values():
    assert project_to_simplex([1e17, 1e17, -1e17]).tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize("values", [[], [math.nan, 1.0], [math.inf], [[0.5, 0.5]], 1.0])
def test_projection_refuses_what_is_no_point(values):
    with pytest.raises(WeightRuleError, match="finite"):
        project_to_simplex(values)


# --- what is refused ----------------------------------------------------------------------------


def test_an_unknown_rule_is_refused_with_the_choices():
    with pytest.raises(WeightRuleError, match=r"'best'.*samples, uniform, q-ffl, afl, term"):
        rule("best")


@every_rule
@pytest.mark.parametrize("options", [
    {"q": -0.1}, {"q": math.nan}, {"q": math.inf}, {"t": math.nan}, {"t": -math.inf},
    {"step": 0.0}, {"step": -1.0}, {"step": math.inf}, {"step": math.nan}, {"t": 1e300},
])  # fmt: skip
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(WeightRuleError, match=next(iter(options))):
        rule(name, **options)


def test_rules_know_their_names():
    assert all(rule(name).name == name for name in RULES)
