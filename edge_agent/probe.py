"""What this machine is, from psutil, /proc and sysfs. No torch: compute and the GPU as training
sees it come from the trainer, link facts from `link`.
"""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.board import BoardFacts, find_board, power_mode, recognised
from edge_agent.graphics import find_gpu
from edge_agent.machine import Machine
from edge_agent.readings import Sensors
from profiles.device import ComputeProfile, DeviceProfile, GpuProfile, PowerProfile
from profiles.errors import MissingExtraError
from profiles.link import LinkProfile

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
DEVICE_TREE_MODEL = Path("/proc/device-tree/model")
CPU_INFO = Path("/proc/cpuinfo")


def board_name(device_tree: Path = DEVICE_TREE_MODEL) -> str:
    """The board as its device tree names it ("NVIDIA Jetson Orin …"), else the architecture."""
    try:
        return device_tree.read_bytes().rstrip(b"\0").decode("utf-8", "replace").strip()
    except OSError:
        return f"{platform.machine()} computer"


def cpu_name(cpu_info: Path = CPU_INFO) -> str:
    """The processor as the kernel names it."""
    try:
        for line in cpu_info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware") and value.strip():
                return value.strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def cgroup_limit_bytes(paths: Iterable[Path] | None = None) -> int | None:
    """The lowest memory limit of these control-group files; None when unlimited or unreadable.

    By default those of this process's own group and of the groups above it (cgroups(7)).
    """
    limits = []
    for path in own_cgroup_files() if paths is None else paths:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < 1 << 60:  # cgroup v1 writes a huge number for "none"
            limits.append(int(text))
    return min(limits, default=None)


def own_cgroup_files(table: Path = OWN_CGROUPS, root: Path = CGROUPS) -> list[Path]:
    """Where the limits of this process may stand: v2's unified tree and v1's memory tree."""
    try:
        lines = table.read_text().splitlines()
    except OSError:
        lines = []
    found = [root / "memory.max", root / "memory" / "memory.limit_in_bytes"]
    for line in lines:
        number, controllers, group = line.split(":", 2)
        parts = [p for p in group.split("/") if p and p != ".."]
        steps = [Path(*parts[: i + 1]) for i in range(len(parts))]
        if number == "0" and not controllers:
            found += [root / step / "memory.max" for step in steps]
        elif "memory" in controllers.split(","):
            found += [root / "memory" / step / "memory.limit_in_bytes" for step in steps]
    return found


@dataclass(frozen=True)
class HostMemory:
    """The kernel's count, bytes. On a Jetson the GPU uses the same."""

    total_bytes: int
    available_bytes: int
    swap_bytes: int  # zram included
    zram_bytes: int


def host_memory(machine: Machine) -> HostMemory:
    """From /proc/meminfo, else from psutil. Raises `MissingExtraError` when neither is there."""
    text = machine.text("/proc/meminfo") or ""
    counts = re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)
    lines = {key: int(kilobytes) * 1024 for key, kilobytes in counts}
    swaps = [line.split() for line in (machine.text("/proc/swaps") or "").splitlines()[1:]]
    zram = sum(int(s[2]) * 1024 for s in swaps if len(s) > 2 and "zram" in s[0] and s[2].isdigit())
    if "MemTotal" in lines and "MemAvailable" in lines:
        return HostMemory(lines["MemTotal"], lines["MemAvailable"], lines.get("SwapTotal", 0), zram)
    psutil = _psutil()
    memory = psutil.virtual_memory()
    return HostMemory(memory.total, memory.available, psutil.swap_memory().total, zram)


@dataclass(frozen=True)
class MachineFacts:
    """What does not change while the agent runs."""

    board: BoardFacts
    gpu: GpuProfile | None  # that ought to be usable; the trainer says whether it is
    known_board: str  # its name in the catalogue; empty when it is none of them


def find_machine(machine: Machine) -> MachineFacts:
    """Board and GPU. Asks nvidia-smi, so it may take seconds."""
    board, memory = find_board(machine), host_memory(machine)
    gpu = find_gpu(machine, board, (memory.total_bytes, memory.available_bytes))
    own = memory.total_bytes if gpu is None or gpu.unified_memory else gpu.memory_total_bytes
    name = "" if gpu is None or board.tegra else gpu.name
    return MachineFacts(board, gpu, recognised(board, name, own))


def power_state(machine: Machine, board: BoardFacts) -> PowerProfile:
    """How this machine is powered and how warm it is, now."""
    found = Sensors(machine, cards=False).read()
    return PowerProfile(
        mode=power_mode(machine, board),
        on_battery=found.on_battery,
        battery_percent=found.battery_percent,
        temperature_c=found.temperature_c,
    )


def probe(
    *,
    version: str,
    state: Path,
    board: str = "",
    memory_cap_bytes: int | None = None,
    gpu: GpuProfile | None = None,
    compute: ComputeProfile | None = None,
    link: LinkProfile | None = None,
    machine: Machine | None = None,
    facts: MachineFacts | None = None,
) -> DeviceProfile:
    """The profile of this machine. Raises `MissingExtraError` without psutil."""
    psutil = _psutil()
    machine = machine or Machine()
    facts = facts or find_machine(machine)
    memory = host_memory(machine)
    limit = cgroup_limit_bytes(
        own_cgroup_files(machine.path("/proc/self/cgroup"), machine.path("/sys/fs/cgroup"))
    )
    caps = [cap for cap in (memory_cap_bytes, limit) if cap is not None]
    existing = next(p for p in (state, *state.parents) if p.exists())
    return DeviceProfile(
        board=board or board_name(machine.path("/proc/device-tree/model")),
        cpu=cpu_name(machine.path("/proc/cpuinfo")),
        cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        memory_total_bytes=memory.total_bytes,
        memory_available_bytes=memory.available_bytes,
        memory_cap_bytes=min(caps) if caps else None,
        disk_free_bytes=shutil.disk_usage(existing).free,
        agent_version=version,
        gpu=gpu,
        compute=compute,
        link=link,
        known_board=facts.known_board,
        swap_bytes=memory.swap_bytes,
        power=power_state(machine, facts.board),
    )


def _psutil() -> Any:
    try:
        import psutil
    except ImportError as error:
        raise MissingExtraError("psutil", "agent") from error
    return psutil
