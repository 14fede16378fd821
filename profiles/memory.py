"""Peak memory of a local round, bytes, from the model's shape, the work and the device's probe.

What autograd keeps is counted exactly (`tests/profiles/test_memory.py` counts the tensors); what
libraries add is measured per device by its probe at two sizes. Every constant names its source:
*profiled* is torch's own record of allocations over one step of random Llama, Qwen 2 and
StarCoder 2 models (torch 2.13, transformers 5, CPU). Knows no seconds and chooses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from profiles.device import ComputeProfile, DeviceProfile, GpuProfile
from profiles.model import ModelShape
from profiles.work import NOTHING_LEARNT, BasePrecision, Correction, LocalWork

# Bytes per weight of the adapted linears, measured on loaded models. nf4 with double quantisation:
# 4.127 bit, which is QLoRA's saving of 0.373 bit (arXiv 2305.14314, section 3).
WEIGHT_BYTES: dict[str, float] = {"nf4": 0.5159, "int8": 1.0, "bf16": 2.0, "fp32": 4.0}
QUANTISED = ("nf4", "int8")

ADAPTER_BYTES = 4 + 4  # weight and gradient, both fp32 (PEFT keeps adapters in fp32)
# AdamW: two fp32 moments. 8 bit: two of a byte each (Dettmers et al., arXiv 2110.02861), and their
# block scales, 2 * 4 bytes in 256 values. SGD without momentum keeps nothing.
MOMENT_BYTES = {"adamw": 8.0, "adamw8bit": 2.0 + 8 / 256, "sgd": 0.0}
RECEIVED_BYTES = 4  # the trainer keeps what it received, fp32 in host memory (`local_round`)
LEAVING_BYTES = 4 + 4 + 4  # trained values, their difference and its packed form, at the end
HELD_BYTES = 4  # an adapter or branch that is only evaluated: its fp32 weights

# One layer's transient gradients on the way back, bytes per token in units of the MLP's width.
# Profiled: fp32 8 (all linears) to 12 (q and v only), bf16 4 to 10, nf4 3 to 7, int8 on CPU 25 to
# 30, where bitsandbytes multiplies in fp32. On cards int8 is assumed to be as bf16.
TRANSIENT_WIDTHS: dict[str, float] = {"fp32": 10.0, "bf16": 9.0, "nf4": 6.0, "int8": 9.0}
INT8_CPU_WIDTHS = 30.0
INT8_CPU_WEIGHT = 8  # bytes per value of the one weight that is dequantised; profiled 8.2
FORWARD_ONLY = 0.5  # activations of one layer without gradients, over those kept; assumed

# Projections that read what attention keeps anyway.
AFTER_ATTENTION = ("o_proj", "attention.output.dense")

LOSS_CHUNK_TOKENS = 256  # the trainer computes the loss in chunks of this many tokens
# Bytes per token of a chunk and entry of the vocabulary: fp32 logits turned in place into what
# goes back; bf16 adds a bf16 copy of either; a card cannot do it in place (`loss.py`).
LOSS_BYTES = {"fp32": 4, "bf16": 6, "card": 10}

ALLOCATOR_SLACK = 1.07  # of an unmeasured device; assumed
CPU_BASELINE_BYTES = 700 * 2**20  # interpreter, torch, transformers; used until measured
LOADING_BYTES = 100 * 2**20  # libraries that loading a base imports; 80 to 150 MB measured
DISCRETE_CONTEXT_BYTES = 2**29  # CUDA context of a discrete card, 0.3 to 0.5 GiB; assumed
UNIFIED_CONTEXT_BYTES = int(1.3 * 2**30)  # CUDA context and host torch share DRAM (Orin); assumed

SAFETY = 1.05  # on what a device is asked for, over what is expected of it


@dataclass(frozen=True)
class Machine:
    """What of a device decides the bytes of the same work."""

    compute_bytes: int  # of a value in the products: 2 where bf16 is multiplied, else 4
    on_card: bool  # a GPU computes
    shares_host: bool  # trainer and base lie in the same memory: CPU, or unified

    @property
    def loss_bytes(self) -> int:
        """Per token of a chunk and entry of the vocabulary."""
        return LOSS_BYTES["card" if self.on_card else "fp32" if self.compute_bytes == 4 else "bf16"]


def machine_of(shape: ModelShape, profile: DeviceProfile, precision: BasePrecision) -> Machine:
    """How this device computes with a base of this precision.

    Cards before compute capability 8.0 compute in fp32. A processor does too, unless the base as
    loaded takes less than it would in fp32.
    """
    gpu = profile.gpu
    if gpu is not None:
        wide = 4 if precision == "fp32" or not multiplies_bf16(gpu) else 2
        return Machine(wide, on_card=True, shares_host=gpu.unified_memory)
    wide = 2 if precision != "fp32" and _cpu_multiplies_bf16(shape, profile.compute) else 4
    return Machine(wide, on_card=False, shares_host=True)


def multiplies_bf16(gpu: GpuProfile) -> bool:
    """Whether a card has bf16 units; one that does not say is taken to be new."""
    major = gpu.compute_capability.partition(".")[0]
    return not major.isdigit() or int(major) >= 8


def _cpu_multiplies_bf16(shape: ModelShape, measured: ComputeProfile | None) -> bool:
    if measured is None or measured.precision == "fp32" or not measured.loaded_bytes:
        return False
    taken = measured.loaded_bytes - measured.baseline_bytes
    narrow, wide = (_base_bytes(shape, measured.precision, n) for n in (2, 4))  # type: ignore[arg-type]
    # Importing what loads a base takes memory too, so the nearer of the two with that added.
    return taken < (narrow + wide) / 2 + LOADING_BYTES


def weight_bytes(shape: ModelShape, precision: BasePrecision, *, on_gpu: bool) -> int:
    """The frozen base; embeddings and norms are never quantised.

    on_gpu: in bf16 where it is asked for, as any card from compute capability 8.0 does; else in
    fp32, as a processor without bf16 units does.
    """
    return _base_bytes(shape, precision, 2 if on_gpu and precision != "fp32" else 4)


def _base_bytes(shape: ModelShape, precision: BasePrecision, compute_bytes: int) -> int:
    each = WEIGHT_BYTES[precision] if precision in QUANTISED else compute_bytes
    return int(shape.linear_parameters * each + shape.other_parameters * compute_bytes)


def activation_bytes(
    shape: ModelShape, rank: int, targets: tuple[str, ...] = (), *, compute_bytes: int
) -> int:
    """Bytes that one layer keeps for backward per token: exactly what autograd saves.

    Attention keeps rotated queries and keys, values, its output and a log-sum; an RMS norm an fp32
    copy, a LayerNorm its input; the MLP what its product and activation need; an encoder is taken
    to keep what a decoder of its dimensions with a plain MLP does. An adapted module
    adds its input and k fp32 values: in fp32 the input is shared by all that read it, in bf16 each
    adapter has an fp32 copy of its own. SDPA attention, no dropout. Qwen 3 and Gemma 2 keep a
    little more for norms of their own.
    """
    h, i, kv, b = shape.hidden, shape.intermediate, shape.kv_dim, compute_bytes
    q = shape.heads * shape.head_dim
    attention = b * (2 * q + 2 * kv) + 4 * shape.heads
    norms = 2 * (4 * h + 4) if shape.gated else 2 * (b * h + b)
    norms += 0 if shape.gated else 2 * b
    mlp = (3 if shape.gated else 1) * b * i
    linears, adapted = shape.linears(), shape.adapted(targets)
    inputs = {name: linears[name][2] for name in adapted}
    if b == 4:
        kept = {_reads(name): size for name, size in inputs.items() if name not in AFTER_ATTENTION}
        adapters = 4 * sum(kept.values())
    else:
        adapters = 4 * sum(inputs.values())
    return attention + norms + mlp + adapters + 4 * rank * len(adapted)


def _reads(name: str) -> str:
    """What a projection reads, so that those which read the same are told."""
    if name in ("q_proj", "k_proj", "v_proj", "query", "key", "value"):
        return "attention"
    return "mlp" if name in ("gate_proj", "up_proj", "c_fc") else name


@dataclass(frozen=True)
class Parts:
    """A peak, less what lies in memory before any work: `state` is exact, `moving` estimated."""

    state: float
    moving: float


def parts_of(
    shape: ModelShape, work: LocalWork, machine: Machine, *, reports: bool = True
) -> Parts:
    """What the work adds to a loaded base at its highest: training, packing or evaluating.

    reports: the adapter came with an assignment and goes back; a probe's does not.
    """
    tokens, c = work.step_tokens, work.parameters_per_rank
    loss = machine.loss_bytes * shape.outputs * min(tokens, LOSS_CHUNK_TOKENS)
    hidden = machine.compute_bytes * shape.hidden * tokens
    # Final states, their gradient, and the token-wide inputs of attention masks and positions.
    fixed = _dequantised(shape, work, machine) + 3 * hidden
    branch = (machine.compute_bytes + (HELD_BYTES if machine.shares_host else 0)) * (
        work.side_rank * c
    )
    found = [Parts(branch, fixed)]
    if work.local_steps:
        trained = work.trained_parameters
        received = RECEIVED_BYTES * trained if machine.shares_host and reports else 0
        # While one adapter trains, the values of the other are held; one after the other trains.
        received += HELD_BYTES * trained if machine.shares_host and work.local_only else 0
        state = (ADAPTER_BYTES + MOMENT_BYTES[work.optimizer]) * trained + received + branch
        kept = tokens * activation_bytes(
            shape, work.rank, work.targets, compute_bytes=machine.compute_bytes
        )
        back = tokens * shape.intermediate * _widths(work, machine)
        if work.checkpointing:
            moving = shape.layers * hidden + max(kept + back, loss)
        else:
            moving = shape.layers * kept + max(back, loss)
        found.append(Parts(state, moving + fixed))
        if machine.shares_host and reports:
            found.append(Parts(state + LEAVING_BYTES * trained, 0.0))
    if work.evaluates_global:
        whole = HELD_BYTES * work.global_rank * c * (2 if machine.shares_host else 1)
        each = activation_bytes(
            shape, work.global_rank, work.targets, compute_bytes=machine.compute_bytes
        )
        passing = FORWARD_ONLY * tokens * each
        found.append(Parts(whole + branch, max(passing, loss) + fixed))
    return max(found, key=lambda part: part.state + part.moving)


def _widths(work: LocalWork, machine: Machine) -> float:
    if work.precision == "int8" and not machine.on_card:
        return INT8_CPU_WIDTHS
    if machine.compute_bytes == 4:
        return TRANSIENT_WIDTHS["fp32"]
    return TRANSIENT_WIDTHS[work.precision]


def _dequantised(shape: ModelShape, work: LocalWork, machine: Machine) -> int:
    """The one weight that is dequantised at a time."""
    if work.precision not in QUANTISED:
        return 0
    largest = max(out * in_ for _, out, in_ in shape.linears().values())
    slow = work.precision == "int8" and not machine.on_card
    return largest * (INT8_CPU_WEIGHT if slow else machine.compute_bytes)


def peak_memory_bytes(
    shape: ModelShape, work: LocalWork, *, baseline_bytes: int, machine: Machine
) -> int:
    """Highest memory of the trainer in this work on a device that was never measured."""
    parts = parts_of(shape, work, machine)
    base = _base_bytes(shape, work.precision, machine.compute_bytes)
    return int((base + parts.state + parts.moving) * ALLOCATOR_SLACK) + baseline_bytes


def reported_peak_bytes(shape: ModelShape, profile: DeviceProfile, work: LocalWork) -> int:
    """What `LocalReport.peak_bytes` of this device is expected to be after this work.

    With a probe: the loaded base, exchanged where the probe had another precision, what the work
    adds by the formula, and what the probe showed to be taken beside (`_waste`).
    """
    machine = machine_of(shape, profile, work.precision)
    inside, _ = _baselines(profile)
    measured = profile.compute
    if measured is None or measured.peak_bytes <= 0:
        return peak_memory_bytes(shape, work, baseline_bytes=inside, machine=machine)
    probed = machine_of(shape, profile, measured.precision)  # type: ignore[arg-type]
    at_probe = _base_bytes(shape, measured.precision, probed.compute_bytes)  # type: ignore[arg-type]
    here = _base_bytes(shape, work.precision, machine.compute_bytes)
    loaded = measured.loaded_bytes or inside + at_probe
    parts = parts_of(shape, work, machine)
    waste = _waste(shape, work, measured, probed, loaded)
    return int(loaded - at_probe + here + parts.state + parts.moving + waste)


def device_peak_bytes(
    shape: ModelShape,
    profile: DeviceProfile,
    work: LocalWork,
    correction: Correction = NOTHING_LEARNT,
) -> int:
    """Highest memory of this work on this device: what is expected to be reported, corrected by
    what earlier reports taught, and the context of a discrete card, which no report counts.
    """
    _, outside = _baselines(profile)
    return int(reported_peak_bytes(shape, profile, work) * correction.memory) + outside


def _waste(
    shape: ModelShape, work: LocalWork, measured: ComputeProfile, machine: Machine, loaded: int
) -> float:
    """What the allocator and libraries hold beside the tensors, in this work.

    A heap that tensors of many sizes come and go through has gaps. They grow with the tokens of a
    micro-batch and hardly with what is kept at once: measured, recomputing leaves them as they are
    (`benchmarks/cost_model.py`). So they are a line through the probe's two sizes.
    """
    large = _beyond(shape, as_measured(work, measured), machine, measured.peak_bytes - loaded)
    small = measured.small
    if small is None or small.peak_bytes <= 0:
        return large * work.step_tokens / (measured.micro_batch * measured.sequence_tokens)
    less = as_measured(work, measured, small=True)
    little = _beyond(shape, less, machine, small.peak_bytes - loaded)
    tokens, fewer = measured.micro_batch * measured.sequence_tokens, less.step_tokens
    slope = max(0.0, (large - little) / max(1, tokens - fewer))
    return max(0.0, large - slope * tokens) + slope * work.step_tokens


def _beyond(shape: ModelShape, probe: LocalWork, machine: Machine, above_bytes: int) -> float:
    """Of what a probe took above the loaded base, that which the formula does not hold."""
    parts = parts_of(shape, probe, machine, reports=False)
    return max(0.0, above_bytes - parts.state - parts.moving)


def as_measured(work: LocalWork, measured: ComputeProfile, *, small: bool = False) -> LocalWork:
    """The work of a probe: one step of AdamW without checkpointing, branch or dense tensors."""
    point = measured.small if small and measured.small is not None else measured
    return replace(
        work,
        precision=measured.precision,  # type: ignore[arg-type]
        rank=measured.rank,
        sequence_tokens=point.sequence_tokens,
        micro_batch=point.micro_batch,
        accumulation=1,
        local_steps=1,
        checkpointing=False,
        evaluates_global=False,
        side_rank=0,
        dense_parameters=0,
        optimizer="adamw",
    )


def _baselines(profile: DeviceProfile) -> tuple[int, int]:
    """Memory before the base is loaded: (counted in measured peaks, not counted in them)."""
    measured = profile.compute.baseline_bytes if profile.compute else 0
    if profile.gpu is None:
        return measured or CPU_BASELINE_BYTES, 0
    if profile.gpu.unified_memory:  # measured as resident plus allocated
        return max(measured, UNIFIED_CONTEXT_BYTES), 0
    return 0, DISCRETE_CONTEXT_BYTES
