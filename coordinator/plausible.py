"""What a device may claim of itself: numbers that planning can work with.

A device that says it trains 0 tokens a second, or in a precision that nobody knows, is told so; it
would else end the round of everybody, in a division or a table. Whether claims are true is not
known here: what devices report of their rounds corrects them (`corrections`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from profiles.device import ComputeProfile, DeviceProfile
from protos.contract import (
    MOST_EXAMPLES,
    Assignment,
    LocalReport,
    Precision,
    Reason,
    RefusalError,
)

MOST_BYTES, MOST_COUNT, MOST_S, MOST_RATE = 2.0**56, 2.0**24, 1e9, 1e15
LEAST_RATE = 1e-6
Claim = tuple[str, float, float, float]  # name, value, least, most


def require_plausible(profile: DeviceProfile) -> None:
    """Raises `RefusalError` (BAD_REQUEST) on numbers that no device has."""
    if profile.compute is not None and profile.compute.precision not in get_args(Precision):
        raise _refusal("compute.precision", repr(profile.compute.precision[:20]))
    _require(_of_profile(profile))


def require_plausible_report(report: LocalReport) -> None:
    """The same for what a round measured."""
    _require(_of_report(report))


def _require(claims: Iterator[Claim]) -> None:
    for name, value, least, most in claims:
        if not least <= value <= most:
            raise _refusal(name, f"{value:g}")


def _refusal(name: str, value: str) -> RefusalError:
    return RefusalError(
        Reason.BAD_REQUEST, f"this device claims {name} = {value}, which cannot be; measure again"
    )


def _of_profile(p: DeviceProfile) -> Iterator[Claim]:
    yield "cores", p.cores, 0, MOST_COUNT
    for name in ("memory_total_bytes", "memory_available_bytes", "disk_free_bytes", "swap_bytes"):
        yield name, getattr(p, name), 0, MOST_BYTES
    yield "memory_cap_bytes", p.memory_cap_bytes or 0, 0, MOST_BYTES
    if p.gpu is not None:
        yield "gpu.memory_total_bytes", p.gpu.memory_total_bytes, 0, MOST_BYTES
        yield "gpu.memory_free_bytes", p.gpu.memory_free_bytes, 0, MOST_BYTES
    if p.link is not None:
        yield "link.up_bps", p.link.up_bps, 0, MOST_RATE
        yield "link.down_bps", p.link.down_bps, 0, MOST_RATE
        yield "link.rtt_s", p.link.rtt_s, 0, MOST_S
        yield "link.variation", p.link.variation, 0, MOST_S
        yield "link.budget_bytes", p.link.budget_bytes or 0, 0, MOST_BYTES
    if p.compute is not None:
        yield from _of_compute(p.compute)


def _of_compute(c: ComputeProfile) -> Iterator[Claim]:
    yield "compute.tokens_per_s", c.tokens_per_s, LEAST_RATE, MOST_RATE
    yield "compute.forward_tokens_per_s", c.forward_tokens_per_s, LEAST_RATE, MOST_RATE
    for name in ("baseline_bytes", "peak_bytes", "loaded_bytes"):
        yield f"compute.{name}", getattr(c, name), 0, MOST_BYTES
    for name in ("rank", "sequence_tokens", "micro_batch"):
        yield f"compute.{name}", getattr(c, name), 1, MOST_COUNT
    if c.small is not None:
        yield "compute.small.step_s", c.small.step_s, 0, MOST_S
        yield "compute.small.forward_s", c.small.forward_s, 0, MOST_S
        yield "compute.small.peak_bytes", c.small.peak_bytes, 0, MOST_BYTES
        yield "compute.small.sequence_tokens", c.small.sequence_tokens, 1, MOST_COUNT
        yield "compute.small.micro_batch", c.small.micro_batch, 1, MOST_COUNT


def _of_report(r: LocalReport) -> Iterator[Claim]:
    for name in ("fetch_s", "train_s", "evaluate_s", "push_s", "step_s", "load_s", "paused_s",
                 "wait_s", "pack_s", "update_error"):  # fmt: skip
        yield name, getattr(r, name), 0, MOST_S
    for name in ("train_examples", "train_tokens", "trained_parameters", "peak_bytes", "resumes",
                 "fetched_bytes", "pushed_bytes", "resumed_step", "resent_bytes"):  # fmt: skip
        yield name, getattr(r, name), 0, MOST_BYTES
    for curve in r.error_curves:
        for error in curve.errors:
            yield "error_curves", error, 0, MOST_RATE
    for e in r.evaluations:
        yield "tokens", e.tokens, 0, MOST_BYTES
        yield "completions", e.completions, 0, MOST_BYTES


def require_report_fits(report: LocalReport, assignment: Assignment) -> None:
    """Raises `RefusalError` where a report does not answer its assignment."""
    if report.outcome == "done" and assignment.trains and report.train_examples < 1:
        raise RefusalError(Reason.BAD_REQUEST, "a report of training names no examples")
    if not 0 <= report.kept_rank <= assignment.rank:
        raise RefusalError(
            Reason.BAD_REQUEST, f"a report keeps {report.kept_rank} rows of {assignment.rank}"
        )
    for e in report.evaluations:
        told = len(e.example_millinats)
        if told != len(e.example_tokens) or told > MOST_EXAMPLES:
            raise RefusalError(
                Reason.BAD_REQUEST,
                f"a report tells losses of {told} examples and tokens of "
                f"{len(e.example_tokens)}; as many of both, at most {MOST_EXAMPLES}",
            )
        if told and min(e.example_tokens) < 1:
            raise RefusalError(
                Reason.BAD_REQUEST, "a report tells the loss of an example without tokens"
            )
