"""Boards and cards that are known before one is seen: what they have, and how to recognise one.

Facts from `profiles/boards/*.toml` (`docs/boards.md` says how to add one). They plan for devices
that have not been measured yet; a measurement always counts for more. Reads no device: what a
machine says of itself is handed in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from profiles.catalogue import Source, read_folder
from profiles.device import DeviceProfile, GpuProfile, PowerProfile
from profiles.link import LinkProfile

GIB = 2**30
# A machine shows less memory than its label (carve-outs, a driver's share), and the next smaller
# variant has at most three quarters of it.
VISIBLE_SHARE = (0.76, 1.05)
# The machine around a card, of which no catalogue can know; assumed. The card sets the limits.
HOST_CORES = 8
HOST_MEMORY_BYTES = 32 * GIB
HOST_IDLE_BYTES = 4 * GIB
DISK_FREE_BYTES = 32 * GIB  # assumed

STRICT: dict[str, Any] = {"extra": "forbid", "allow_inf_nan": False}
Amount = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class Recognition:
    """Names by which a board is known. Whole names; case and "NVIDIA" in front do not matter."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    models: tuple[str, ...] = ()  # /proc/device-tree/model
    compatible: tuple[str, ...] = ()  # any of /proc/device-tree/compatible
    gpus: tuple[str, ...] = ()  # as torch and nvidia-smi print it


@dataclass(frozen=True)
class Memory:
    """What training uses: the card's own memory, or the DRAM that CPU and GPU share."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    label_gib: Amount  # what it is sold as
    visible_gib: Amount  # what the kernel or the driver usually shows of it
    idle_gib: Annotated[float, Field(ge=0)]  # held by system and agent on a headless machine
    bandwidth_gb_per_s: Amount
    unified: bool  # CPU and GPU share it; true for machines without a GPU


@dataclass(frozen=True)
class BoardGpu:
    """The accelerator and what to expect of it before it was measured."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    architecture: str
    compute_capability: Annotated[str, Field(pattern=r"^\d+\.\d$")]
    dense_fp16_tflops: Amount  # fp32 accumulation, no sparsity
    fp32_tflops: Amount  # without tensor cores
    utilisation: Share  # of that, in training

    def assumed_flops(self, *, bf16: bool) -> float:
        """Sustained FLOP/s in training; without bf16 the trainer computes in fp32."""
        return 1e12 * self.utilisation * (self.dense_fp16_tflops if bf16 else self.fp32_tflops)


@dataclass(frozen=True)
class BoardCpu:
    """The processor and what to expect of it before it was measured."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: str
    cores: Annotated[int, Field(ge=1)]
    sustained_gflops: Amount  # fp32, all cores together, after it got warm
    utilisation: Share  # of that, in training

    def assumed_flops(self) -> float:
        """Sustained FLOP/s in training."""
        return 1e9 * self.utilisation * self.sustained_gflops


@dataclass(frozen=True)
class PowerMode:
    """A mode as nvpmodel names it, or a card's limit."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: str
    watts: Amount | None = None  # None: no cap


@dataclass(frozen=True)
class Board:
    """One board or card with one size of memory."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
    title: str
    kind: Literal["jetson", "card", "computer"]
    memory: Memory
    sources: tuple[Source, ...]
    recognise: Recognition = Recognition()
    gpu: BoardGpu | None = None
    cpu: BoardCpu | None = None
    power_modes: tuple[PowerMode, ...] = ()
    no_trainer: str = ""  # why it cannot train, if it cannot
    note: str = ""

    def holds(self, memory_total_bytes: int) -> bool:
        """Whether this much memory is what such a board shows."""
        low, high = VISIBLE_SHARE
        return low <= memory_total_bytes / (self.memory.label_gib * GIB) <= high

    def profile(
        self,
        *,
        link: LinkProfile | None = None,
        memory_cap_bytes: int | None = None,
        power_mode: str = "",
    ) -> DeviceProfile:
        """An idle one of these as the planner would see it, with nothing measured."""
        total = int(self.memory.visible_gib * GIB)
        free = int((self.memory.visible_gib - self.memory.idle_gib) * GIB)
        card = self.kind == "card"
        gpu = None
        if self.gpu is not None:
            gpu = GpuProfile(
                name=self.recognise.gpus[0] if self.recognise.gpus else self.title,
                memory_total_bytes=total,
                memory_free_bytes=free,
                compute_capability=self.gpu.compute_capability,
                unified_memory=self.memory.unified,
            )
        return DeviceProfile(
            board=self.title,
            cpu=self.cpu.name if self.cpu else "",
            cores=self.cpu.cores if self.cpu else HOST_CORES,
            memory_total_bytes=HOST_MEMORY_BYTES if card else total,
            memory_available_bytes=HOST_MEMORY_BYTES - HOST_IDLE_BYTES if card else free,
            disk_free_bytes=DISK_FREE_BYTES,
            agent_version="",
            memory_cap_bytes=memory_cap_bytes,
            gpu=gpu,
            link=link,
            known_board=self.name,
            power=PowerProfile(power_mode) if power_mode else None,
        )


@cache
def _boards() -> dict[str, Board]:
    return read_folder("boards", Board)


def load_boards() -> dict[str, Board]:
    """Every board of the catalogue by its name. Raises `CatalogueError` on a broken file."""
    return dict(_boards())


def recognise(model: str, compatible: Sequence[str], gpu_name: str, memory_total_bytes: int) -> str:
    """The catalogue's name of a machine; "" when it is none of them.

    `memory_total_bytes`: of the card if it has memory of its own, else of the machine; it tells
    variants apart. The model counts before the compatible strings (a carrier's own model names
    nothing, its module still shows there), and both before the GPU, whose name a family shares.
    """
    fitting = [b for b in _boards().values() if b.holds(memory_total_bytes)]
    names = [(b.name, b.recognise) for b in fitting]
    ways = (
        ([model], [(name, known.models) for name, known in names]),
        (compatible, [(name, known.compatible) for name, known in names]),
        ([gpu_name], [(name, known.gpus) for name, known in names]),
    )
    for told, listed in ways:
        said = _plain(told)
        matches = [name for name, known in listed if said & _plain(known)]
        if len(matches) == 1:
            return matches[0]
    return ""


def _plain(names: Iterable[str]) -> frozenset[str]:
    """Without NULs, doubled blanks, capitals and the maker's name in front."""
    tidy = (re.sub(r"[\0\s]+", " ", name).strip().lower() for name in names)
    return frozenset(name.removeprefix("nvidia ") for name in tidy if name)
