"""The owner's word is kept: when to train, when to wait, and no flapping in between."""

from __future__ import annotations

from datetime import datetime

import pytest
from pydantic import ValidationError

from edge_agent.policy import FREE, Cause, Policy, decide
from edge_agent.readings import Readings


def at(text):
    hour, minute = map(int, text.split(":"))
    return datetime(2026, 11, 21, hour, minute)


def verdicts(policy, *moments):
    """The verdict after each (second, readings[, time of day])."""
    found, before = [], FREE
    for second, readings, *time in moments:
        before = decide(policy, readings, at(time[0] if time else "12:00"), float(second), before)
        found.append(before)
    return found


def one(policy, time="12:00", **readings):
    return decide(policy, Readings(**readings), at(time), 0.0)


def test_without_a_word_of_the_owner_a_plugged_in_device_trains():
    assert one(Policy(), on_battery=False, temperature_c=95.0, others_cpu=1.0,
               others_gpu=True, memory_available_bytes=0) == FREE  # fmt: skip
    assert one(Policy()) == FREE and FREE.control == {}


@pytest.mark.parametrize(
    ("hours", "time", "runs"),
    [
        (("09:00-17:00",), "09:00", True), (("09:00-17:00",), "17:00", False),
        (("22:00-06:30",), "23:59", True), (("22:00-06:30",), "06:29", True),
        (("22:00-06:30",), "06:30", False), (("22:00-06:30",), "21:59", False),
        (("00:00-24:00",), "00:00", True), (("12:00-13:00", "1:30-2:00"), "01:45", True),
        (("12:00-13:00", "1:30-2:00"), "03:00", False), ((), "03:00", True),
    ],
)  # fmt: skip
def test_hours_are_local_and_may_pass_midnight(hours, time, runs):
    assert one(Policy(hours=hours), time).pauses is not runs


def test_the_next_hour_is_named():
    verdict = one(Policy(hours=("22:00-23:00", "13:00-14:00")), "12:00")
    assert "goes on at 13:00" in verdict.why and verdict.is_lasting
    assert verdict.control == {"pause": verdict.why}


@pytest.mark.parametrize(
    ("rule", "on_battery", "percent", "runs"),
    [
        ("never", True, 99.0, False), ("never", False, 5.0, True), ("never", None, None, True),
        ("always", True, 5.0, True), (50, True, 60.0, True), (50, True, 49.0, False),
        (50, True, None, False), (50, False, 10.0, True),
    ],
)  # fmt: skip
def test_a_battery_is_spared_as_told(rule, on_battery, percent, runs):
    verdict = one(Policy(on_battery=rule), on_battery=on_battery, battery_percent=percent)
    assert verdict.pauses is not runs


def test_a_battery_at_its_limit_does_not_flap():
    policy = Policy(on_battery=50)
    charge = [(0, 51), (20, 49), (40, 51), (60, 52), (80, 53)]
    found = verdicts(policy, *((s, Readings(on_battery=True, battery_percent=float(p)))
                               for s, p in charge))  # fmt: skip
    assert [v.pauses for v in found] == [False, True, True, True, False]


def test_heat_pauses_above_one_temperature_and_goes_on_below_another():
    policy = Policy(pause_above_c=85, resume_below_c=70)
    degrees = [(0, 84), (20, 85), (40, 80), (60, 71), (80, 69), (100, 84)]
    found = verdicts(policy, *((s, Readings(temperature_c=float(c))) for s, c in degrees))
    assert [v.pauses for v in found] == [False, True, True, True, False, False]
    assert "goes on below 70 °C" in found[1].why and not found[1].is_lasting


def test_ten_degrees_of_cooling_are_the_default():
    degrees = [(0, 81), (60, 71), (120, 69)]
    moments = ((s, Readings(temperature_c=float(c))) for s, c in degrees)
    found = verdicts(Policy(pause_above_c=80), *moments)
    assert [v.pauses for v in found] == [True, True, False]


def test_without_a_word_the_boards_own_limits_count():
    room = [(0, 20.0), (20, 4.0), (40, 0.5), (60, 6.0), (80, 7.9), (100, 8.0), (120, None)]
    found = verdicts(Policy(), *((s, Readings(headroom_c=c)) for s, c in room))
    assert [v.duty for v in found] == [1.0, 0.5, 0.0, 0.5, 0.5, 1.0, 1.0]
    assert found[1].control == {"duty": 0.5}


@pytest.mark.parametrize(
    ("owner", "readings", "duty"),
    [
        ("dedicated", {"others_cpu": 1.0, "others_gpu": True}, 1.0),
        ("background", {"others_cpu": 0.5}, 0.5), ("background", {"others_gpu": True}, 0.5),
        ("background", {"others_cpu": 0.2}, 1.0), ("background", {}, 1.0),
        ("idle-only", {"others_cpu": 0.5}, 0.0), ("idle-only", {"others_gpu": True}, 0.0),
        ("idle-only", {"others_cpu": 0.1, "others_gpu": False}, 1.0),
    ],
)  # fmt: skip
def test_other_programs_go_first_as_the_owner_says(owner, readings, duty):
    assert one(Policy(owner=owner), **readings).duty == duty


def test_it_comes_back_only_after_half_a_minute_of_quiet():
    use = [(0, 0.5), (1, 0.2), (20, 0.05), (30, 0.2), (59, 0.0), (60, 0.0)]
    found = verdicts(Policy(owner="idle-only"), *((s, Readings(others_cpu=u)) for s, u in use))
    assert [v.pauses for v in found] == [True, True, True, True, True, False]


def test_memory_that_others_need_is_left():
    policy = Policy(leave_memory_mb=1000)
    left = [(0, 1100), (20, 900), (40, 1200), (60, 1300)]
    found = verdicts(policy, *((s, Readings(memory_available_bytes=m * 10**6)) for s, m in left))
    assert [v.pauses for v in found] == [False, True, True, False]


def test_the_strictest_rule_counts():
    policy = Policy(owner="background", on_battery="never")
    verdict = one(policy, others_cpu=0.9, on_battery=True)
    assert verdict.pauses and verdict.cause is Cause.BATTERY


def test_a_lighter_restraint_may_follow_a_heavier_one():
    policy = Policy(owner="background", on_battery="never")
    found = verdicts(policy, (0, Readings(on_battery=True, others_cpu=0.9)),
                     (5, Readings(on_battery=False, others_cpu=0.9)),
                     (15, Readings(on_battery=False, others_cpu=0.9)))  # fmt: skip
    assert [v.cause for v in found] == [Cause.BATTERY, Cause.BATTERY, Cause.OWNER]
    assert found[-1].duty == 0.5


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"hours": ("9-17",)}, "range of local times"), ({"hours": ("25:00-26:00",)}, "range"),
        ({"hours": ("08:00-08:00",)}, "range"), ({"hours": ("24:00-08:00",)}, "range"),
        ({"on_battery": "sometimes"}, 'must be "never", "always" or a percentage'),
        ({"on_battery": 100}, "percentage from 1 to 99"), ({"on_battery": True}, "percentage"),
        ({"resume_below_c": 60}, "must be below pause_above_c, which it needs"),
        ({"pause_above_c": 70, "resume_below_c": 70}, "must be below pause_above_c"),
        ({"pause_above_c": 700}, "less than or equal to 120"), ({"owner": "me"}, "idle-only"),
    ],
)  # fmt: skip
def test_a_policy_that_cannot_be_meant_is_refused(keys, sentence):
    with pytest.raises(ValidationError, match=sentence):
        Policy(**keys)
