"""What a local round costs a device: peak memory, seconds and bytes, from its profile.

The formulas of `docs/devices.md` with their constants and sources. Predicts only: which settings
to try is the planner's business. Does not know how files are packed: byte counts are handed in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from profiles.device import ComputeProfile, DeviceProfile, GpuProfile
from profiles.link import LinkProfile
from profiles.model import ModelShape

BasePrecision = Literal["nf4", "int8", "bf16", "fp32"]

# Bytes per weight of the adapted linears, measured on loaded models. nf4 with double quantisation:
# 4.127 bit, which is QLoRA's saving of 0.373 bit (arXiv 2305.14314, section 3).
WEIGHT_BYTES: dict[str, float] = {"nf4": 0.5159, "int8": 1.0, "bf16": 2.0, "fp32": 4.0}
QUANTISED = ("nf4", "int8")

# Adapter weight, gradient and two AdamW moments, all fp32 (PEFT keeps adapters in fp32). SGD needs
# half of it; planning for AdamW errs on the safe side.
TRAINED_BYTES = 4 + 4 + 8
HELD_BYTES = 4  # an adapter that is only evaluated: its fp32 weights

RECOMPUTE = (
    1.65  # one layer's recompute and backward transients over its activations; 1.63 measured
)
NO_RECOMPUTE = 0.75  # backward transients without checkpointing; assumed
FORWARD_ONLY = 0.5  # transients of one layer without gradients; assumed, below NO_RECOMPUTE
LOSS_BYTES = 12  # three fp32 (tokens, vocabulary) tensors alive in the loss; 12.06 measured
LOSS_CHUNK_TOKENS = 256  # the trainer computes the loss in chunks of this many tokens
ALLOCATOR_SLACK = 1.07  # assumed

CPU_BASELINE_BYTES = 700 * 2**20  # interpreter, torch, transformers; used until measured
DISCRETE_CONTEXT_BYTES = 2**29  # CUDA context of a discrete card, 0.3 to 0.5 GiB; assumed
UNIFIED_CONTEXT_BYTES = int(1.3 * 2**30)  # CUDA context and host torch share DRAM (Orin); assumed

CALIBRATION_LIMITS = (0.5, 2.0)  # beyond these a measurement says more about the measuring

LINK_EFFICIENCY = 0.9  # of the measured rate that a transfer sustains
FETCH_ROUND_TRIPS = 2  # ask for work, open the stream
PUSH_ROUND_TRIPS = 4  # begin, last chunk acknowledged, commit, report
# A device whose link was never measured: the slower half of home broadband and LTE; assumed.
ASSUMED_LINK = LinkProfile(up_bps=2e6, down_bps=10e6, rtt_s=0.1)

# Sustained rates for a device whose compute was never measured. GPU: 10 TFLOPS dense (Orin Nano,
# the slowest in the catalogue) at 0.20 utilisation. CPU core: 30 GFLOPS (Cortex-A76) at 0.35.
ASSUMED_GPU_FLOPS = 10e12 * 0.20
ASSUMED_CORE_FLOPS = 30e9 * 0.35


@dataclass(frozen=True)
class LocalWork:
    """What one device would be asked to do in one round. `local_steps` 0: evaluate only."""

    precision: BasePrecision
    rank: int  # k, rows that are trained
    parameters_per_rank: int  # c = sum of (in + out) over adapted modules
    global_rank: int  # r, rows of the whole adapter
    sequence_tokens: int
    micro_batch: int
    accumulation: int
    local_steps: int
    checkpointing: bool
    evaluation_sequences: int
    evaluates_global: bool
    slice_bytes: int
    update_bytes: int
    global_bytes: int
    density: float = 1.0  # share of the adapter's values that travels
    side_rank: int = 0  # rows of the frozen branch beside the base
    dense_parameters: int = 0  # of tensors that are trained whole

    @property
    def train_tokens(self) -> int:
        """Tokens through forward, backward and step."""
        return self.local_steps * self.accumulation * self.micro_batch * self.sequence_tokens

    @property
    def evaluations(self) -> int:
        """Passes over the held-out code: the slice before and after, and the whole adapter."""
        return (2 if self.local_steps else 0) + (1 if self.evaluates_global else 0)

    @property
    def evaluation_tokens(self) -> int:
        """Held-out tokens through forward."""
        return self.evaluations * self.evaluation_sequences * self.sequence_tokens


@dataclass(frozen=True)
class Cost:
    """Predicted seconds and bytes of one local round."""

    fetch_s: float
    train_s: float
    evaluate_s: float
    push_s: float
    up_bytes: int
    down_bytes: int

    @property
    def total_s(self) -> float:
        """The whole local round: nothing overlaps."""
        return self.fetch_s + self.train_s + self.evaluate_s + self.push_s


def activation_bytes(shape: ModelShape, rank: int, *, on_gpu: bool) -> int:
    """Bytes that one layer keeps for backward per token, all linears adapted.

    GPU: fp32 adapters under bf16 autocast, as measured. CPU: fp32 compute. There the measured
    count without autocast (16h + 8i + 4kv + 14r at two bytes a value) is doubled, since every
    saved value takes four bytes; norms were fp32 before, so this is a little too much.
    """
    h, i, kv = shape.hidden, shape.intermediate, shape.kv_dim
    if shape.gated:
        wide = (24 if on_gpu else 32) * h + (8 if on_gpu else 16) * i
        return wide + (4 if on_gpu else 8) * kv + (14 if on_gpu else 28) * rank
    wide = (18 if on_gpu else 24) * h + (4 if on_gpu else 8) * i
    return wide + (4 if on_gpu else 8) * kv + (12 if on_gpu else 24) * rank


def weight_bytes(shape: ModelShape, precision: BasePrecision, *, on_gpu: bool) -> int:
    """The frozen base. Embeddings and norms are never quantised: bf16 on GPU, fp32 on CPU.

    A CPU is taken to have no bf16 units, so a bf16 base is held in fp32 there; on one that has
    them the calibration finds the half.
    """
    rest = 2 if on_gpu and precision != "fp32" else 4
    each = WEIGHT_BYTES[precision] if precision in QUANTISED else rest
    return int(shape.linear_parameters * each + shape.other_parameters * rest)


def peak_memory_bytes(
    shape: ModelShape, work: LocalWork, *, baseline_bytes: int, on_gpu: bool
) -> int:
    """Highest memory of the trainer in this work: (W + S + C + D) * 1.07 + baseline, bytes.

    The larger of training k rows and, if asked, evaluating the whole adapter. Counts the
    activations of an adapter on all linears, so fewer target modules are on the safe side.
    Assumes SDPA attention (eager would add heads * sequence per token) and no LoRA dropout.
    """
    compute = 2 if on_gpu else 4  # bf16 autocast on GPU, fp32 on CPU
    tokens = work.micro_batch * work.sequence_tokens
    loss = LOSS_BYTES * shape.vocabulary * min(tokens, LOSS_CHUNK_TOKENS)
    largest = max(out * in_ for _, out, in_ in shape.linears().values())
    dequantised = compute * largest if work.precision in QUANTISED else 0

    def kept(rank: int) -> int:
        return activation_bytes(shape, rank, on_gpu=on_gpu) * tokens

    held = HELD_BYTES * work.side_rank * work.parameters_per_rank
    train = 0.0
    if work.local_steps:
        trained = work.rank * work.parameters_per_rank + work.dense_parameters
        state = TRAINED_BYTES * trained + held
        if work.checkpointing:
            boundary = shape.layers * compute * shape.hidden * tokens
            transient = RECOMPUTE * kept(work.rank)
        else:
            boundary = shape.layers * kept(work.rank)
            transient = NO_RECOMPUTE * kept(work.rank)
        train = state + boundary + max(transient, loss)
    evaluate = 0.0
    if work.evaluates_global:
        state = HELD_BYTES * work.global_rank * work.parameters_per_rank + held
        evaluate = state + max(FORWARD_ONLY * kept(work.global_rank), loss)
    base = weight_bytes(shape, work.precision, on_gpu=on_gpu) + dequantised
    return int((base + max(train, evaluate)) * ALLOCATOR_SLACK) + baseline_bytes


def device_peak_bytes(shape: ModelShape, profile: DeviceProfile, work: LocalWork) -> int:
    """`peak_memory_bytes` on this device, corrected by what its measurement showed.

    The correction is measured / predicted at the measured settings, within [0.5, 2], and only when
    the base had the same precision. The measurement trains without checkpointing.
    """
    on_gpu = profile.gpu is not None and _multiplies_bf16(profile.gpu)
    inside, outside = _baselines(profile)
    predicted = peak_memory_bytes(shape, work, baseline_bytes=inside, on_gpu=on_gpu)
    measured = profile.compute
    if measured is None or measured.precision != work.precision or measured.peak_bytes <= 0:
        return predicted + outside
    probe = _as_measured(work, measured)
    expected = peak_memory_bytes(shape, probe, baseline_bytes=inside, on_gpu=on_gpu)
    low, high = CALIBRATION_LIMITS
    ratio = min(high, max(low, measured.peak_bytes / expected))
    return int(predicted * ratio) + outside


def train_flops_per_token(shape: ModelShape, work: LocalWork) -> float:
    """Forward, backward to the activations, recompute if checkpointing, and the adapter.

    Frozen weights need no gradient of their own: 4N, or 6N with recompute, where full fine-tuning
    needs 6N and 8N. N counts the output head even when tied.
    """
    matmul = shape.linear_parameters + shape.vocabulary * shape.hidden
    passes = 6 if work.checkpointing else 4
    attention = 6 * work.sequence_tokens * shape.hidden * shape.layers
    # A frozen branch needs no gradient of its own.
    branch = (6 if work.checkpointing else 4) * work.side_rank * work.parameters_per_rank
    return float(passes * matmul + attention + _adapter_flops(work, work.rank) + branch)


def round_seconds(shape: ModelShape, profile: DeviceProfile, work: LocalWork) -> Cost:
    """Predicted seconds of this work on this device, from measured rates where there are any."""
    link = profile.link or ASSUMED_LINK
    down = work.slice_bytes + (work.global_bytes if work.evaluates_global else 0)
    rate, forward = _rates(shape, profile, work)
    return Cost(
        fetch_s=_transfer_s(down, link.down_bps, link.rtt_s, FETCH_ROUND_TRIPS),
        train_s=work.train_tokens / rate,
        evaluate_s=work.evaluation_tokens / forward,
        push_s=_transfer_s(work.update_bytes, link.up_bps, link.rtt_s, PUSH_ROUND_TRIPS),
        up_bytes=work.update_bytes,
        down_bytes=down,
    )


def _transfer_s(size_bytes: int, bps: float, rtt_s: float, round_trips: int) -> float:
    """Seconds to move this many bytes, with the calls around them."""
    return 8 * size_bytes / (LINK_EFFICIENCY * max(bps, 1.0)) + round_trips * rtt_s


def _rates(shape: ModelShape, profile: DeviceProfile, work: LocalWork) -> tuple[float, float]:
    """Tokens per second of training and of evaluation.

    A step gets slower with k and with checkpointing in proportion to its FLOPs.
    """
    needed = train_flops_per_token(shape, work)
    measured = profile.compute
    if measured is None:
        flops = ASSUMED_GPU_FLOPS if profile.gpu else ASSUMED_CORE_FLOPS * max(1, profile.cores)
        forward = 2 * (shape.linear_parameters + shape.vocabulary * shape.hidden)
        return flops / needed, flops / forward
    done = train_flops_per_token(shape, _as_measured(work, measured))
    return (
        max(measured.tokens_per_s, 1e-6) * done / needed,
        max(measured.forward_tokens_per_s, 1e-6),
    )


def _adapter_flops(work: LocalWork, rank: int) -> float:
    """Forward 2, backward 4 (it does need its own gradient), recompute 2."""
    return float((8 if work.checkpointing else 6) * rank * work.parameters_per_rank)


def _baselines(profile: DeviceProfile) -> tuple[int, int]:
    """Memory before the base is loaded: (counted in measured peaks, not counted in them)."""
    measured = profile.compute.baseline_bytes if profile.compute else 0
    if profile.gpu is None:
        return measured or CPU_BASELINE_BYTES, 0
    if profile.gpu.unified_memory:  # measured as resident plus allocated
        return max(measured, UNIFIED_CONTEXT_BYTES), 0
    return 0, DISCRETE_CONTEXT_BYTES


def _multiplies_bf16(gpu: GpuProfile) -> bool:
    """Cards before compute capability 8.0 compute in fp32, as a CPU does."""
    major = gpu.compute_capability.partition(".")[0]
    return not major.isdigit() or int(major) >= 8


def _as_measured(work: LocalWork, measured: ComputeProfile) -> LocalWork:
    return replace(
        work,
        rank=measured.rank,
        sequence_tokens=measured.sequence_tokens,
        micro_batch=measured.micro_batch,
        local_steps=1,
        checkpointing=False,
        evaluates_global=False,
        side_rank=0,
        dense_parameters=0,
    )
