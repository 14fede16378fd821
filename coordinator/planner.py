"""What each device is asked to do in a round: profiles, model and policy in, plans out.

Chooses the length of the round and, with it, every device's settings, so that the time to the
target is least by a simple measure, or work is spread evenly, or bytes are saved (`Aim`). Knows
devices through `coordinator.plan_search` only, and nothing of methods, state or transport.

The measure of a round is progress a second (`docs/devices.md`, what a round brings):

    sqrt(rows) * steps / (length + OVERHEAD_S)      rows: sum of the devices' shares of the rank
                                                    steps: mean share of the wanted steps
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from coordinator.plan_reasons import does_not_fit, reason, too_slow
from coordinator.plan_search import Choice, Search
from coordinator.plan_sizes import Sizes
from coordinator.plan_types import (
    AUTO_SEQUENCES,
    Aim,
    DevicePlan,
    Level,
    PlanError,
    PlanPolicy,
    RoundPlan,
    UpdateTerms,
)
from profiles.cost import NOTHING_LEARNT, Correction
from profiles.device import DeviceProfile
from profiles.model import ModelShape
from protos.contract import AdapterSpec

__all__ = [
    "AUTO_SEQUENCES", "SHORTEST_ROUND_S", "Aim", "DevicePlan", "Level", "PlanError", "PlanPolicy",
    "RoundPlan", "plan_round",
]  # fmt: skip

# Of its own choosing: what starting a trainer and loading a base take is learnt, not modelled.
SHORTEST_ROUND_S = 15.0
OVERHEAD_S = 5.0  # between two rounds: the merge, and the poll that finds the next; assumed
DEADLINE_STEP_S = 0.1  # a chosen deadline is rounded up to this
DEADLINES = 64  # lengths of a round that are compared
# What a row counts beside its steps, tried in turn until the fleet covers the rank.
WIDER = (0.0, 0.25, 1.0, 4.0, 1e6)

# Hysteresis: a device keeps what it did while the new choice brings less than this factor more,
# and what it did would be done in this factor of the round, which closes at 1.25 of its length.
CLEAR_STEP = 1.25
HOLD = 1.2
ROOM_TO_GROW = 0.85  # of its memory that a device's larger task may take, so that it stays

Chosen = dict[str, Choice]


def plan_round(
    shape: ModelShape,
    spec: AdapterSpec,
    policy: PlanPolicy,
    devices: Mapping[str, DeviceProfile],
    most_rank: Mapping[str, int] | None = None,
    *,
    corrections: Mapping[str, Correction] | None = None,
    before: Mapping[str, DevicePlan] | None = None,
    before_s: float | None = None,
    terms: Mapping[str, UpdateTerms] | None = None,
) -> RoundPlan:
    """Plans one round. Raises `PlanError` when no device can take part.

    most_rank: by device, rows it is to get at most (HetLoRA's self-pruning). corrections: what
    reports taught of each device. before, before_s: what each did last, and the length of the
    last round of this kind; devices keep it unless the change is clear. terms: byte budgets of
    updates, and what they lose. A compute measurement of
    another base than the run's is not used.
    """
    shared = Sizes(spec, policy)
    searches: list[Search] = []
    left_out: dict[str, str] = {}
    for device_id in sorted(devices):
        sizes = shared
        if (cap := (most_rank or {}).get(device_id)) is not None:
            most = min(cap, policy.most_rank or policy.rank)
            sizes = Sizes(spec, replace(policy, most_rank=most))
        correction = (corrections or {}).get(device_id, NOTHING_LEARNT)
        profile = _relevant(devices[device_id], spec)
        own = (terms or {}).get(device_id)
        search = Search(shape, sizes, device_id, profile, correction, own)
        if search.offers:
            searches.append(search)
        else:
            left_out[device_id] = does_not_fit(search)
    unfit = frozenset(
        d for d in left_out if not _memory_fits(shape, shared, devices[d], spec, corrections, d)
    )
    fleet = _Fleet(policy, tuple(searches))
    round_s = fleet.length_s(before_s)
    chosen = fleet.chosen(round_s)
    kept = fleet.kept(chosen, before or {}, round_s)
    for search in searches:
        if search.device_id not in kept:
            left_out[search.device_id] = too_slow(search, round_s)
    if not kept:
        whys = "; ".join(left_out[d] for d in sorted(left_out)) or "no device is ready"
        nobody = RoundPlan(round_s, (), left_out, unfit)
        raise PlanError(f"no device can take part in the round: {whys}", nobody)
    plans, offset = [], 0
    for search in searches:
        if (choice := kept.get(search.device_id)) is None:
            continue
        new = chosen.get(search.device_id)
        stays = new is None or choice.work != new.work
        plans.append(_plan(fleet, search, choice, offset % policy.rank, round_s, stays=stays))
        offset += choice.work.rank
    return RoundPlan(round_s, tuple(plans), left_out, unfit)


def _relevant(profile: DeviceProfile, spec: AdapterSpec) -> DeviceProfile:
    stale = profile.compute is not None and profile.compute.base_digest != spec.base_digest
    return replace(profile, compute=None) if stale else profile


def _memory_fits(
    shape: ModelShape,
    sizes: Sizes,
    profile: DeviceProfile,
    spec: AdapterSpec,
    corrections: Mapping[str, Correction] | None,
    device_id: str,
) -> bool:
    """Whether a device would fit were it trusted with its memory again."""
    known = (corrections or {}).get(device_id, NOTHING_LEARNT)
    trusted = replace(known, memory_share=1.0)
    return Search(shape, sizes, device_id, _relevant(profile, spec), trusted).fits_memory


@dataclass(frozen=True)
class _Fleet:
    """The devices that fit, and what the run wants of them together."""

    policy: PlanPolicy
    searches: tuple[Search, ...]

    # --- how long -------------------------------------------------------------------------------

    def length_s(self, before_s: float | None) -> float:
        """The given length, or the one that brings most progress a second.

        Never shorter than the least work of any device that can do some in the longest round:
        every device's code counts. Never so short that rows go untrained which the longest round
        would cover. Stays what it was while that is within a clear step.
        """
        policy, longest = self.policy, self.policy.deadline_s
        if policy.round_s is not None or not self.searches:
            return longest
        shortest = [s for x in self.searches if (s := x.shortest_s(longest)) is not None]
        if not shortest:
            return longest  # nobody can do anything even in this
        # A little longer, so that who is slowest is not cut to one row by its last second.
        low = min(longest, max([SHORTEST_ROUND_S, *(HOLD * s for s in shortest)]))
        lengths = [low * math.pow(longest / low, i / DEADLINES) for i in range(DEADLINES)]
        lengths = sorted({_tidy(s, longest) for s in (*lengths, longest)})
        found = [(s, self.chosen(s)) for s in lengths]
        target = min(policy.coverage, self.coverage(found[-1][1])) - 1e-9
        enough = [(s, c) for s, c in found if self.coverage(c) >= target]
        best_s, best = max(enough, key=lambda pair: (self.progress_per_s(*pair), -pair[0]))
        # The same work in less time, and the same coverage in less work, between two lengths.
        below = max((s for s in lengths if s < best_s), default=low)
        while best_s - below > DEADLINE_STEP_S:
            middle = _tidy((below + best_s) / 2, longest)
            if middle in (below, best_s):
                break
            less = self.chosen(middle)
            better = self.progress_per_s(middle, less) >= self.progress_per_s(best_s, best)
            if self.coverage(less) >= target and better:
                best_s, best = middle, less
            else:
                below = middle
        if before_s is not None and best_s / CLEAR_STEP <= before_s <= best_s * CLEAR_STEP:
            return min(longest, before_s)
        return best_s

    def coverage(self, chosen: Chosen) -> float:
        """How many devices train each row, on average."""
        return math.fsum(choice.offer.share for choice in chosen.values())

    def progress_per_s(self, round_s: float, chosen: Chosen) -> float:
        """Twice as many devices on a row average out noise, 1.4 times; twice the steps are twice
        the progress, up to those that the run wants.
        """
        rows = self.coverage(chosen)
        if not rows:
            return 0.0
        done = math.fsum(
            x.value(chosen[x.device_id]) for x in self.searches if x.device_id in chosen
        )
        return done / (math.sqrt(rows) * (round_s + OVERHEAD_S))

    # --- who does what --------------------------------------------------------------------------

    def chosen(self, round_s: float) -> Chosen:
        """Everybody's choice in a round of this length; who can do nothing in it is not there."""
        match self.policy.aim:
            case "fairest":
                return self._equal(round_s)
            case "cheapest":
                return self._fewest_bytes(round_s)
        first: Chosen | None = None
        for wider in WIDER:
            found = self._each(lambda x, w=wider: x.best(round_s, wider=w))  # type: ignore[misc]
            if self.coverage(found) >= self.policy.coverage - 1e-9:
                return found
            first = found if first is None else first
        return first or {}  # rows go untrained anyway; other ones in every round

    def _each(self, pick: Callable[[Search], Choice | None]) -> Chosen:
        picks = ((x.device_id, pick(x)) for x in self.searches)
        return {device_id: choice for device_id, choice in picks if choice is not None}

    def _equal(self, round_s: float) -> Chosen:
        """The same share of the rows and as many steps for all: the most that everybody can.

        Everybody: who can do the least in a round of this length.
        """
        able = [x for x in self.searches if x.best(round_s) is not None]
        best: Chosen = {}
        most = -1.0
        for share in _shares(able):
            found = {x.device_id: x.best(round_s, most_share=share) for x in able}
            sized = {d: c for d, c in found.items() if c is not None}
            # One that prunes itself, or whose link is metered, may have no such share: its own.
            if len(sized) < len(able):
                continue
            steps = min(choice.steps for choice in sized.values())
            equal = {d: replace(c, steps=steps) for d, c in sized.items()}
            lowest = min(c.offer.share for c in sized.values())
            brings = lowest * (steps if self.policy.local_steps else 1)
            if brings > most + 1e-12:
                capped = {x.device_id: x.best(round_s, most_share=lowest) for x in able}
                best = {d: replace(c, steps=min(steps, c.steps)) for d, c in capped.items() if c}
                best = best if len(best) == len(able) else equal
                most = brings
        return best

    def _fewest_bytes(self, round_s: float) -> Chosen:
        """The smallest part for everybody at which the rank is covered, in the fewest bytes."""
        found: Chosen = {}
        for share in _shares(self.searches):
            found = self._each(
                lambda x, s=share: x.best(round_s, most_share=s, least_bytes=True)  # type: ignore[misc]
            )
            if self.coverage(found) >= self.policy.coverage - 1e-9 and len(found) == len(
                self._each(lambda x: x.best(round_s))
            ):
                break
        return found

    # --- who stays ------------------------------------------------------------------------------

    def kept(self, chosen: Chosen, before: Mapping[str, DevicePlan], round_s: float) -> Chosen:
        """The choices, with what a device did before wherever the new one is not clearly better.

        It is when `CLEAR_STEP` times as much would be done in a round shorter by `HOLD` and, if it
        takes more memory, some is left; or when what the device did before no longer fits. Not
        where rows would go untrained.
        """
        if not before:
            return chosen
        held: Chosen = {}
        sure = self.chosen(round_s / HOLD)
        for x in self.searches:
            new = chosen.get(x.device_id)
            old = x.again(before[x.device_id], HOLD * round_s) if x.device_id in before else None
            if old is not None and not self._clearly_better(x, new, sure.get(x.device_id), old):
                held[x.device_id] = old
            elif new is not None:
                held[x.device_id] = new
        if self.policy.aim == "fairest" and len({_part(c) for c in held.values()}) > 1:
            return chosen  # all or none: a share that only some keep is not equal
        target = min(self.policy.coverage, self.coverage(chosen)) - 1e-9
        return held if self.coverage(held) >= target else chosen

    def _clearly_better(
        self, x: Search, new: Choice | None, sure: Choice | None, old: Choice
    ) -> bool:
        if new is None or sure is None:
            return False
        if new.work.evaluates_global and not old.work.evaluates_global:
            return True  # measuring comes first
        if self.policy.aim == "cheapest":
            fewer = new.offer.moved_bytes * CLEAR_STEP <= old.offer.moved_bytes
            return fewer or x.value(sure) >= CLEAR_STEP * x.value(old)
        if x.value(sure) < CLEAR_STEP * x.value(old) - 1e-9:
            return False
        more = x.peak_bytes(new.work) > x.peak_bytes(old.work)
        return not more or x.peak_bytes(new.work) <= ROOM_TO_GROW * x.memory_bytes


def _part(choice: Choice) -> tuple[float, int]:
    return choice.offer.share, choice.steps


def _shares(searches: Sequence[Search]) -> list[float]:
    """Every share that some device could take, ascending."""
    return sorted({round(o.share, 12) for x in searches for o in x.offers})


def _tidy(seconds: float, longest_s: float) -> float:
    return min(longest_s, round(math.ceil(seconds / DEADLINE_STEP_S - 1e-9) * DEADLINE_STEP_S, 1))


def _plan(
    fleet: _Fleet, search: Search, choice: Choice, offset: int, round_s: float, *, stays: bool
) -> DevicePlan:
    work = choice.work
    return DevicePlan(
        device_id=search.device_id,
        rank=work.rank,
        sketch_offset=offset,
        precision=work.precision,
        sequence_tokens=work.sequence_tokens,
        micro_batch=work.micro_batch,
        accumulation=work.accumulation,
        checkpointing=work.checkpointing,
        local_steps=work.local_steps,
        evaluates_global=work.evaluates_global,
        reason=reason(search, choice, round_s, fleet.policy, stays=stays),
        predicted=search.cost(work),
        predicted_peak_bytes=search.peak_bytes(work),
        density=work.density,
        update_encoding=choice.offer.encoding,
        uncorrected_peak_bytes=search.uncorrected_peak_bytes(work),
        time_factor=search.correction.time,
        budget=choice.offer.budget,
        update=None if choice.offer.fit is None else choice.offer.fit.payload,
        expected_error=choice.offer.error,
    )
