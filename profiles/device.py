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
