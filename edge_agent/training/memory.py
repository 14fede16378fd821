"""What the trainer process uses of memory, and what counts as running out of it.

Knows the operating system's and torch's counters. It decides nothing about plans: it measures,
compares with the cap it is given, and gives memory back.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import psutil
import torch

from profiles.device import GpuProfile
from profiles.errors import SketchfleetError

# What is raised when memory ran out, and what it says beyond that; the first that fits is told.
SYMPTOMS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("NvMapMemAlloc",),
        "the Jetson's memory map is fragmented, which outlives processes even with memory free: "
        "reboot the device, or drop the page cache as root",
    ),
    (
        ("CUDA driver error: out of memory",),
        "on a Jetson this comes from expandable_segments in PYTORCH_CUDA_ALLOC_CONF or "
        "PYTORCH_ALLOC_CONF: remove it there",
    ),
    (
        ("NVML_SUCCESS == r", "INTERNAL ASSERT"),
        "torch before 2.15 tells it this way on a Jetson; nothing is broken",
    ),
    (("out of memory",), ""),
    (("CUBLAS_STATUS_ALLOC_FAILED",), ""),
    (("can't allocate memory",), ""),  # torch's allocator on the processor
)
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
# What is left to the rest of the machine, as `DeviceProfile.trainer_bytes` plans it.
CARD_RESERVE_BYTES = int(0.3 * 2**30)
HOST_RESERVE_BYTES = 2**29
HOST_RESERVE_SHARE = 0.08


class OutOfMemoryError(SketchfleetError):
    """The job needs more memory than this device, or its owner's cap, gives the trainer."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of any library means that memory ran out."""
    if isinstance(error, (OutOfMemoryError, MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and _symptom(error) is not None


def what_it_means(error: BaseException) -> str:
    """What an error of `is_out_of_memory` says beyond that, with the remedy; "" when nothing."""
    return _symptom(error) or ""


def _symptom(error: BaseException) -> str | None:
    text = str(error).lower()
    found = (told for parts, told in SYMPTOMS if all(part.lower() in text for part in parts))
    return next(found, None)


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def used_bytes(device: torch.device) -> int:
    """What others cannot have: resident bytes, or on a card what its allocator holds, or both."""
    if device.type != "cuda":
        return resident_bytes()
    card = int(torch.cuda.memory_reserved(device))
    return card + resident_bytes() if _shares_memory(device) else card


def gigabytes(size_bytes: int) -> str:
    """A size for a sentence."""
    return f"{size_bytes / 1e9:.2f} GB"


class MemoryWatch:
    """The highest memory since the watch was made, and the owner's cap on it.

    CPU: resident bytes of the process (the kernel's high-water mark where it can be reset, else
    the highest of the samples taken by `check`). CUDA: bytes allocated on the card; where card
    and processor share their memory (Jetson), both together.
    """

    def __init__(self, device: torch.device, cap_bytes: int | None = None) -> None:
        self._device = device
        self._cap_bytes = cap_bytes
        self._highest_sample = 0
        self._high_water = _reset_high_water()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @property
    def peak_bytes(self) -> int:
        """The highest so far."""
        host = self._host_peak_bytes()
        if self._device.type != "cuda":
            return host
        card = int(torch.cuda.max_memory_allocated(self._device))
        return card + host if _shares_memory(self._device) else card

    def check(self) -> None:
        """Raises `OutOfMemoryError` when the process holds more than the cap now."""
        used = self.used_bytes
        if self._cap_bytes is not None and used > self._cap_bytes:
            raise OutOfMemoryError(
                f"the trainer holds {gigabytes(used)}, more than the {gigabytes(self._cap_bytes)} "
                "its owner allows; raise the cap or let the coordinator plan a smaller task"
            )

    @property
    def held_bytes(self) -> int:
        """Now, counted as `peak_bytes` is."""
        if self._device.type != "cuda":
            return resident_bytes()
        card = int(torch.cuda.memory_allocated(self._device))
        return card + resident_bytes() if _shares_memory(self._device) else card

    @property
    def used_bytes(self) -> int:
        """Now, with what the allocator keeps for later: what others cannot have."""
        self._highest_sample = max(self._highest_sample, resident_bytes())
        return used_bytes(self._device)

    def _host_peak_bytes(self) -> int:
        self._highest_sample = max(self._highest_sample, resident_bytes())
        marked = _high_water_bytes() if self._high_water else 0
        return max(marked, self._highest_sample)


def give_back() -> None:
    """Returns memory that nothing refers to any more to the card and the operating system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        # glibc keeps freed pages, and the next job's peak would count the last one's base.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def is_tight(device: torch.device) -> bool:
    """Whether so little memory is left that what is only kept for later had better go."""
    if device.type == "cuda" and not _shares_memory(device):
        return int(torch.cuda.mem_get_info(device)[0]) < CARD_RESERVE_BYTES
    host = psutil.virtual_memory()
    return bool(host.available < max(HOST_RESERVE_BYTES, HOST_RESERVE_SHARE * host.total))


def gpu_facts(device: torch.device) -> GpuProfile | None:
    """The accelerator in use; None on CPU.

    Free memory is what a trainer that has loaded nothing yet would find: what this one holds is
    counted as free, so that a warm trainer tells the same as a fresh one.
    """
    if device.type != "cuda":
        return None
    facts = torch.cuda.get_device_properties(device)
    shared = _shares_memory(device)
    # On shared memory CUDA counts cached file pages as taken; the kernel knows better.
    free = psutil.virtual_memory().available if shared else torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) + (resident_bytes() if shared else 0)
    return GpuProfile(
        name=facts.name,
        memory_total_bytes=int(facts.total_memory),
        memory_free_bytes=min(int(free), int(facts.total_memory)),
        compute_capability=f"{facts.major}.{facts.minor}",
        unified_memory=shared,
    )


def _shares_memory(device: torch.device) -> bool:
    return bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", False))


def _reset_high_water() -> bool:
    """Sets the kernel's high-water mark of this process to what it holds now, if it can."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return _high_water_bytes() > 0


def _high_water_bytes() -> int:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM:")), 0)
