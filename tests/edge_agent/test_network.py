"""The way out, whether it costs money, and how much of today's budget is left."""

from __future__ import annotations

import json
from datetime import datetime

import pytest

from edge_agent.network import RESERVE_BYTES, DailyBudget, default_route, is_metered

HEAD = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"
WIFI = "wlan0 00000000 0101A8C0 0003 0 0 600 00000000 0 0 0\n"
WIRE = "eth0 00000000 0100000A 0003 0 0 100 00000000 0 0 0\n"
NEAR = "eth0 0000000A 00000000 0001 0 0 100 00FFFFFF 0 0 0\n"
ROUTES = "/proc/net/route"
V6 = f"{'0' * 32} 00 {'0' * 32} 00 fe80{'0' * 27}1 00000400 1 0 1 wlan1\n"


@pytest.mark.parametrize(
    ("table", "way"),
    [
        (HEAD + WIFI + WIRE + NEAR, "eth0 0100000A"), (HEAD + WIFI, "wlan0 0101A8C0"),
        (HEAD + NEAR, ""), (HEAD, ""), (None, ""), ("garbage\nmore garbage\n", ""),
    ],
)  # fmt: skip
def test_the_way_out_is_the_route_of_the_lowest_metric(machines, table, way):
    assert default_route(machines("vm", {ROUTES: table})) == way


def test_a_network_without_ipv4_has_a_way_out(machines):
    machine = machines("vm", {ROUTES: HEAD, "/proc/net/ipv6_route": V6})
    assert default_route(machine).startswith("wlan1 fe80")
    both = machines("vm", {ROUTES: HEAD + WIFI, "/proc/net/ipv6_route": V6})
    assert default_route(both) == "wlan0 0101A8C0"


@pytest.mark.parametrize(
    ("wanted", "tools", "metered"),
    [
        ("yes", {}, True), ("no", {"nmcli": "GENERAL.METERED:yes\n"}, False),
        ("auto", {"nmcli": "GENERAL.METERED:yes\n"}, True),
        ("auto", {"nmcli": "GENERAL.METERED:yes (guessed)\n"}, True),
        ("auto", {"nmcli": "GENERAL.METERED:no (guessed)\n"}, False),
        ("auto", {"nmcli": "GENERAL.METERED:unknown\n"}, False),
        ("auto", {"busctl": "u 3\n"}, True), ("auto", {"busctl": "u 4\n"}, False),
        ("auto", {"busctl": "\n"}, False), ("auto", {}, False),
    ],
)  # fmt: skip
def test_metered_is_what_the_owner_says_else_what_the_system_does(machines, wanted, tools, metered):
    assert is_metered(machines("vm", {ROUTES: HEAD + WIFI}, tools), wanted) is metered


def test_a_device_without_a_way_out_asks_nobody(machines):
    assert is_metered(machines("vm", tools={"nmcli": "GENERAL.METERED:yes"}), "auto") is False


# --- the budget ---------------------------------------------------------------------------------


class Clock:
    def __init__(self, day=21, hour=12):
        self.now = datetime(2026, 11, day, hour).timestamp()

    def __call__(self):
        return self.now


@pytest.fixture
def budget(tmp_path):
    """A budget of one megabyte; the same file each time."""
    return lambda clock, daily=10**6: DailyBudget(tmp_path / "traffic.json", daily, clock)


def test_bytes_are_counted_until_nothing_is_left(budget):
    today = budget(Clock())
    assert today.left_bytes == 10**6 and today.allows(10**6) and not today.allows(10**6 + 1)
    today.spend(600_000)
    assert today.left_bytes == 400_000 and not today.is_used_up
    today.spend(600_000)
    assert today.left_bytes == 0 and today.is_used_up


def test_a_little_is_kept_for_reports(budget):
    today = budget(Clock(), 10**8)
    today.spend(10**8 - RESERVE_BYTES + 1)
    assert today.is_used_up and today.left_bytes > 0


def test_a_restart_does_not_give_the_bytes_back(budget):
    today = budget(Clock())
    today.spend(500_000)
    assert budget(Clock()).left_bytes == 500_000, "kept as it is spent, not only at the end"
    today.spend(10)
    today.save()
    assert budget(Clock()).left_bytes == 499_990


def test_a_new_day_begins_at_local_midnight(budget):
    clock = Clock(hour=23)
    today = budget(clock)
    today.spend(900_000)
    clock.now += 3600
    assert today.left_bytes == 10**6
    assert budget(Clock(day=22)).left_bytes == 10**6, "yesterday's file counts nothing"


def test_without_a_budget_nothing_is_forbidden_or_written(budget, tmp_path):
    free = budget(Clock(), None)
    free.spend(10**12)
    free.save()
    assert free.left_bytes is None and free.allows(10**15) and not free.is_used_up
    assert not (tmp_path / "traffic.json").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"day": "2026-11-21"}', '{"bytes": "x"}'])
def test_a_damaged_count_begins_anew(budget, tmp_path, text):
    (tmp_path / "traffic.json").write_text(text)
    today = budget(Clock())
    assert today.left_bytes == 10**6
    today.spend(100_000)
    assert json.loads((tmp_path / "traffic.json").read_text())["bytes"] == 100_000
