"""Planted troubles are told, and noise is not."""

import dataclasses

import numpy as np
import pytest

from coordinator.alerts import find_alerts
from coordinator.ledger_types import LedgerRow

PLAIN = LedgerRow(
    round=0, device_id="", board="", tier="", language="go", method="fslora", rank=4,
    global_rank=16, ratio=0.25, encoding="f32", bits_per_value=32.0, density=1.0, outcome="done",
    message="", reason="", merged=True,
)  # fmt: skip


def fleet(rng, rounds=10, devices=8, noise=0.02, hold_back=(), slope=0.0, examples=0, joins=1.0):
    """Rows of a fleet whose losses fall alike but for noise; `hold_back` fall less by `slope`."""
    rows = []
    base = rng.uniform(2.5, 3.5, devices)
    fall = rng.uniform(0.8, 1.2, devices)
    tokens = rng.integers(50, 200, (devices, examples))
    hard = np.exp(rng.normal(0, 0.3, (devices, examples)))
    for r in range(rounds):
        for d in range(devices):
            gain = fall[d] * (1 - np.exp(-r / 4))
            loss = base[d] - gain + slope * r * (d in hold_back) + rng.normal(0, noise)
            row = dataclasses.replace(
                PLAIN, round=r, device_id=f"d{d}", tier="pi" if d % 2 else "orin",
                loss_received=loss, merged=bool(rng.random() < joins),
            )  # fmt: skip
            if examples:
                nats = loss * hard[d] * tokens[d]
                row = dataclasses.replace(
                    row, nats=tuple(nats), tokens=tuple(tokens[d].tolist()),
                    loss_received=nats.sum() / tokens[d].sum(),
                )  # fmt: skip
            rows.append(row)
    return rows


def kinds(rows, coverage=None):
    return [(a.kind, a.subject) for a in find_alerts(rows, coverage)]


@pytest.mark.parametrize("examples", [0, 20])
def test_a_fleet_that_learns_alike_raises_no_alarm(examples) -> None:
    rng = np.random.default_rng(0)
    false = [alarm for _ in range(25) for alarm in kinds(fleet(rng, examples=examples, joins=0.8))]
    assert len(false) <= 2, false  # every kind together, of 25 fleets


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [5, 8, 20])
def test_false_alarms_stay_near_their_level_at_every_length(rounds) -> None:
    rng = np.random.default_rng(1)
    false = sum(bool(kinds(fleet(rng, rounds, joins=0.8))) for _ in range(300))
    assert false <= 15


def test_no_alarm_where_nothing_moves_but_noise() -> None:
    rng = np.random.default_rng(2)
    for _ in range(25):
        rows = [
            dataclasses.replace(row, loss_received=2.0 + rng.normal(0, 0.05))
            for row in fleet(rng, 12)
        ]
        assert not kinds(rows)


@pytest.mark.parametrize("examples", [0, 20])
def test_a_device_held_back_on_purpose_is_told_from_when_it_began(examples) -> None:
    rows = fleet(np.random.default_rng(3), 12, hold_back={5}, slope=0.15, examples=examples)
    (alert,) = find_alerts(rows)
    assert (alert.kind, alert.subject) == ("device_falling_behind", "d5")
    assert alert.since_round <= 3 and alert.severity == "critical"  # its own loss rose
    assert "d5" in alert.message and "its own loss rose" in alert.message


def test_a_device_that_gains_too_little_is_a_warning() -> None:
    rows = fleet(np.random.default_rng(3), 12, hold_back={5}, slope=0.06)
    (alert,) = find_alerts(rows)
    assert (alert.subject, alert.severity) == ("d5", "warning")


def test_a_tier_held_back_is_told_as_a_tier() -> None:
    rows = fleet(np.random.default_rng(4), 12, hold_back={1, 3, 5, 7}, slope=0.1)
    assert ("tier_falling_behind", "pi") in kinds(rows)
    assert ("tier_falling_behind", "orin") not in kinds(rows)


