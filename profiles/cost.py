"""What a local round costs a device in seconds and bytes, from its profile.

The formulas of `docs/devices.md` with their constants and sources; memory is `profiles.memory`.
Predicts only: which settings to try is the planner's business. Does not know how files are packed:
byte counts are handed in.
"""

from __future__ import annotations

from dataclasses import dataclass

from profiles.boards import load_boards
from profiles.device import DeviceProfile
from profiles.link import LinkProfile
from profiles.memory import (
    QUANTISED,
    WEIGHT_BYTES,
    as_measured,
    device_peak_bytes,
    multiplies_bf16,
    peak_memory_bytes,
    reported_peak_bytes,
    weight_bytes,
)
from profiles.model import ModelShape
from profiles.work import NOTHING_LEARNT, BasePrecision, Correction, LocalWork

__all__ = [
    "ASSUMED_CORE_FLOPS", "ASSUMED_GPU_FLOPS", "ASSUMED_LINK", "NOTHING_LEARNT", "QUANTISED",
    "WEIGHT_BYTES", "BasePrecision", "Correction", "Cost", "LocalWork", "device_peak_bytes",
    "forward_flops_per_token", "link_variation", "peak_memory_bytes", "reported_peak_bytes",
    "round_seconds", "train_flops_per_token", "weight_bytes",
]  # fmt: skip

LINK_EFFICIENCY = 0.9  # of the measured rate that a transfer sustains
FETCH_ROUND_TRIPS = 2  # ask for work, open the stream
PUSH_ROUND_TRIPS = 4  # begin, last chunk acknowledged, commit, report
# A device whose link was never measured: the slower half of home broadband and LTE; assumed.
ASSUMED_LINK = LinkProfile(up_bps=2e6, down_bps=10e6, rtt_s=0.1)
# Mean relative error of transfers until the agent has learnt its own; assumed.
WIRED_VARIATION, METERED_VARIATION = 0.2, 0.5
P90 = 1.28  # standard deviations below which 90 % of a normal distribution lie

# Sustained rates for a device whose compute was never measured. GPU: 10 TFLOPS dense (Orin Nano,
# the slowest in the catalogue) at 0.20 utilisation. CPU core: 30 GFLOPS (Cortex-A76) at 0.35.
ASSUMED_GPU_FLOPS = 10e12 * 0.20
ASSUMED_CORE_FLOPS = 30e9 * 0.35

# Products with k of a few are bound by memory: an adapter's FLOPs count so many times.
THIN_PRODUCT = 2.0
# An optimiser's pass over a trained value, in FLOPs of the same processor: it moves 28 bytes.
OPTIMISER_FLOPS = 150.0


@dataclass(frozen=True)
class Cost:
    """Predicted seconds and bytes of one local round. p90_s: in nine rounds of ten, at most."""

    fetch_s: float
    train_s: float
    evaluate_s: float
    push_s: float
    up_bytes: int
    down_bytes: int
    load_s: float = 0.0
    p90_s: float = 0.0

    @property
    def total_s(self) -> float:
        """The whole local round: nothing overlaps."""
        return self.load_s + self.fetch_s + self.train_s + self.evaluate_s + self.push_s


def train_flops_per_token(shape: ModelShape, work: LocalWork) -> float:
    """Forward, backward to the activations, recompute if checkpointing, and the adapter.

    Frozen weights need no gradient of their own: 4N, or 6N with recompute, where full fine-tuning
    needs 6N and 8N. The output head, tied or not, is passed once each way and never recomputed.
    """
    passes = 6 if work.checkpointing else 4
    head = 4 * shape.outputs * shape.hidden
    wide = shape.heads * shape.head_dim * (2 if shape.encodes else 1)
    # Causal attention: half of 2 * 2 products forward, twice that back, forward again. An encoder
    # has the other half too.
    attention = (8 if work.checkpointing else 6) * work.sequence_tokens * wide * shape.layers
    # The adapter does need its own gradient; a frozen branch does not.
    adapter = (passes + 2) * THIN_PRODUCT * work.rank * work.parameters_per_rank
    branch = passes * work.side_rank * work.parameters_per_rank
    return float(passes * shape.linear_parameters + head + attention + adapter + branch)


def forward_flops_per_token(shape: ModelShape, work: LocalWork) -> float:
    """Evaluation: one pass, of base, head, attention and adapter."""
    matmul = shape.linear_parameters + shape.outputs * shape.hidden
    wide = shape.heads * shape.head_dim * (2 if shape.encodes else 1)
    attention = 2 * work.sequence_tokens * wide * shape.layers
    beside = (THIN_PRODUCT * work.rank + work.side_rank) * work.parameters_per_rank
    return float(2 * matmul + attention + 2 * beside)


