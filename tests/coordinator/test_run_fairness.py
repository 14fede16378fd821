"""What a report says follows from the ledger: figures, and sentences that hold both ways."""

import dataclasses

import numpy as np
import pytest

from coordinator.ledger_types import LedgerRow
from coordinator.run_fairness import run_fairness
from coordinator.run_statements import statements

PLAIN = LedgerRow(
    round=0, device_id="", board="", tier="", language="go", method="fslora", rank=4,
    global_rank=16, ratio=0.25, encoding="int8", bits_per_value=8.0, density=1.0, outcome="done",
    message="", reason="", examples=10, up_bytes=100, dense_bytes=1000, merged=True, train_s=2.0,
    push_s=1.0,
)  # fmt: skip


def row(device, round_, loss=None, *, end=False, **changes):
    """One row; the round `end` is the evaluation after the last."""
    if end:
        changes = {"evaluate_only": True, "merged": False, "up_bytes": 0, "dense_bytes": 0,
                   **changes}  # fmt: skip
    return dataclasses.replace(PLAIN, device_id=device, round=round_, loss_received=loss, **changes)


def measured(rng, device, round_, loss, examples=40, spread=0.2, hard=None, **changes):
    """A row with the losses of single examples; `hard` makes them the same ones in every round."""
    tokens = np.full(examples, 100)
    own = np.exp(rng.normal(0, spread, examples)) if hard is None else hard
    nats = loss * tokens * own / own.mean()
    changes = {"nats": tuple(nats), "tokens": tuple(tokens.tolist()), **changes}
    return row(device, round_, float(nats.sum() / tokens.sum()), **changes)


