"""What each device is asked to do in a round: profiles, model and deadline in, plans out.

Decides precision, checkpointing, micro-batch, sketch size k, steps and, if wanted, the length of
the round, and says in words what bound each device. Knows costs only through `profiles.cost`, and
nothing of methods, state or transport.

Memory and time both grow with k, so the largest k of a device is found by bisection, and so is
the smallest deadline at which the fleet covers the rank (`docs/methods.md`, assigning k).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

from profiles.cost import ASSUMED_LINK, Cost, LocalWork, device_peak_bytes, round_seconds
from profiles.device import DeviceProfile
from profiles.errors import SketchfleetError
from profiles.model import ModelShape
from protos.contract import AdapterSpec, Encoding, Part, Payload, Precision
from protos.packing import packed_bytes

AUTO_PRECISIONS: tuple[Precision, ...] = ("bf16", "int8", "nf4")  # most precise first
SHORTEST_ROUND_S = (
    15.0  # of its own choosing: starting a trainer and loading a base is not modelled
)
DEADLINE_STEP_S = 0.1  # a chosen deadline is rounded up to this


class PlanError(SketchfleetError):
    """No device can take part; the message gives every device's reason, `plan` holds them."""

    def __init__(self, sentence: str, plan: RoundPlan) -> None:
        super().__init__(sentence)
        self.plan = plan


class Level(NamedTuple):
    """How large a part a device takes: rows of its slice, and the share of values that travels."""

    rank: int
    density: float


@dataclass(frozen=True)
class PlanPolicy:
    """What the run asks for, and how far the planner may go below it.

    An evaluate-only round has `local_steps` 0 and `evaluates_global`. What varies between devices:
    the rows of their slice, the share of values they send (FLASC), or nothing: then a device
    trains the whole adapter or none. `complement`: a device gets the rows it does not train as a
    frozen branch (Fed-PLoRA).
    """

    rank: int  # r
    precision: Precision | Literal["auto"]
    sequence_tokens: int
    micro_batch: int
    accumulation: int
    local_steps: int
    update_encoding: Encoding
    slice_encoding: Encoding
    global_encoding: Encoding
    evaluation_sequences: int
    max_round_s: float
    round_s: float | None = None  # None: the smallest that reaches the coverage
    min_rank: int = 1
    rank_multiple: int = 1
    min_local_steps: int = 1
    checkpointing: bool | Literal["auto"] = "auto"
    coverage: float = 1.0  # kappa: the sum of k is to reach kappa * r
    varies: Literal["rank", "density", "nothing"] = "rank"
    density: float = 1.0  # the largest
    most_rank: int | None = None  # no device gets more rows
    files: tuple[tuple[Part, ...], ...] = (("up", "down"),)
    update_parts: tuple[Part, ...] = ("up", "down")
    side_rank: int = 0
    complement: bool = False
    evaluates_global: bool = False

    @property
    def measuring(self) -> tuple[bool, ...]:
        """Whether to evaluate the whole adapter: what is wanted, then what may be given up to."""
        if not self.evaluates_global:
            return (False,)
        return (True, False) if self.local_steps else (True,)

    @property
    def deadline_s(self) -> float:
        """The longest a round may be."""
        return self.max_round_s if self.round_s is None else min(self.round_s, self.max_round_s)

    @property
    def levels(self) -> tuple[Level, ...]:
        """What a device may be given, ascending.

        Ranks: multiples, and both ends whether they are multiples or not. Densities: halvings
        down to the share that `min_rank` is of the rank.
        """
        if self.varies == "nothing":
            return (Level(self.rank, self.density),)
        most = min(self.rank, self.most_rank or self.rank)
        low = min(self.min_rank, most)
        if self.varies == "density":
            halvings = max(0, math.floor(math.log2(self.density * self.rank / low) + 1e-9))
            return tuple(Level(self.rank, self.density / 2**i) for i in range(halvings, -1, -1))
        step = max(1, self.rank_multiple)
        inner = (k for k in range(low, most) if k % step == 0)
        return tuple(Level(k, self.density) for k in sorted({low, most, *inner}))


