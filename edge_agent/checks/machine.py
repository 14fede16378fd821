"""The machine under the agent: memory, swap, disk, clock, drivers, heat, and what its log tells.

Reads only; advice that needs root is given, never carried out.
"""

from __future__ import annotations

import ctypes
import shutil
import sys
from pathlib import Path

from edge_agent.checks.finding import Finding, fail, ok, skip, warn
from edge_agent.machine import Machine
from edge_agent.probe import MachineFacts, cgroup_limit_bytes, host_memory, own_cgroup_files
from edge_agent.readings import Sensors
from profiles.memory import CPU_BASELINE_BYTES, UNIFIED_CONTEXT_BYTES

GB = 1e9
ROOM_BYTES = 300 * 10**6  # assumed: the least that steps need beside the base
DISK_FAIL_BYTES, DISK_WARN_BYTES = 10**9, 5 * 10**9
TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised
LOG_TAIL_BYTES = 256 * 1024
OLDEST_PYTHON = (3, 11)
# What the trainer's log of earlier rounds may hold -> what it means and what to do.
SIGNATURES = (
    ("NvMapMemAlloc", "the GPU's memory is fragmented (NvMap error 12)",
     "restart the board; it outlives processes"),
    ("NVML_SUCCESS == r", "torch met the end of memory (it says so badly on Tegra before 2.15)",
     "nothing to do: it is counted as out of memory; torch 2.15 says it well"),
    ("no kernel image is available", "torch or bitsandbytes has no code for this GPU",
     "build it for the board, or take the Jetson AI Lab wheel"),
    ("named symbol not found", "bitsandbytes is a server build, which fails on L4T",
     "build it with -DCOMPUTE_CAPABILITY for the board, or take the Jetson AI Lab wheel"),
    ("invalid device ordinal", "a paged optimiser was used, which Jetsons cannot do",
     "let the run use adamw or adamw8bit"),
    ("CUDA error: operation not supported", "CUDA may not read /sys in this container (Thor)",
     "give the container read access to /sys"),
)  # fmt: skip


def examine(
    machine: Machine,
    facts: MachineFacts,
    state: Path,
    cap_bytes: int | None,
    base_bytes: int | None,
) -> list[Finding]:
    """Everything here. `base_bytes`: of the quantised base, None when it is not known."""
    return [
        python(),
        board(facts),
        memory(machine, facts, cap_bytes, base_bytes),
        swap(machine, facts),
        disk(state),
        clock(machine),
        driver(machine, facts),
        heat(machine),
        trainer_log(state / "trainer.log"),
    ]


def python(version: tuple[int, int] = sys.version_info[:2]) -> Finding:
    """Of the agent itself."""
    text = ".".join(map(str, version))
    if version < OLDEST_PYTHON:
        return fail("python", f"{text} is too old for the agent",
                    "use Python 3.11 or newer in an environment of its own")  # fmt: skip
    return ok("python", text)


def board(facts: MachineFacts) -> Finding:
    """What the machine was recognised as."""
    found = facts.board
    if not found.tegra:
        return ok("board", facts.known_board or "no board of the catalogue; it is measured")
    told = f"{found.model or found.module_name}, L4T {found.l4t or 'unknown'}"
    told += f" (JetPack {found.jetpack})" if found.jetpack else ""
    if not found.capability:
        return warn("board", f"{told}; its chip is not known", "report it with `probe --json`")
    if found.capability < "8":
        return warn("board", f"{told}; a legacy board without bf16", "expect small models only")
    return ok("board", told)


def memory(
    machine: Machine, facts: MachineFacts, cap_bytes: int | None, base_bytes: int | None
) -> Finding:
    """What is free, and every limit on it, against what the base needs."""
    host = host_memory(machine)
    group = cgroup_limit_bytes(
        own_cgroup_files(machine.path("/proc/self/cgroup"), machine.path("/sys/fs/cgroup"))
    )
    on_card = facts.gpu is not None and not facts.gpu.unified_memory
    baseline = CPU_BASELINE_BYTES if facts.gpu is None or on_card else UNIFIED_CONTEXT_BYTES
    need = baseline + ROOM_BYTES + (base_bytes or 0)
    told = f"{host.available_bytes / GB:.1f} of {host.total_bytes / GB:.1f} GB available"
    if facts.gpu is not None and on_card:
        told += f", {facts.gpu.memory_free_bytes / GB:.1f} GB on the card"
        need = baseline  # on the host
        card_need = ROOM_BYTES + (base_bytes or 0)
        if facts.gpu.memory_free_bytes < card_need:
            return fail("memory", f"{told}; the base needs about {card_need / GB:.1f} GB there",
                        "free the card, or join a run with a smaller base")  # fmt: skip
    limits = [("control group", group), ("[limits] memory_mb", cap_bytes)]
    for name, limit in limits:
        if limit is not None and limit < need:
            return fail("memory", f"{told}; the {name} allows {limit / GB:.1f} GB, training needs "
                        f"about {need / GB:.1f}",
                        "raise MemoryMax= of the service, the container's --memory or "
                        "[limits] memory_mb")  # fmt: skip
    if host.available_bytes < need:
        return fail("memory", f"{told}; training needs about {need / GB:.1f} GB",
                    "close other programs (a headless boot frees about 0.8 GB), or join a run "
                    "with a smaller base")  # fmt: skip
    held = f"; the control group allows {group / GB:.1f} GB" if group is not None else ""
    return ok("memory", told + held)


