"""What transfers teach of a link: slowly, from those that say something, and with their scatter."""

from __future__ import annotations

import math

import pytest

from edge_agent.link_estimate import LinkEstimate, Stretch, Transfer, differs
from edge_agent.link_probe import Echo, measure
from profiles.link import LinkProfile

KNOWN = LinkEstimate(up_bps=1e6, down_bps=8e6, rtt_s=0.05)


def sent(bps, seconds=2.0):
    return Transfer("up", int(bps * seconds / 8), seconds)


def test_one_transfer_moves_the_logarithm_by_its_weight():
    found = KNOWN.after(sent(4e6))
    assert found.up_bps == pytest.approx(1e6 * 4**0.3, rel=1e-3)
    assert found.down_bps == 8e6, "the other direction learns nothing"


def test_a_short_transfer_weighs_less():
    short, long = KNOWN.after(sent(4e6, 0.5)), KNOWN.after(sent(4e6, 20.0))
    assert short.up_bps == pytest.approx(1e6 * 4 ** (0.3 / 4), rel=1e-3)
    assert long.up_bps == KNOWN.after(sent(4e6)).up_bps


@pytest.mark.parametrize(
    "transfer",
    [
        Transfer("up", 32 * 1024 - 1, 5.0),  # says more of start-up than of the link
        Transfer("up", 10**6, 0.19),  # less than four round trips
        Transfer("up", 10**6, 0.0),
    ],
)
def test_transfers_that_say_nothing_are_left_out(transfer):
    assert KNOWN.after(transfer) is KNOWN


@pytest.mark.parametrize("true_bps", [0.1e6, 5e6])
def test_the_estimate_comes_to_the_truth_and_its_error_to_nothing(true_bps):
    found = KNOWN
    for _ in range(40):
        found = found.after(sent(true_bps, 4.0))
    assert found.up_bps == pytest.approx(true_bps, rel=0.01)
    assert 0 < found.up_variation < 0.01


def test_a_link_that_swings_keeps_its_variation():
    found = KNOWN
    for i in range(60):
        found = found.after(sent(2e6 if i % 2 else 0.5e6))
    assert 0.7e6 < found.up_bps < 1.5e6 and 0.4 < found.up_variation <= 1.0


def test_both_directions_are_told_with_the_worse_variation():
    found = KNOWN.after(Transfer("down", 10**6, 2.0)).profile(True, 77)
    assert found.up_bps == 1e6 and found.metered and found.budget_bytes == 77
    assert found.variation == pytest.approx(0.5), "half of what was expected came"


def test_a_probe_that_measured_nothing_is_replaced_by_the_first_transfer():
    assert LinkEstimate(0.0, 0.0, 0.01).after(sent(3e6)).up_bps == pytest.approx(3e6, rel=1e-3)
    assert math.isfinite(LinkEstimate(0.0, 0.0, 0.01).after(sent(3e6)).up_variation)


@pytest.mark.parametrize(
    ("changes", "tells"),
    [
        ({}, False), ({"up_bps": 1.19e6}, False), ({"up_bps": 1.21e6}, True),
        ({"down_bps": 6.3e6}, True), ({"metered": True}, True), ({"rtt_s": 9.0}, False),
        ({"budget_bytes": 95}, False), ({"budget_bytes": 89}, True), ({"budget_bytes": 0}, True),
        ({"budget_bytes": None}, True),
    ],
)  # fmt: skip
def test_the_planner_hears_of_what_matters_to_it(changes, tells):
    plain = {"up_bps": 1e6, "down_bps": 8e6, "rtt_s": 0.05, "metered": False, "budget_bytes": 100}
    assert differs(LinkProfile(**{**plain, **changes}), LinkProfile(**plain), 100) is tells


def test_a_transfer_is_timed_from_after_its_first_piece():
    times = iter([10.0, 11.0, 14.0])
    stretch = Stretch("down", lambda: next(times))
    assert stretch.transfer is None
    stretch.reached(1000)
    assert stretch.transfer is None, "one piece alone says nothing"
    stretch.reached(2000)
    stretch.reached(5000)
    assert stretch.transfer == Transfer("down", 4000, 4.0)


@pytest.mark.parametrize(
    ("bps", "metered", "largest", "most"),
    [
        (1e9, False, 4 << 20, 8 << 20), (1e9, True, 256 * 1024, 512 * 1024),
        (0.3e6, False, 64 * 1024, 64 * 1024),  # takes 1.7 s: enough
        (1e6, False, 256 * 1024, 512 * 1024),
    ],
)  # fmt: skip
async def test_a_link_is_measured_with_as_little_as_will_do(bps, metered, largest, most):
    sizes = []

    async def once(up, down):
        sizes.append(down)
        return Echo(bps, bps, 8 * max(up, down) / bps)

    found = await measure(once, metered)
    assert (found.up_bps, found.down_bps, found.metered) == (bps, bps, metered)
    assert max(sizes) == largest and sum(sizes) <= most and sizes[:4] == [0] * 4