@dataclass(frozen=True)
class DevicePlan:
    """What one device is asked to do, why, and what it is expected to cost."""

    device_id: str
    rank: int  # k
    sketch_offset: int  # first row in each module's permutation
    precision: Precision
    sequence_tokens: int
    micro_batch: int
    accumulation: int
    checkpointing: bool
    local_steps: int
    evaluates_global: bool
    reason: str
    predicted: Cost
    predicted_peak_bytes: int
    density: float = 1.0


@dataclass(frozen=True)
class RoundPlan:
    """A round: its length, who does what (sorted by name), and who was left out and why."""

    round_s: float
    devices: tuple[DevicePlan, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    unfit: frozenset[str] = frozenset()  # left out for memory: no round will be long enough


def plan_round(
    shape: ModelShape,
    spec: AdapterSpec,
    policy: PlanPolicy,
    devices: Mapping[str, DeviceProfile],
    most_rank: Mapping[str, int] | None = None,
) -> RoundPlan:
    """Plans one round. Raises `PlanError` when no device can take part.

    most_rank: by device, rows it is to get at most (HetLoRA's self-pruning). A compute
    measurement of another base than the run's is not used.
    """
    shared = _Sizes(spec, policy)
    left_out: dict[str, str] = {}
    fits: list[_Fit] = []
    for device_id in sorted(devices):
        sizes = shared
        if (cap := (most_rank or {}).get(device_id)) is not None:
            most = min(cap, policy.most_rank or policy.rank)
            sizes = _Sizes(spec, replace(policy, most_rank=most))
        found = _fit_memory(shape, sizes, device_id, _relevant(devices[device_id], spec))
        if isinstance(found, str):
            left_out[device_id] = found
        else:
            fits.append(found)
    unfit = frozenset(left_out)
    round_s = _deadline(policy, fits)
    chosen: list[tuple[_Fit, LocalWork]] = []
    for fit in fits:
        work = fit.within(round_s)
        if work is None:
            left_out[fit.device_id] = fit.too_slow(round_s)
        else:
            chosen.append((fit, work))
    if not chosen:
        whys = "; ".join(left_out[d] for d in sorted(left_out)) or "no device is ready"
        nobody = RoundPlan(round_s, (), left_out, unfit)
        raise PlanError(f"no device can take part in the round: {whys}", nobody)
    plans, offset = [], 0
    for fit, work in chosen:
        plans.append(fit.plan(work, offset % policy.rank, round_s))
        offset += work.rank
    return RoundPlan(round_s, tuple(plans), left_out, unfit)


def _relevant(profile: DeviceProfile, spec: AdapterSpec) -> DeviceProfile:
    stale = profile.compute is not None and profile.compute.base_digest != spec.base_digest
    return replace(profile, compute=None) if stale else profile


class _Sizes:
    """The policy as work of a given k, with packed sizes computed once per k."""

    def __init__(self, spec: AdapterSpec, policy: PlanPolicy) -> None:
        self.spec, self.policy = spec, policy
        self._slices: dict[Level, tuple[int, int]] = {}

    @cached_property
    def global_bytes(self) -> int:
        """The whole adapter and, unless it is fetched to train beside anyway, its branch."""
        p = self.policy
        found = self._files(Level(p.rank, 1.0), p.global_encoding)
        same = p.local_steps and not p.complement and p.global_encoding == p.slice_encoding
        if p.side_rank and not same:
            found += packed_bytes(self.spec, Payload(p.side_rank, p.global_encoding))
        return found

    def at(self, work: LocalWork, level: Level) -> LocalWork:
        """The same work at this level."""
        p, k = self.policy, level.rank
        side = p.side_rank + (p.rank - k if p.complement else 0)
        if level not in self._slices:
            down = self._files(level, p.slice_encoding)
            if side:
                down += packed_bytes(self.spec, Payload(side, p.slice_encoding))
            up = Payload(k, p.update_encoding, p.update_parts, level.density)
            self._slices[level] = (down, packed_bytes(self.spec, up))
        down, up_bytes = self._slices[level] if work.local_steps else (0, 0)
        return replace(
            work,
            rank=k,
            density=level.density,
            side_rank=side if work.local_steps else p.side_rank,
            slice_bytes=down,
            update_bytes=up_bytes,
        )

    def _files(self, level: Level, encoding: Encoding) -> int:
        payloads = (
            Payload(level.rank, encoding, parts, level.density) for parts in self.policy.files
        )
        return sum(packed_bytes(self.spec, payload) for payload in payloads)

    def wanted(self, precision: Precision, *, checkpointing: bool, evaluates: bool) -> LocalWork:
        """What the policy asks for, at its smallest k."""
        p = self.policy
        work = LocalWork(
            precision=precision,
            rank=p.levels[0].rank,
            parameters_per_rank=self.spec.parameters_per_rank,
            global_rank=p.rank,
            sequence_tokens=p.sequence_tokens,
            micro_batch=p.micro_batch,
            accumulation=p.accumulation,
            local_steps=p.local_steps,
            checkpointing=checkpointing,
            evaluation_sequences=p.evaluation_sequences,
            evaluates_global=evaluates,
            slice_bytes=0,
            update_bytes=0,
            global_bytes=self.global_bytes if evaluates else 0,
            dense_parameters=sum(t.out_features * t.in_features for t in self.spec.dense),
        )
        return self.at(work, p.levels[0])


@dataclass(frozen=True)
class _Fit:
    """A device, settings that its memory allows, and the k they allow."""

    shape: ModelShape
    sizes: _Sizes
    device_id: str
    profile: DeviceProfile
    work: LocalWork  # at the lowest level
    levels: tuple[Level, ...]  # those that fit in memory, ascending

    def seconds(self, work: LocalWork) -> float:
        return round_seconds(self.shape, self.profile, work).total_s

    def largest(self, work: LocalWork, deadline_s: float) -> LocalWork | None:
        """`work` at the highest level that memory and deadline allow; None if none is."""
        count = bisect_right(
            self.levels, deadline_s, key=lambda level: self.seconds(self.sizes.at(work, level))
        )
        return self.sizes.at(work, self.levels[count - 1]) if count else None

    def within(self, deadline_s: float) -> LocalWork | None:
        """The most work done by the deadline: k shrinks first, then steps, then measuring."""
        for evaluates in self.sizes.policy.measuring if self.work.evaluates_global else (False,):
            full = self.least(self.sizes.policy.local_steps, evaluates=evaluates)
            if (found := self.largest(full, deadline_s)) is not None:
                return found
            cost = round_seconds(self.shape, self.profile, full)
            left_s = deadline_s - (cost.total_s - cost.train_s)
            steps = math.floor(full.local_steps * left_s / cost.train_s) if cost.train_s else 0
            fewer = self.least(min(steps, full.local_steps), evaluates=evaluates)
            if steps >= self.least_steps and self.seconds(fewer) <= deadline_s:
                return fewer
        return None

    @property
    def least_steps(self) -> int:
        p = self.sizes.policy
        return min(max(1, p.min_local_steps), p.local_steps)

    def least(self, steps: int, *, evaluates: bool) -> LocalWork:
        """The smallest k, this many steps, with or without the whole adapter."""
        size = self.sizes.global_bytes if evaluates else 0
        return replace(self.work, local_steps=steps, evaluates_global=evaluates, global_bytes=size)

    def shortest(self, longest_s: float) -> float | None:
        """Seconds of the least work, measuring if asked; None if even that takes longer."""
        settings = self.sizes.policy.measuring if self.work.evaluates_global else (False,)
        tries = [self.least(self.least_steps, evaluates=evaluates) for evaluates in settings]
        return next((s for s in map(self.seconds, tries) if s <= longest_s), None)

    def too_slow(self, deadline_s: float) -> str:
        work = self.least(self.least_steps, evaluates=self.sizes.policy.measuring[-1])
        cost = round_seconds(self.shape, self.profile, work)
        return (
            f"{self.device_id} is too slow: rank {work.rank} and {_count(work.local_steps, 'step')}"
            f" need {_s(cost.total_s)} (fetch {_s(cost.fetch_s)}, train {_s(cost.train_s)}, "
            f"evaluate {_s(cost.evaluate_s)}, send {_s(cost.push_s)}), the round is "
            f"{_s(deadline_s)}; allow longer rounds or fewer tokens per step"
        )

    def plan(self, work: LocalWork, offset: int, round_s: float) -> DevicePlan:
        cost = round_seconds(self.shape, self.profile, work)
        peak = device_peak_bytes(self.shape, self.profile, work)
        return DevicePlan(
            device_id=self.device_id,
            rank=work.rank,
            sketch_offset=offset,
            precision=work.precision,
            sequence_tokens=work.sequence_tokens,
            micro_batch=work.micro_batch,
            accumulation=work.accumulation,
            checkpointing=work.checkpointing,
            local_steps=work.local_steps,
            evaluates_global=work.evaluates_global,
            reason=_reason(self, work, cost, peak, round_s),
            predicted=cost,
            predicted_peak_bytes=peak,
            density=work.density,
        )


def _fit_memory(
    shape: ModelShape, sizes: _Sizes, device_id: str, profile: DeviceProfile
) -> _Fit | str:
    """Settings for a device's memory, or the sentence why none fits.

    Goes down from what is wanted: checkpointing on, then the micro-batch halved (accumulation
    doubled, so the batch stays), until memory no longer limits k; else takes the largest k seen.
    "auto" takes the most precise base on which that happens. The whole adapter is evaluated
    unless a device could not train beside it.
    """
    p = sizes.policy
    levels = p.levels
    budget = profile.trainer_bytes
    precisions = AUTO_PRECISIONS if p.precision == "auto" else (p.precision,)
    for evaluates in p.measuring:
        best: _Fit | None = None
        for precision in precisions:
            for work in _concessions(sizes, precision, evaluates=evaluates):

                def peak(level: Level, work: LocalWork = work) -> int:
                    return device_peak_bytes(shape, profile, sizes.at(work, level))

                count = bisect_right(levels, budget, key=peak)
                if not count:
                    continue
                if best is None or count > len(best.levels):
                    best = _Fit(shape, sizes, device_id, profile, work, levels[:count])
                if count == len(levels):
                    return best
        if best is not None:
            return best
    least = _concessions(sizes, precisions[-1], evaluates=p.measuring[-1])[-1]
    return (
        f"{device_id} does not fit: needs "
        f"{_gb(device_peak_bytes(shape, profile, least))} at {least.precision} and rank "
        f"{least.rank}, the device has {_gb(budget)}; use a smaller base or a lower precision"
    )


def _concessions(sizes: _Sizes, precision: Precision, *, evaluates: bool) -> list[LocalWork]:
    """Settings from what is wanted to what needs the least memory."""
    wanted = sizes.policy.checkpointing
    work = sizes.wanted(precision, checkpointing=wanted is True, evaluates=evaluates)
    ladder = [work]
    if wanted == "auto":
        work = replace(work, checkpointing=True)
        ladder.append(work)
    while work.micro_batch > 1:
        parts = 2 if work.micro_batch % 2 == 0 else work.micro_batch
        work = replace(
            work,
            micro_batch=work.micro_batch // parts,
            accumulation=work.accumulation * parts,
        )
        ladder.append(work)
    return ladder


def _deadline(policy: PlanPolicy, fits: list[_Fit]) -> float:
    """The given length, or the smallest one that serves the fleet.

    Smallest: the sum of k at full steps reaches coverage * r (or what the longest round would
    reach), and whoever could do the least work within the longest round can still do it.
    """
    longest = policy.deadline_s
    if policy.round_s is not None or not fits:
        return longest

    def covered(deadline_s: float) -> float:
        plans = (fit.largest(fit.work, deadline_s) for fit in fits)
        return sum(w.rank * w.density / policy.density for w in plans if w is not None)

    low = max((s for fit in fits if (s := fit.shortest(longest)) is not None), default=0.0)
    target = min(policy.coverage * policy.rank, covered(longest))
    high = longest
    if covered(low) >= target:
        high = low
    while high - low > DEADLINE_STEP_S / 2:
        middle = (low + high) / 2
        low, high = (low, middle) if covered(middle) >= target else (middle, high)
    tidy = math.ceil(high / DEADLINE_STEP_S) * DEADLINE_STEP_S
    return min(longest, max(SHORTEST_ROUND_S, round(tidy, 1)))


def _reason(fit: _Fit, work: LocalWork, cost: Cost, peak: int, round_s: float) -> str:
    """Which constraint binds k, in numbers, what the other would allow, and what was given up."""
    policy = fit.sizes.policy
    budget = fit.profile.trainer_bytes
    level, top = Level(work.rank, work.density), policy.levels[-1]
    if level == top:
        whole = "the whole rank fits" if level.rank == policy.rank else "no more rows are wanted"
        why = (
            f"{whole}; the round takes {_s(cost.total_s)} of {_s(round_s)}, "
            f"memory {_gb(peak)} of {_gb(budget)}"
        )
    elif level == fit.levels[-1]:
        faster = replace(fit, levels=policy.levels).largest(work, round_s)
        allowed = faster.rank if faster else work.rank
        why = (
            f"memory of {_gb(budget)} allows no more at {work.precision} (this k needs "
            f"{_gb(peak)}); the {_s(round_s)} round would allow {allowed}"
        )
    else:
        why = f"{_time_bound(fit, cost, round_s)}; memory would allow {_named(fit.levels[-1])}"
    return "; ".join([f"k={_named(level)}: {why}", *_concessions_made(policy, work)])


def _named(level: Level) -> str:
    return f"{level.rank}" if level.density == 1 else f"{level.rank} at {level.density:.3g}"


def _time_bound(fit: _Fit, cost: Cost, round_s: float) -> str:
    link = fit.profile.link or ASSUMED_LINK
    assumed = "" if fit.profile.link else " (assumed, not measured)"
    local_s = cost.train_s + cost.evaluate_s
    if local_s > cost.push_s + cost.fetch_s:
        return (
            f"training and evaluating take {_s(local_s)} of a {_s(round_s)} round, moving "
            f"{_mb(cost.up_bytes + cost.down_bytes)} takes {_s(cost.push_s + cost.fetch_s)}"
        )
    moving_s = cost.push_s + cost.fetch_s
    return (
        f"sending {_mb(cost.up_bytes)} at {link.up_bps / 1e6:.3g} Mbit/s and fetching "
        f"{_mb(cost.down_bytes)} at {link.down_bps / 1e6:.3g} Mbit/s{assumed} take {_s(moving_s)} "
        f"of the {_s(round_s - local_s)} left of a {_s(round_s)} round"
    )


def _concessions_made(policy: PlanPolicy, work: LocalWork) -> list[str]:
    made = []
    if work.checkpointing and policy.checkpointing == "auto":
        made.append("checkpointing on to save memory")
    if work.micro_batch < policy.micro_batch:
        made.append(f"micro-batch {work.micro_batch} instead of {policy.micro_batch} for memory")
    if work.local_steps < policy.local_steps:
        made.append(f"{_count(work.local_steps, 'step')} of {policy.local_steps} for time")
    if policy.evaluates_global and not work.evaluates_global:
        made.append("the whole adapter is not evaluated, it would not fit")
    return made


def _s(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.3g} MB"


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e9:.2f} GB"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