def swap(machine: Machine, facts: MachineFacts) -> Finding:
    """Never planned with; on boards that share memory with the GPU it makes room for it."""
    host = host_memory(machine)
    told = f"{host.swap_bytes / GB:.1f} GB, of it zram {host.zram_bytes / GB:.1f}"
    if facts.gpu is None or not facts.gpu.unified_memory:
        return ok("swap", told if host.swap_bytes else "none")
    if host.zram_bytes:
        return warn("swap", f"{told}; zram takes the memory that the GPU could use",
                    "disable nvzramconfig and put a swap file on NVMe instead")  # fmt: skip
    if not host.swap_bytes:
        return warn("swap", "none; other programs cannot make room for training",
                    "put a swap file of the size of the memory on NVMe")  # fmt: skip
    return ok("swap", told)


def disk(state: Path) -> Finding:
    """Room for slices, updates and checkpoints."""
    existing = next(p for p in (state.resolve(), *state.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    told = f"{free / GB:.1f} GB free beside {state}"
    if free < DISK_FAIL_BYTES:
        return fail("disk", told, "free at least 1 GB, or move [state] folder to another disk")
    if free < DISK_WARN_BYTES:
        return warn("disk", told, "a base of a few billion weights needs more")
    return ok("disk", told)


def clock(machine: Machine) -> Finding:
    """Credentials expire by the clock; hours of the policy go by it."""
    if machine.path("/run/systemd/timesync/synchronized").exists():
        return ok("clock", "synchronised by systemd-timesyncd")
    state = _kernel_clock()
    if state is None:
        return skip("clock", "the kernel does not say whether it is synchronised")
    if state == TIME_ERROR:
        return warn("clock", "nothing synchronises it",
                    "turn on time synchronisation (timedatectl set-ntp true)")  # fmt: skip
    return ok("clock", "synchronised")


def _kernel_clock() -> int | None:
    """What adjtimex(2) answers when it is only asked; None where there is no such call."""
    if sys.platform != "linux":
        return None
    asked = ctypes.create_string_buffer(512)  # struct timex, modes 0: change nothing
    try:
        state = int(ctypes.CDLL(None, use_errno=True).adjtimex(asked))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state


def driver(machine: Machine, facts: MachineFacts) -> Finding:
    """Whether the GPU's device files are there for this process."""
    wanted = {"Jetson": "/dev/nvmap", "card": "/dev/nvidiactl"}
    if facts.board.capability:
        path = wanted["Jetson"]
        if facts.board.soc == "tegra264":
            path = wanted["card"]  # Thor has the drivers of cards
    elif facts.gpu is not None or machine.path("/proc/driver/nvidia/version").exists():
        path = wanted["card"]
    else:
        return skip("driver", "no NVIDIA GPU here")
    place = machine.path(path)
    if not place.exists():
        return fail("driver", f"the GPU is there, {path} is not",
                    "as a service: no PrivateDevices=; in a container: --runtime nvidia; else "
                    "load the driver")  # fmt: skip
    try:
        place.open("rb").close()
    except PermissionError:
        return fail("driver", f"{path} may not be opened by this user",
                    "add the user to the groups video and render (where they exist)")  # fmt: skip
    except OSError as error:
        return warn("driver", f"{path} cannot be opened: {error.strerror}", "look at dmesg")
    if facts.gpu is None:
        return warn("driver", "loaded, but nvidia-smi does not answer in time",
                    "restart the machine if training fails too")  # fmt: skip
    return ok("driver", f"{facts.gpu.name} through {path}")


def heat(machine: Machine) -> Finding:
    """How far from throttling it is while idle."""
    found = Sensors(machine, cards=False).read()
    if found.temperature_c is None:
        return skip("heat", "no temperature can be read")
    told = f"{found.temperature_c:.0f} °C"
    if found.headroom_c is None:
        return ok("heat", f"{told}; no trip points, [policy] pause_above_c would guard it")
    told += f", {found.headroom_c:.0f} °C below where it protects itself"
    if found.headroom_c < 10:
        return warn("heat", told, "clean or add a fan; training will wait and go at half speed")
    return ok("heat", told)


def trainer_log(path: Path) -> Finding:
    """Known failures of earlier rounds."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
            text = stream.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return skip("earlier runs", "the trainer has not run yet")
    except OSError as error:
        return warn("earlier runs", f"{path} cannot be read: {error.strerror}",
                    "run the doctor as the agent's user")  # fmt: skip
    for sign, means, mend in SIGNATURES:
        if sign in text:
            return warn("earlier runs", f"{path.name}: {means}", mend)
    return ok("earlier runs", "no known failure in the trainer's log")
