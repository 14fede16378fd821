"""What a device is and can do, as probed. Facts only; no probing here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from profiles.link import LinkProfile


@dataclass(frozen=True)
class GpuProfile:
    """One accelerator that torch can use."""

    name: str
    memory_total_bytes: int
    memory_free_bytes: int
    compute_capability: str  # "8.7"; empty where the notion does not apply
    unified_memory: bool  # shares DRAM with the CPU (Jetson, GB10)


@dataclass(frozen=True)
class ComputePoint:
    """Training steps of one size, as measured."""

    sequence_tokens: int
    micro_batch: int
    step_s: float  # forward, backward and optimiser step of one micro-batch
    forward_s: float  # held-out evaluation of one micro-batch
    peak_bytes: int  # as in `ComputeProfile`


@dataclass(frozen=True)
class ComputeProfile:
    """A short real training run of the run's own base model on this device."""

    base_digest: str  # the base it was measured with
    precision: str  # how the base was quantised then
    tokens_per_s: float  # training tokens through forward, backward and step
    forward_tokens_per_s: float  # held-out evaluation, no gradients
    baseline_bytes: int  # resident memory of the trainer before the base is loaded
    peak_bytes: int  # highest resident (CPU) or allocated (GPU) memory during the steps
    rank: int  # of the adapter that was trained
    sequence_tokens: int
    micro_batch: int
    loaded_bytes: int = 0  # resident or allocated with the base loaded, before any step
    small: ComputePoint | None = None  # a second, smaller size: what a step costs however small


@dataclass(frozen=True)
class PowerProfile:
    """How a device is powered and how warm it is."""

    mode: str  # as nvpmodel names it ("25W"); empty where there are no modes
    on_battery: bool | None = None
    battery_percent: float | None = None
    temperature_c: float | None = None  # of the warmest zone that can be read


@dataclass(frozen=True)
class DeviceProfile:
    """What the planner knows of one device. Unknown optional facts are None, never zero."""

    board: str  # "Jetson Orin Nano 8GB", "x86-64 CPU"
    cpu: str
    cores: int
    memory_total_bytes: int
    memory_available_bytes: int
    disk_free_bytes: int
    agent_version: str
    memory_cap_bytes: int | None = None  # cgroup limit or owner's cap on the trainer process
    gpu: GpuProfile | None = None
    compute: ComputeProfile | None = None
    link: LinkProfile | None = None
    known_board: str = ""  # its name in profiles/boards, if it is one of them
    swap_bytes: int = 0  # swap and zram; never planned with
    power: PowerProfile | None = None

    @property
    def trainer_bytes(self) -> int:
        """Memory the trainer process may use, bytes.

        Host memory less a reserve of 8 % (at least 0.5 GiB, `docs/devices.md`) on CPU and on
        unified memory; free memory less 0.3 GiB on a discrete card; never more than the cap.
        """
        if self.gpu is not None and not self.gpu.unified_memory:
            free = self.gpu.memory_free_bytes - int(0.3 * 2**30)
        else:
            reserve = max(2**29, int(0.08 * self.memory_total_bytes))
            free = self.memory_available_bytes - reserve
        cap = self.memory_cap_bytes
        return max(0, free if cap is None else min(free, cap))

    def completed_by(self, kept: DeviceProfile | None) -> DeviceProfile:
        """The same with what an earlier life of the agent measured on the same machine.

        Itself when it was measured in this life, or when the machine is another.
        """
        if kept is None or self.compute is not None:
            return self
        mine = (self.cpu, self.cores, self.memory_total_bytes, self.agent_version)
        if mine != (kept.cpu, kept.cores, kept.memory_total_bytes, kept.agent_version):
            return self
        return replace(self, compute=kept.compute, gpu=kept.gpu, link=kept.link)
