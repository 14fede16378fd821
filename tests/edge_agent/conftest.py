"""Machines made of files: what the kernel of a board, a laptop or a bare machine shows.

Made from facts of the boards, not copied from one: paths, names and units are theirs, numbers are
plausible. `machines("orin nano")` gives a `Machine`; more files may be given, None takes one away.
"""

from __future__ import annotations

import os

import pytest

from edge_agent.machine import Machine

MEMINFO = "MemTotal: {total} kB\nMemFree: 1 kB\nMemAvailable: {free} kB\nSwapTotal: {swap} kB\n"


def memory(total_gb, free_gb, swap_gb=0.0):
    kilo = (int(gb * 1e6) for gb in (total_gb, free_gb, swap_gb))
    return dict(zip(("total", "free", "swap"), kilo, strict=True))


def jetson(model, compatible, release, *, total_gb, free_gb, swap_gb=0.0, dts=""):
    """What all Jetsons have in common."""
    return {
        "/proc/device-tree/model": f"{model}\0",
        "/proc/device-tree/compatible": "".join(f"{name}\0" for name in compatible),
        "/proc/device-tree/nvidia,dtsfilename": f"{dts}\0" if dts else None,
        "/etc/nv_tegra_release": f"# {release}, GCID: 1, BOARD: generic, EABI: aarch64\nmore\n",
        "/proc/meminfo": MEMINFO.format(**memory(total_gb, free_gb, swap_gb)),
        "/proc/cpuinfo": "processor\t: 0\nmodel name\t: ARMv8 Processor rev 1 (v8l)\n",
    }


def zone(number, kind, celsius, trips=()):
    """A thermal zone; `trips`: (type, degrees)."""
    path = f"/sys/class/thermal/thermal_zone{number}"
    files = {f"{path}/type": f"{kind}\n", f"{path}/temp": f"{int(celsius * 1000)}\n"}
    for i, (trip, degrees) in enumerate(trips):
        files[f"{path}/trip_point_{i}_type"] = f"{trip}\n"
        files[f"{path}/trip_point_{i}_temp"] = f"{int(degrees * 1000)}\n"
    return files


def rails(number, *channels, name="ina3221"):
    """A power monitor; channels: (label, milliamperes, millivolts)."""
    path = f"/sys/class/hwmon/hwmon{number}"
    files = {f"{path}/name": f"{name}\n"}
    for i, (label, milliamperes, millivolts) in enumerate(channels, 1):
        files |= {
            f"{path}/in{i}_label": f"{label}\n", f"{path}/curr{i}_input": f"{milliamperes}\n",
            f"{path}/in{i}_input": f"{millivolts}\n",
        }  # fmt: skip
    return files


def gpu(node, name, load, clock, most):
    """A GPU's frequency node; `name` of its device-tree node, None where there is none."""
    path = f"/sys/class/devfreq/{node}"
    return {
        f"{path}/device/of_node/name": None if name is None else f"{name}\0",
        f"{path}/device/load": f"{load}\n",
        f"{path}/cur_freq": f"{clock}\n",
        f"{path}/max_freq": f"{most}\n",
    }


