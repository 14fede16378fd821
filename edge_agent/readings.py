"""How warm, loaded and powered this machine is at one moment, from sysfs and nvidia-smi.

Zones that cannot be read, or read nonsense, are taken as switched off. Units: degrees Celsius,
watts, shares between 0 and 1. Judges nothing: `policy` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from edge_agent.graphics import CardState, NvidiaSmi
from edge_agent.machine import Machine

PLAUSIBLE_C = (-40.0, 150.0)
TRIP_C = (60.0, 125.0)  # others are unset (-274) or mean something else
LIMITING = ("passive", "hot", "critical")  # an "active" trip only starts a fan
CONSTANT_ZONES = ("PMIC-Die",)  # tells 100 °C whatever happens
PROCESSOR_CHIPS = ("coretemp", "k10temp", "zenpower", "amdgpu", "cpu_thermal")
WHOLE_BOARD = ("VDD_IN", "POM_5V_IN", "VIN", "VDD_TOTAL")  # rails that carry all the others
GPU_NODES = ("ga10b", "gv11b", "gp10b", "gm20b", "gpu")
CARD_EVERY_S = 5.0  # nvidia-smi costs a process


@dataclass(frozen=True)
class Readings:
    """One moment. None: this machine does not tell."""

    temperature_c: float | None = None  # of the warmest zone
    headroom_c: float | None = None  # to the nearest temperature at which a zone throttles
    watts: float | None = None
    on_battery: bool | None = None
    battery_percent: float | None = None
    gpu_load: float | None = None  # by anybody, the trainer included
    gpu_clock: float | None = None  # of the highest that the power mode allows
    memory_available_bytes: int | None = None
    others_cpu: float | None = None  # share of the processor that other programs use
    others_gpu: bool | None = None  # whether other programs compute on the GPU


@dataclass(frozen=True)
class _Zone:
    path: str  # of the temperature, in thousandths
    trip_c: float | None


class Sensors:
    """Finds what there is to read once, then reads it as often as asked."""

    def __init__(
        self, machine: Machine, clock: Callable[[], float] = time.monotonic, cards: bool = True
    ) -> None:
        self._machine, self._clock = machine, clock
        self._zones = _thermal_zones(machine) + _processor_chips(machine)
        self._rails = _rails(machine)
        self._gpu = _gpu_node(machine)
        self._smi = NvidiaSmi(machine) if cards else None
        self._card, self._card_at_s = CardState(), -CARD_EVERY_S

    @property
    def card(self) -> CardState:
        """What nvidia-smi said last."""
        return self._card

    def read(self) -> Readings:
        """The machine now. Takes milliseconds, or seconds when nvidia-smi is asked and hangs."""
        now = self._clock()
        if self._smi is not None and now - self._card_at_s >= CARD_EVERY_S:
            self._card, self._card_at_s = self._smi.read(), now
        found = self._supplies()
        temperature_c, headroom_c = self._heat()
        load, clock = self._gpu_state()
        return replace(
            found,
            temperature_c=temperature_c,
            headroom_c=headroom_c,
            watts=self._watts(found),
            gpu_load=load,
            gpu_clock=clock,
        )

    def _heat(self) -> tuple[float | None, float | None]:
        warmest, least = self._card.temperature_c, None
        for zone in self._zones:
            milli = self._machine.number(zone.path)
            if milli is None or not PLAUSIBLE_C[0] < milli / 1000 < PLAUSIBLE_C[1]:
                continue
            celsius = milli / 1000
            warmest = celsius if warmest is None else max(warmest, celsius)
            if zone.trip_c is not None:
                headroom = zone.trip_c - celsius
                least = headroom if least is None else min(least, headroom)
        return warmest, least

    def _watts(self, supplies: Readings) -> float | None:
        """Of the whole board where a rail or a battery tells, else of the graphics cards."""
        rails = [_rail_watts(self._machine, folder, n) for folder, n in self._rails]
        known = [watts for watts in rails if watts is not None]
        if known:
            return sum(known)
        if supplies.watts is not None:
            return supplies.watts
        return self._card.watts

    def _gpu_state(self) -> tuple[float | None, float | None]:
        if self._gpu is None:
            return None, None
        per_mille = self._machine.number(f"{self._gpu}/device/load")
        hertz = self._machine.number(f"{self._gpu}/cur_freq")
        most = self._machine.number(f"{self._gpu}/max_freq")
        clock = hertz / most if hertz is not None and most else None
        return None if per_mille is None else min(1.0, max(0.0, per_mille / 1000)), clock

    def _supplies(self) -> Readings:
        """Batteries and mains; batteries of mice and headsets do not count."""
        online, mains, discharging = False, False, False
        percents, watts = [], []
        for supply in self._machine.found("/sys/class/power_supply/*"):
            kind = self._machine.text(f"{supply}/type")
            if kind == "Battery" and self._machine.text(f"{supply}/scope") != "Device":
                percent = self._machine.number(f"{supply}/capacity")
                if percent is not None and 0 <= percent <= 100:
                    percents.append(percent)
                if self._machine.text(f"{supply}/status") == "Discharging":
                    discharging = True
                    watts.append(_battery_watts(self._machine, supply))
            elif kind in ("Mains", "USB"):
                mains = mains or kind == "Mains"
                online = online or self._machine.number(f"{supply}/online") == 1
        on_battery = None
        if online:
            on_battery = False
        elif discharging or (mains and percents):
            on_battery = True
        elif percents:
            on_battery = False  # charging or full, by a supply that does not show
        drawn = [w for w in watts if w is not None]
        return Readings(
            on_battery=on_battery,
            battery_percent=sum(percents) / len(percents) if percents else None,
            watts=sum(drawn) if drawn and on_battery else None,
        )


def _thermal_zones(machine: Machine) -> list[_Zone]:
    zones = []
    for zone in machine.found("/sys/class/thermal/thermal_zone*"):
        if machine.text(f"{zone}/type") in CONSTANT_ZONES:
            continue
        trips = []
        for path in machine.found(f"{zone}/trip_point_*_type"):
            milli = machine.number(f"{path.removesuffix('_type')}_temp")
            if machine.text(path) in LIMITING and milli is not None:
                trips.append(milli / 1000)
        zones.append(_Zone(f"{zone}/temp", _lowest(trips)))
    return zones


def _processor_chips(machine: Machine) -> list[_Zone]:
    """Sensors of processors that have no thermal zone (AMD desktops, for one)."""
    zones = []
    for chip in machine.found("/sys/class/hwmon/hwmon*"):
        if machine.text(f"{chip}/name") not in PROCESSOR_CHIPS:
            continue
        for path in machine.found(f"{chip}/temp*_input"):
            milli = machine.number(f"{path.removesuffix('_input')}_crit")
            zones.append(_Zone(path, _lowest([] if milli is None else [milli / 1000])))
    return zones


def _lowest(trips: list[float]) -> float | None:
    return min((t for t in trips if TRIP_C[0] <= t <= TRIP_C[1]), default=None)


def _rails(machine: Machine) -> list[tuple[str, str]]:
    """(folder, channel) of the rails to add up: the one that carries all, else every one."""
    rails = []
    for chip in machine.found("/sys/class/hwmon/hwmon*"):
        if not (machine.text(f"{chip}/name") or "").startswith("ina3221"):
            continue
        for path in machine.found(f"{chip}/curr[0-9]*_input"):
            channel = path.rpartition("/curr")[2].removesuffix("_input")
            label = machine.text(f"{chip}/in{channel}_label") or ""
            if channel.isdigit() and label != "NC":  # not connected
                rails.append((label, chip, channel))
    whole = [rail for rail in rails if rail[0] in WHOLE_BOARD]
    return [(chip, channel) for _, chip, channel in whole or rails]


def _rail_watts(machine: Machine, chip: str, channel: str) -> float | None:
    milliamperes = machine.number(f"{chip}/curr{channel}_input")
    millivolts = machine.number(f"{chip}/in{channel}_input")
    if milliamperes is None or millivolts is None or milliamperes < 0 or millivolts < 0:
        return None
    return milliamperes * millivolts / 1e6


def _battery_watts(machine: Machine, supply: str) -> float | None:
    microwatts = machine.number(f"{supply}/power_now")
    if microwatts is not None:
        return abs(microwatts) / 1e6
    microamperes = machine.number(f"{supply}/current_now")
    microvolts = machine.number(f"{supply}/voltage_now")
    if microamperes is None or microvolts is None:
        return None
    return abs(microamperes) * microvolts / 1e12


def _gpu_node(machine: Machine) -> str | None:
    """The frequency node of a Jetson's GPU."""
    for node in machine.found("/sys/class/devfreq/*"):
        if node.endswith("/gpu-gpc-0"):
            return node
        if machine.text(f"{node}/device/of_node/name") in GPU_NODES:
            return node
    return None
