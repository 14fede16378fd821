"""Heat, power and load as each kind of machine tells them, and as broken sensors do not."""

from __future__ import annotations

import pytest

from edge_agent.activity import Activity
from edge_agent.graphics import CardState
from edge_agent.readings import Readings, Sensors


def read(machine):
    return Sensors(machine, cards=False).read()


@pytest.mark.parametrize(
    ("name", "temperature_c", "headroom_c", "watts"),
    [
        ("orin nano", 54.5, 44.5, 6.0),  # the rail that carries the others, not their sum
        ("agx orin", 60.0, 39.0, 24 + 6 + 5 + 0.5),  # no such rail: all that are connected
        ("xavier", 44.0, 57.0, None),  # not the constant 100 °C of its PMIC
        ("thor", 47.0, 52.0, 40.0),
        ("laptop", 56.25, 47.0, 14.5),  # from the battery; the disk's heat does not count
        ("pi 5", 61.5, 48.5, None),
        ("vm", None, None, None),
    ],
)
def test_each_machine_tells_what_it_has(machines, name, temperature_c, headroom_c, watts):
    found = read(machines(name))
    assert found.temperature_c == temperature_c and found.headroom_c == headroom_c
    assert found.watts == pytest.approx(watts) if watts else found.watts is None


@pytest.mark.parametrize(
    ("name", "load", "clock"),
    [("orin nano", 0.73, 0.6), ("agx orin", 1.0, 1.0), ("thor", 0.25, 900 / 1575),
     ("xavier", 0.0, 114750000 / 1377000000), ("laptop", None, None)],
)  # fmt: skip
def test_the_load_of_a_boards_gpu(machines, name, load, clock):
    found = read(machines(name))
    assert found.gpu_load == load and found.gpu_clock == clock


def test_zones_that_fail_or_babble_are_off(machines):
    machine = machines("orin nano")
    sensors = Sensors(machine, cards=False)
    machines.hide(machine, "/sys/class/thermal/thermal_zone1/temp")
    assert sensors.read().temperature_c == 51.2
    machines.put(machine, {"/sys/class/thermal/thermal_zone0/temp": "lots\n"})
    assert sensors.read().temperature_c is None and sensors.read().headroom_c is None
    machines.put(machine, {"/sys/class/thermal/thermal_zone0/temp": "99999999\n"})
    assert sensors.read().temperature_c is None


def test_a_rail_that_fails_leaves_the_power_unknown(machines):
    machine = machines("orin nano")
    machines.hide(machine, "/sys/class/hwmon/hwmon1/curr1_input")
    assert read(machine).watts is None


@pytest.mark.parametrize(
    ("online", "status", "on_battery"),
    [("0", "Discharging", True), ("1", "Charging", False), ("1", "Discharging", False),
     ("0", "Unknown", True), (None, "Full", False), (None, "Discharging", True)],
)  # fmt: skip
def test_the_supply_is_told_by_mains_and_battery_together(machines, online, status, on_battery):
    ac = "/sys/class/power_supply/AC"
    machine = machines("laptop", {
        f"{ac}/online": online, f"{ac}/type": None if online is None else "Mains",
        "/sys/class/power_supply/BAT0/status": status,
    })  # fmt: skip
    found = read(machine)
    assert found.on_battery is on_battery and found.battery_percent == 63.0


def test_a_battery_that_tells_current_and_voltage_tells_power(machines):
    battery = "/sys/class/power_supply/BAT0"
    files = {f"{battery}/power_now": None, f"{battery}/current_now": "-1500000",
             f"{battery}/voltage_now": "12000000"}  # fmt: skip
    assert read(machines("laptop", files)).watts == pytest.approx(18.0)


def test_a_desktop_with_a_mouse_is_not_on_battery(machines):
    nothing = {f"/sys/class/power_supply/{name}/type": None for name in ("AC", "BAT0")}
    found = read(machines("laptop", nothing))
    assert found.on_battery is None and found.battery_percent is None and found.watts is None


def test_a_card_is_asked_every_five_seconds_only(machines):
    times, calls = iter([0.0, 1.0, 4.9, 5.0]), []

    class Smi:
        def read(self):
            calls.append(1)
            return CardState(80.0, 100.0, (1,))

    sensors = Sensors(machines("vm"), clock=lambda: next(times))
    sensors._smi = Smi()
    assert [sensors.read().watts for _ in range(4)] == [100.0] * 4
    assert len(calls) == 2 and sensors.card.temperature_c == 80.0


# --- others -------------------------------------------------------------------------------------


class Still:
    """Sensors that always tell the same."""

    def __init__(self, card=None, **readings):
        self.card, self._readings = card or CardState(), Readings(**readings)

    def read(self):
        return self._readings


def test_a_dedicated_device_does_not_look_at_others():
    found = Activity(Still(gpu_load=0.9), watches_others=False).read(waiting=True)
    assert found.others_cpu is None and found.others_gpu is None
    assert found.memory_available_bytes > 0


@pytest.mark.parametrize(("waiting", "busy"), [(True, True), (False, None)])
def test_load_that_nobody_owns_counts_only_while_the_trainer_waits(waiting, busy):
    found = Activity(Still(gpu_load=0.9), watches_others=True).read(waiting)
    assert found.others_gpu is busy


def test_processes_on_a_card_are_ours_or_others():
    import os

    own, parent, nobody = os.getpid(), os.getppid(), 2**22 + 1
    for pids, busy in (((own,), False), ((own, parent), True), ((nobody,), False)):
        found = Activity(Still(CardState(pids=pids)), watches_others=True).read(False)
        assert found.others_gpu is busy


def test_the_load_of_others_is_what_is_not_ours(monkeypatch):
    from edge_agent import activity

    now, busy = [0.0], [100.0]
    monkeypatch.setattr(activity, "_busy_s", lambda: busy[0])
    watch = Activity(Still(), watches_others=True, clock=lambda: now[0])
    watch._cores = 2
    assert watch.read(False).others_cpu is None, "one look is none"
    now[0], busy[0] = 10.0, 110.0  # one of two processors for ten seconds
    assert watch.read(False).others_cpu == pytest.approx(0.5, abs=0.05)
    now[0] = 11.0
    assert 0.4 < watch.read(False).others_cpu < 0.5, "a moment of quiet is not the end of it"