def test_four_rounds_are_too_few_for_a_trend() -> None:
    assert not kinds(fleet(np.random.default_rng(3), 4, hold_back={5}, slope=0.3))


def with_local(row, gap):
    return dataclasses.replace(row, loss_local=row.loss_received - gap)


def test_a_device_that_would_do_better_alone_is_told() -> None:
    rows = fleet(np.random.default_rng(5), 6)
    rows = [with_local(r, 0.1 if r.device_id == "d2" and r.round >= 3 else -0.1) for r in rows]
    (alert,) = find_alerts(rows)
    assert (alert.kind, alert.subject) == ("device_worse_than_alone", "d2")
    assert alert.since_round == 3 and "0.100 nats" in alert.message


def test_alone_is_not_better_by_less_than_the_noise_of_held_out_code() -> None:
    rows = fleet(np.random.default_rng(6), 4, examples=12)
    assert not kinds([with_local(r, 0.05) for r in rows])
    assert len(kinds([with_local(r, 2.0) for r in rows])) == 8


def test_without_noise_known_one_round_is_no_evidence() -> None:
    rows = fleet(np.random.default_rng(5), 6)
    assert not kinds([with_local(r, 0.1 if r.round == 5 else -0.1) for r in rows])


def test_a_tier_whose_updates_never_arrive_is_starved() -> None:
    rows = [dataclasses.replace(r, merged=r.tier == "orin" or r.round < 2)
            for r in fleet(np.random.default_rng(7), 8)]  # fmt: skip
    alert = next(a for a in find_alerts(rows) if a.kind == "tier_starved")
    assert (alert.subject, alert.since_round, alert.severity) == ("pi", 2, "warning")
    assert "8 of 32" in alert.message and "100 %" in alert.message
    never = [dataclasses.replace(r, merged=r.tier == "orin") for r in rows]
    assert next(a for a in find_alerts(never)).severity == "critical"


def test_one_late_update_and_a_newcomer_starve_nobody() -> None:
    rows = fleet(np.random.default_rng(8), 8)
    rows = [r for r in rows if r.tier == "orin" or r.round >= 5]  # pis enrolled later
    rows[3] = dataclasses.replace(rows[3], merged=False)
    assert not [a for a in find_alerts(rows) if a.kind == "tier_starved"]


def random_coverage(rng, rounds, devices, rank, k, never=()):
    found = {}
    for r in range(rounds):
        counts = np.zeros(rank)
        for _ in range(devices):
            counts[rng.choice(np.setdiff1d(np.arange(rank), never), k, replace=False)] += 1
        found[r] = counts
    return found


def test_components_left_by_random_slices_are_not_cold() -> None:
    rng = np.random.default_rng(9)
    found = [kinds(fleet(rng, 15, devices=3), random_coverage(rng, 15, 3, 16, 4))
             for _ in range(40)]  # fmt: skip
    assert sum(map(bool, found)) <= 3  # 0.4 expected


def test_components_that_nobody_trains_are_cold_and_named_together() -> None:
    rng = np.random.default_rng(10)
    rows = fleet(rng, 15)
    coverage = random_coverage(rng, 15, 8, 16, 4, never=[9, 13, 14, 15])
    (alert,) = find_alerts(rows, coverage)
    assert (alert.kind, alert.subject, alert.since_round) == ("component_cold", "9, 13-15", 0)
    assert "components 9, 13-15 of 16" in alert.message
    for r in range(3):
        coverage[r][9] = 1
    subjects = [(a.subject, a.since_round) for a in find_alerts(rows, coverage)]
    assert subjects == [("13-15", 0), ("9", 3)]


def test_nothing_known_is_nothing_to_tell() -> None:
    assert find_alerts([]) == ()
    assert find_alerts([PLAIN], {0: [1.0, 0.0]}) == ()
