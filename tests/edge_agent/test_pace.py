"""Transfers keep to the owner's limit, and step back while others use the network."""

from __future__ import annotations

import pytest

from edge_agent.network import carried_bytes
from edge_agent.pace import BURST_S, LEAST_BPS, SAMPLE_S, Courtesy, Pace

ROUTE = "Iface Destination Gateway\neth0 00000000 0100000A 0003 0 0 100 00000000 0 0 0\n"


class Time:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        self.now += seconds


class Wire:
    """An interface that others and we use at these rates, in bit/s."""

    def __init__(self):
        self.time, self.others_bps, self.own_bps = Time(), 0.0, 0.0
        self.own = self.all = 0.0
        self.courtesy = Courtesy(lambda: int(self.all), lambda: int(self.own), self.time)

    def pass_(self, looks=1):
        """Lets so many looks' time pass; what is left to us then."""
        for _ in range(looks):
            self.own += self.own_bps * SAMPLE_S / 8
            self.all += (self.own_bps + self.others_bps) * SAMPLE_S / 8
            self.time.now += SAMPLE_S
            found = self.courtesy.bps
        return found


@pytest.fixture
def wire():
    wire = Wire()
    assert wire.courtesy.bps is None
    return wire


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("chunk", [4096, 65536])
async def test_no_more_than_the_limit_goes_over_any_stretch(direction, chunk):
    time = Time()
    pace, moved = Pace(1e6, clock=time, sleep=time.sleep), 0
    while time.now < 20:
        await pace.take(direction, chunk)
        moved += chunk
    assert 8 * moved / time.now == pytest.approx(1e6, rel=0.02 + 8 * chunk / 20e6)


async def test_a_pause_saves_up_no_more_than_a_moment():
    time = Time()
    pace = Pace(1e6, clock=time, sleep=time.sleep)
    await pace.take("up", 1000)
    time.now += 3600
    begun, moved = time.now, 0
    while time.now == begun:
        await pace.take("up", 1000)
        moved += 1000
    assert 8 * moved <= 1e6 * BURST_S + 16_000


async def test_the_two_ways_do_not_pay_for_each_other():
    time = Time()
    pace = Pace(1e6, clock=time, sleep=time.sleep)
    await pace.take("up", 125_000)
    before = time.now
    await pace.take("down", 1000)
    assert time.now == before


async def test_without_a_limit_nothing_waits():
    time = Time()
    await Pace(clock=time, sleep=time.sleep).take("up", 10**12)
    assert time.now == 0


def test_own_traffic_with_its_headers_and_retransmissions_is_no_reason_to_step_back(wire):
    wire.own_bps, wire.others_bps = 1e6, 0.2e6
    assert wire.pass_(20) is None
    wire.own_bps, wire.others_bps = 0.0, 30_000.0
    assert wire.pass_(20) is None, "a little talk is no use of the network"


def test_one_busy_look_may_be_a_buffer_of_ours_that_empties(wire):
    wire.own_bps, wire.others_bps = 0.0, 1e6
    assert wire.pass_(1) is None
    wire.own_bps, wire.others_bps = 1e6, 0.0
    assert wire.pass_(5) is None


def test_others_halve_our_rate_until_little_is_left_and_it_returns_when_they_end(wire):
    wire.own_bps = 8e6
    wire.pass_(3)
    wire.others_bps = 20e6
    rates = [wire.pass_() for _ in range(3)]
    assert rates == [None, 4e6, 2e6]
    assert wire.pass_(20) == LEAST_BPS, "a little is left to us: rounds have deadlines"
    wire.others_bps = wire.own_bps = 0.0
    rates = [wire.pass_() for _ in range(8)]
    assert rates[:2] == [LEAST_BPS + 1e6, LEAST_BPS + 2e6] and rates[-1] is None


def test_a_count_that_falls_or_fails_says_nothing(wire):
    wire.own_bps = wire.others_bps = 5e6
    wire.pass_(1)
    wire.all = 0.0  # another interface
    assert wire.pass_(1) is None
    missing = Courtesy(lambda: None, lambda: 0)
    assert missing.bps is None and missing.bps is None


def test_the_limit_and_courtesy_hold_both(wire):
    pace = Pace(3e6, wire.courtesy)
    assert pace.bps == 3e6
    wire.own_bps, wire.others_bps = 2e6, 50e6
    wire.pass_(3)
    assert pace.bps == wire.courtesy.bps < 3e6


def test_the_way_out_is_what_is_watched(machines):
    carried = (("eth0", "rx", 100), ("eth0", "tx", 23), ("lo", "rx", 9))
    counts = {f"/sys/class/net/{name}/statistics/{way}_bytes": f"{n}\n" for name, way, n in carried}
    assert carried_bytes(machines("vm", {"/proc/net/route": ROUTE, **counts})) == 123
    assert carried_bytes(machines("vm", {"/proc/net/route": ROUTE})) is None
    assert carried_bytes(machines("vm", counts)) is None
