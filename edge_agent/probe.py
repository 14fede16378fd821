"""What this machine is, from psutil, /proc and sysfs. No torch: compute and GPU facts come from
the trainer, link facts from `link`.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterable
from pathlib import Path

from profiles.device import ComputeProfile, DeviceProfile, GpuProfile
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


def probe(
    *,
    version: str,
    state: Path,
    board: str = "",
    memory_cap_bytes: int | None = None,
    gpu: GpuProfile | None = None,
    compute: ComputeProfile | None = None,
    link: LinkProfile | None = None,
) -> DeviceProfile:
    """The profile of this machine. Raises `MissingExtraError` without psutil."""
    try:
        import psutil
    except ImportError as error:
        raise MissingExtraError("psutil", "agent") from error
    memory = psutil.virtual_memory()
    limit = cgroup_limit_bytes()
    caps = [cap for cap in (memory_cap_bytes, limit) if cap is not None]
    existing = next(p for p in (state, *state.parents) if p.exists())
    return DeviceProfile(
        board=board or board_name(),
        cpu=cpu_name(),
        cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        memory_total_bytes=memory.total,
        memory_available_bytes=memory.available,
        memory_cap_bytes=min(caps) if caps else None,
        disk_free_bytes=shutil.disk_usage(existing).free,
        agent_version=version,
        gpu=gpu,
        compute=compute,
        link=link,
    )