def fleet(falls, *, starts=None, seed=0, spread=0.2, **of):
    """Two rounds and an evaluation of devices whose losses fall by so much.

    of: by name of a field, a value per device.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for i, fall in enumerate(falls):
        name, start = f"d{i}", 3.0 if starts is None else starts[i]
        hard = np.exp(rng.normal(0, spread, 40))
        more = {field: values[i] for field, values in of.items()}
        rows += [
            measured(rng, name, 0, start, hard=hard, **more),
            row(name, 1, **more),
            measured(rng, name, 2, start - fall, hard=hard, end=True,
                     **{k: v for k, v in more.items() if k not in ("up_bytes", "merged")}),
        ]  # fmt: skip
    return rows


def said(rows, about, finished=True):
    return [s for s in statements(run_fairness(rows), finished) if s.about == about]


# --- figures ------------------------------------------------------------------------------------


def test_a_device_is_judged_by_what_it_received_first_and_last() -> None:
    rows = [row("a", 0, 3.0, loss_trained=2.5, update_share=0.4, alignment=0.5, joules=7.0),
            row("a", 1, loss_trained=2.2, merged=False, outcome="out_of_memory", joules=5.0),
            row("a", 2, 2.0, end=True, loss_local=2.4, train_s=None),
            row("b", 0, 2.0, rank=16, ratio=1.0), row("b", 2, 1.0, end=True)]  # fmt: skip
    a, b = run_fairness(rows).devices
    assert (a.loss_first, a.loss_last, a.gain, a.gap, b.gap) == (3.0, 2.0, 1.0, 0.5, -0.5)
    assert (a.loss_trained, a.loss_local, a.joules, b.joules) == (2.2, 2.4, 12.0, None)
    assert (a.rounds_joined, a.rounds_given, dict(a.failures)) == (1, 2, {"out_of_memory": 1})
    assert (a.up_bytes, a.dense_bytes, a.kept_share, a.seconds) == (200, 2000, 0.1, 7.0)
    assert (a.share, a.alignment, a.margin, b.ratio) == (0.2, 0.5, None, 1.0)


def test_the_local_only_adapter_is_that_of_the_last_measurement() -> None:
    (found,) = run_fairness([
        row("a", 0, 3.0), row("a", 1, 2.0, loss_local=2.5), row("a", 2, loss_local=2.2),
        row("a", 3, 1.5, loss_local=2.0, end=True),
    ]).devices  # fmt: skip
    assert (found.loss_last, found.loss_local, found.compression) == (1.5, 2.0, 10.0)


def test_the_worst_quarter_counts_the_device_at_its_edge_by_its_part() -> None:
    ends = (9.0, 8.0, 5.0, 4.0, 3.0, 2.0)
    rows = [r for i, end in enumerate(ends)
            for r in (row(f"d{i}", 0, 9.5), row(f"d{i}", 1, end, end=True))]  # fmt: skip
    found = run_fairness(rows).measure("CVaR, worst quarter")
    assert found.after == pytest.approx((9 + 8 / 2) / 1.5)  # 1.5 devices of six


def test_a_device_first_measured_at_the_end_has_no_before() -> None:
    found = run_fairness([row("a", 0), row("a", 1, 2.0, end=True), row("b", 0, 3.0)])
    a, b = found.devices
    assert (a.loss_first, a.loss_last, b.loss_first, b.loss_last) == (None, 2.0, 3.0, None)
    assert found.compared == () and found.losses == () and found.noise is None


def test_figures_have_intervals_only_where_examples_were_kept() -> None:
    rows = fleet([0.5, 0.6, 0.7])
    mean = run_fairness(rows).measure("mean")
    assert mean.after_interval.low < mean.after < mean.after_interval.high
    assert mean.change_interval.high < 0
    without = [dataclasses.replace(r, nats=(), tokens=()) for r in rows]
    mean = run_fairness(without).measure("mean")
    assert mean.after is not None and mean.after_interval is None and mean.change_interval is None


def test_other_examples_at_the_end_are_not_paired() -> None:
    rows = [r if r.round < 2 else dataclasses.replace(
                r, nats=r.nats[:-1], tokens=r.tokens[:-1],
                loss_received=sum(r.nats[:-1]) / sum(r.tokens[:-1]))
            for r in fleet([0.5, 0.6])]  # fmt: skip
    mean = run_fairness(rows).measure("mean")
    assert mean.after_interval is not None and mean.change_interval is None


def test_accuracies_have_their_worst_tenth_at_the_low_end() -> None:
    rows = [row(d, r, 1.0, accuracy_received=a + r / 10, end=r == 1)
            for d, a in (("a", 0.2), ("b", 0.5)) for r in (0, 1)]  # fmt: skip
    worst = next(m for m in run_fairness(rows).accuracies if m.name == "worst tenth")
    assert (worst.before, worst.after) == (0.2, pytest.approx(0.3))


def test_participation_counts_devices_that_gave_nothing() -> None:
    rows = [row("a", 0, update_share=1.0), row("b", 0, merged=False, up_bytes=0)]
    found = run_fairness(rows).participation
    assert found["rounds merged"].jain == pytest.approx(0.5)
    assert found["bytes sent"].least == 0
    assert found["share of the merged updates"].gini == pytest.approx(0.5)


def test_an_empty_ledger_gives_empty_figures() -> None:
    found = run_fairness([])
    assert found.devices == () and found.tiers is None and found.compression is None
    assert statements(found, False)


# --- statements ---------------------------------------------------------------------------------


def test_a_fall_beyond_noise_is_supported_and_one_within_is_left_open() -> None:
    (fell,) = said(fleet([0.5] * 4), "mean")
    assert fell.supported and "fell from 3.000 to 2.500" in fell.text
    noisy = fleet([0.01] * 4, seed=1)
    rng = np.random.default_rng(2)
    noisy = [dataclasses.replace(r, nats=tuple(n * rng.uniform(0.5, 1.5) for n in r.nats))
             for r in noisy]  # fmt: skip
    noisy = [dataclasses.replace(r, loss_received=sum(r.nats) / sum(r.tokens)) if r.nats else r
             for r in noisy]  # fmt: skip
    (unclear,) = said(noisy, "mean")
    assert not unclear.supported and "includes 0" in unclear.text


def test_a_rise_is_said_to_be_one() -> None:
    (rose,) = said(fleet([-0.5] * 4), "mean")
    assert rose.supported and "rose" in rose.text


def test_without_examples_no_change_is_supported() -> None:
    rows = [dataclasses.replace(r, nats=(), tokens=()) for r in fleet([0.5] * 4)]
    for about in ("mean", "worst"):
        (found,) = said(rows, about)
        assert not found.supported and "cannot be said" in found.text
    (nothing,) = said([row("a", 0, 1.0)], "mean")
    assert not nothing.supported and "No device was measured twice" in nothing.text


def test_devices_that_part_are_told_and_equal_ones_are_not_ranked() -> None:
    apart = fleet([1.0, 0.9, 0.1, 0.0], spread=0.05)
    assert [s.supported for s in said(apart, "spread")] == [True]
    assert "further apart" in said(apart, "spread")[0].text
    assert [s.supported for s in said(apart, "noise")] == [True]
    alike = fleet([0.5] * 6, spread=0.3)
    rng = np.random.default_rng(0)
    alike = [dataclasses.replace(r, loss_received=r.loss_received * rng.normal(1, 0.02))
             if r.nats else r for r in alike]  # fmt: skip
    (noise,) = said(alike, "noise")
    assert not noise.supported and "Do not rank" in noise.text


@pytest.mark.parametrize("planted", [True, False])
def test_compression_is_told_where_it_goes_with_the_gap_and_never_as_a_cause(planted) -> None:
    rng = np.random.default_rng(3)
    falls = np.linspace(0, 1, 10) if planted else rng.permutation(np.linspace(0, 1, 10))
    found = said(fleet(falls, up_bytes=list(range(50, 250, 20))), "compression")
    assert found[0].supported is planted
    assert "fared worse" in found[0].text if planted else "includes 0" in found[0].text
    assert "no cause" in found[0].text or not planted
    assert not found[-1].supported and "in general" in found[-1].text


def test_four_devices_and_equal_ratios_say_nothing_of_compression() -> None:
    few = said(fleet([0, 0.2, 0.4, 0.6], up_bytes=[10, 20, 30, 40]), "compression")
    assert not any(s.supported for s in few) and "4 devices and one run" in few[-1].text
    (alike,) = said(fleet([0, 0.2, 0.4, 0.6]), "compression")
    assert "all devices sent alike" in alike.text


def test_what_taking_part_was_worth_needs_a_local_only_adapter() -> None:
    (open_,) = said(fleet([0.5] * 3), "alone")
    assert not open_.supported and "nobody can say" in open_.text
    rows = fleet([1.0, 1.0, 1.0], loss_local=[3.0, 1.0, 2.0], spread=0.1)
    better, worse, unclear = said(rows, "alone")
    assert better.supported and "worth it for d0" in better.text
    assert worse.supported and "d1 would have done better alone" in worse.text
    assert not unclear.supported and "d2" in unclear.text


def test_devices_without_a_local_only_adapter_are_counted() -> None:
    rows = [dataclasses.replace(r, loss_local=3.0) if r.device_id == "d0" else r
            for r in fleet([1.0, 1.0, 1.0])]  # fmt: skip
    assert any("2 devices of 3 trained no adapter alone" in s.text for s in said(rows, "alone"))


def test_kinds_of_hardware_need_two_devices_each() -> None:
    falls = [0.5, 0.6, 0.1, 0.2]
    (one_kind,) = said(fleet(falls, tier=["pi"] * 4), "tiers")
    assert "all measured devices are of one kind" in one_kind.text
    (single,) = said(fleet(falls, tier=["pi", "pi", "pi", "orin"]), "tiers")
    assert "of orin there is one device only" in single.text
    (both,) = said(fleet(falls, tier=["pi", "pi", "orin", "orin"]), "tiers")
    assert "94 % of the variance" in both.text and "33 % would by chance" in both.text
    assert not both.supported


def test_a_device_that_never_gave_anything_is_named() -> None:
    assert not said(fleet([0.5, 0.5]), "participation")
    (silent,) = said(fleet([0.5, 0.5], merged=[True, False]), "participation")
    assert silent.supported and "No update of d1" in silent.text


def test_energy_is_open_until_every_device_tells() -> None:
    assert "no device can measure it" in said(fleet([0.5, 0.5]), "energy")[0].text
    assert "1 of 2" in said(fleet([0.5, 0.5], joules=[1.0, None]), "energy")[0].text
    assert not said(fleet([0.5, 0.5], joules=[1.0, 2.0]), "energy")


def test_devices_left_out_and_an_unfinished_run_are_said() -> None:
    rows = [*fleet([0.5, 0.5]), row("late", 1)]
    (left,) = said(rows, "left out")
    assert "late" in left.text and not said(fleet([0.5, 0.5]), "left out")
    assert said(rows, "unfinished", finished=False) and not said(rows, "unfinished")


def test_one_run_never_speaks_for_another() -> None:
    (repetition,) = said(fleet([0.5] * 3), "repetition")
    assert not repetition.supported and "one run" in repetition.text


def test_the_supported_come_first_and_no_number_is_missing() -> None:
    found = statements(run_fairness(fleet([0.5] * 4, loss_local=[1.0] * 4)), True)
    flags = [s.supported for s in found]
    assert flags == sorted(flags, reverse=True)
    assert not any(word in s.text for s in found for word in ("None", "nan"))
    assert all(s.text.endswith(".") for s in found)