ORIN_TRIPS = (("active", 50), ("passive", 99), ("hot", 103), ("critical", 104.5))
MACHINES = {
    "orin nano": {
        **jetson("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
                 ["nvidia,p3768-0000+p3767-0005-super", "nvidia,p3767-0005", "nvidia,tegra234"],
                 "R36 (release), REVISION: 4.3", total_gb=7.8, free_gb=5.9, swap_gb=3.9,
                 dts="/dvs/git/tegra234-p3768-0000+p3767-0005-nv-super.dts"),
        "/usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}',
        "/proc/swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 650000 0 5\n"
                       "/swapfile file 3250000 0 -2\n",
        **zone(0, "cpu-thermal", 51.2, ORIN_TRIPS),
        **zone(1, "gpu-thermal", 54.5, ORIN_TRIPS),
        **zone(2, "cv0-thermal", -256),
        "/sys/class/thermal/thermal_zone3/type": "cv1-thermal\n",  # and no temperature to read
        **rails(1, ("VDD_IN", 1200, 5000), ("VDD_CPU_GPU_CV", 600, 5000), ("VDD_SOC", 300, 5000)),
        **gpu("17000000.gpu", "gpu", 730, 612000000, 1020000000),
        "/sys/class/devfreq/15340000.vic/device/of_node/name": "vic\0",
        "/dev/nvmap": "",
    },
    "agx orin": {
        **jetson("Jetson AGX Orin Developer Kit",
                 ["nvidia,p3737-0000+p3701-0005", "nvidia,tegra234"],
                 "R39 (release), REVISION: 2.0", total_gb=65.0, free_gb=58.0),
        **zone(0, "tj-thermal", 60, ORIN_TRIPS),
        **rails(0, ("VDD_GPU_SOC", 2000, 12000), ("VDD_CPU_CV", 500, 12000), ("NC", 9, 9000)),
        **rails(1, ("VIN_SYS_5V0", 1000, 5000), ("VDDQ_VDD2_1V8AO", 100, 5000), name="ina3221x"),
        **gpu("17000000.ga10b", "ga10b", 1001, 1300500000, 1300500000),
    },
    "xavier": {
        **jetson("Jetson-AGX", ["nvidia,p2972-0000", "nvidia,tegra194"],
                 "R35 (release), REVISION: 6.4", total_gb=32.0, free_gb=28.0,
                 dts="/tegra194-p2888-0001-p2822-0000.dts"),
        **zone(0, "PMIC-Die", 100),
        **zone(1, "GPU-therm", 44, (("critical", 101),)),
        **gpu("17000000.gv11b", "gv11b", 0, 114750000, 1377000000),
    },
    "thor": {
        **jetson("NVIDIA Jetson AGX Thor Developer Kit",
                 ["nvidia,p4071-0000+p3834-0008", "nvidia,p3834-0008", "nvidia,tegra264"],
                 "R38 (release), REVISION: 2.1", total_gb=131.0, free_gb=120.0),
        **zone(0, "tj-thermal", 47, ORIN_TRIPS),
        **rails(3, ("VDD_GPU", 100, 20000), ("VIN", 2000, 20000)),
        **gpu("gpu-gpc-0", None, 250, 900, 1575),
        "/dev/nvidiactl": "",
    },
    "laptop": {
        "/proc/cpuinfo": "processor\t: 0\nmodel name\t: AMD Ryzen 7 PRO 5850U\n",
        "/proc/meminfo": MEMINFO.format(**memory(16.2, 9.1, 8.0)),
        **zone(0, "acpitz", 48, (("passive", 95), ("critical", 110))),
        **zone(1, "x86_pkg_temp", 51, (("passive", -274), ("passive", 0))),
        "/sys/class/hwmon/hwmon2/name": "k10temp\n",
        "/sys/class/hwmon/hwmon2/temp1_input": "56250\n",
        "/sys/class/hwmon/hwmon3/name": "nvme\n",
        "/sys/class/hwmon/hwmon3/temp1_input": "71850\n",
        "/sys/class/power_supply/AC/type": "Mains\n",
        "/sys/class/power_supply/AC/online": "0\n",
        "/sys/class/power_supply/BAT0/type": "Battery\n",
        "/sys/class/power_supply/BAT0/status": "Discharging\n",
        "/sys/class/power_supply/BAT0/capacity": "63\n",
        "/sys/class/power_supply/BAT0/power_now": "14500000\n",
        "/sys/class/power_supply/hidpp_battery_0/type": "Battery\n",
        "/sys/class/power_supply/hidpp_battery_0/scope": "Device\n",
        "/sys/class/power_supply/hidpp_battery_0/status": "Discharging\n",
        "/sys/class/power_supply/hidpp_battery_0/capacity": "5\n",
    },
    "pi 5": {
        "/proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        "/proc/device-tree/compatible": "raspberrypi,5-model-b\0brcm,bcm2712\0",
        "/proc/cpuinfo": "processor\t: 0\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n",
        "/proc/meminfo": MEMINFO.format(**memory(8.3, 7.0, 0.1)),
        **zone(0, "cpu-thermal", 61.5, (("active", 50), ("critical", 110))),
    },
    "vm": {"/proc/meminfo": MEMINFO.format(**memory(4.1, 3.3))},
}  # fmt: skip


def put(root, files):
    """Writes these files; None: there is no such file."""
    for where, content in files.items():
        path = root / where.lstrip("/")
        if content is None:
            path.unlink(missing_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


class Machines:
    """Makes machines by name, each in a folder of its own."""

    def __init__(self, folder):
        self._folder, self._made = folder, 0

    def __call__(self, name, files=None, tools=None):
        """`tools`: what programs print, by their first word; a list keeps the calls."""
        self._made += 1
        root = self._folder / f"{self._made}"
        root.mkdir(parents=True)
        put(root, {**MACHINES[name], **(files or {})})
        answers = tools or {}
        return Machine(root, lambda words, timeout_s: answers.get(words[0]))

    def put(self, machine, files):
        """Changes files of a machine."""
        put(machine.root, files)

    def hide(self, machine, where):
        """Makes a file one that fails when it is read, as sensors that are off do."""
        path = machine.path(where)
        path.unlink(missing_ok=True)
        os.makedirs(path)  # noqa: PTH103 - a folder cannot be read, not even by root


@pytest.fixture
def machines(tmp_path):
    """A maker of machines."""
    return Machines(tmp_path / "machines")