def round_seconds(
    shape: ModelShape,
    profile: DeviceProfile,
    work: LocalWork,
    correction: Correction = NOTHING_LEARNT,
) -> Cost:
    """Predicted seconds of this work on this device, from measured rates where there are any.

    p90 is mean * (1 + 1.28 v) of transfers and of compute, each with its own v, and their sum:
    on the safe side, for both are seldom late at once.
    """
    link = profile.link or ASSUMED_LINK
    down = work.slice_bytes + (work.global_bytes if work.evaluates_global else 0)
    fetch_s = _transfer_s(down, link.down_bps, link.rtt_s, FETCH_ROUND_TRIPS)
    push_s = _transfer_s(work.update_bytes, link.up_bps, link.rtt_s, PUSH_ROUND_TRIPS)
    step_s, forward_s = _micro_steps_s(shape, profile, work)
    train_s = work.micro_steps * step_s * correction.time
    evaluated = work.evaluations * work.evaluation_sequences / work.micro_batch
    evaluate_s = evaluated * forward_s * correction.time
    moving, computing = fetch_s + push_s, train_s + evaluate_s
    p90_s = correction.load_s + moving * (1 + P90 * link_variation(profile.link))
    p90_s += computing * (1 + P90 * correction.variation)
    return Cost(
        fetch_s=fetch_s,
        train_s=train_s,
        evaluate_s=evaluate_s,
        push_s=push_s,
        up_bytes=work.update_bytes,
        down_bytes=down,
        load_s=correction.load_s,
        p90_s=p90_s,
    )


def link_variation(link: LinkProfile | None) -> float:
    """Mean relative error of a link's transfers, as learnt or assumed."""
    if link is not None and link.variation > 0:
        return link.variation
    return METERED_VARIATION if link is not None and link.metered else WIRED_VARIATION


def _transfer_s(size_bytes: int, bps: float, rtt_s: float, round_trips: int) -> float:
    """Seconds to move this many bytes, with the calls around them; none for none."""
    if not size_bytes:
        return 0.0
    return 8 * size_bytes / (LINK_EFFICIENCY * max(bps, 1.0)) + round_trips * rtt_s


def _micro_steps_s(
    shape: ModelShape, profile: DeviceProfile, work: LocalWork
) -> tuple[float, float]:
    """Seconds of one micro-batch: of training it, and of evaluating it.

    Two measured sizes give a cost of every pass, whatever its size (dequantised weights, kernel
    launches), and one per FLOP. Of training, the former is paid once more with checkpointing.
    """
    train = _step_flops(shape, work)
    forward = forward_flops_per_token(shape, work) * work.step_tokens
    measured = profile.compute
    if measured is None:
        flops = _assumed_flops(profile)
        return train / flops, forward / flops
    large = as_measured(work, measured)
    tokens = large.step_tokens
    at = _step_flops(shape, large), forward_flops_per_token(shape, large) * tokens
    took = (
        tokens / max(measured.tokens_per_s, 1e-6),
        tokens / max(measured.forward_tokens_per_s, 1e-6),
    )
    passes, at_small, took_small = (1.5 if work.checkpointing else 1.0), at, took
    if measured.small is not None and measured.small.step_s > 0:
        small = as_measured(work, measured, small=True)
        forward_at = forward_flops_per_token(shape, small) * small.step_tokens
        at_small = _step_flops(shape, small), forward_at
        took_small = measured.small.step_s, measured.small.forward_s
    step_fixed, per_flop = _line(at_small[0], took_small[0], at[0], took[0])
    pass_fixed, per_forward = _line(at_small[1], took_small[1], at[1], took[1])
    return passes * step_fixed + per_flop * train, pass_fixed + per_forward * forward


def _step_flops(shape: ModelShape, work: LocalWork) -> float:
    """A micro-batch with its share of the optimiser step."""
    pass_ = train_flops_per_token(shape, work) * work.step_tokens
    return pass_ + OPTIMISER_FLOPS * work.trained_parameters / max(1, work.accumulation)


def _line(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float]:
    """(fixed, slope) through two points; through the second and zero where that makes no sense."""
    if x1 > x0 and y1 > y0:
        slope = (y1 - y0) / (x1 - x0)
        if y1 - slope * x1 >= 0:
            return y1 - slope * x1, slope
    return 0.0, y1 / x1


def _assumed_flops(profile: DeviceProfile) -> float:
    """Sustained FLOP/s of a device that was never measured: its board's, if that is known."""
    board = load_boards().get(profile.known_board)
    if profile.gpu is not None:
        if board is None or board.gpu is None:
            return ASSUMED_GPU_FLOPS
        return board.gpu.assumed_flops(bf16=multiplies_bf16(profile.gpu))
    if board is None or board.cpu is None:
        return ASSUMED_CORE_FLOPS * max(1, profile.cores)
    return board.cpu.assumed_flops()
