"""What one device could do in a round: every setting that run.toml leaves open, with its cost.

Each `Offer` fits the device's memory and bytes; how long it takes grows with its steps, so that
for any deadline the best of them is found at once. Knows costs through `profiles.cost` only, and
nothing of other devices: the length of a round and who covers what are `coordinator.planner`'s.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from coordinator.plan_sizes import Sizes
from coordinator.plan_types import DevicePlan, Level, UpdateTerms
from profiles.cost import (
    Correction,
    Cost,
    LocalWork,
    device_peak_bytes,
    reported_peak_bytes,
    round_seconds,
)
from profiles.device import DeviceProfile
from profiles.memory import SAFETY
from profiles.model import ModelShape
from protos.contract import Encoding, Precision, UpdateBudget
from protos.fitting import Fit

# How much of a step's progress is left in less exact settings. Small, so that they only decide
# between offers of about the same size: 4-bit bases tune as well as 16-bit ones (QLoRA, arXiv
# 2305.14314, table 4), and int8 updates are rounded without bias. Halving a sequence costs
# context; assumed.
BASE_QUALITY: dict[Precision, float] = {"fp32": 1.0, "bf16": 1.0, "int8": 0.995, "nf4": 0.99}
ENCODING_QUALITY: dict[Encoding, float] = {
    "float32": 1.0, "bfloat16": 0.999, "int8": 0.998, "int4": 0.99, "int2": 0.95, "sign": 0.9,
}  # fmt: skip
SHORTER_QUALITY = 0.97
HALVINGS = 4  # of a byte budget that are tried, where a slow link may not carry all in time
METERED_SHARE = 0.5  # of what a device would send at most, where bytes cost its owner money


@dataclass(frozen=True)
class Offer:
    """One thing that a device could do, at all the steps that are wanted."""

    work: LocalWork
    encoding: Encoding
    share: float  # of the rows, or of the values
    quality: float
    rest_s: float  # in nine rounds of ten, at most, without any step
    step_s: float  # of each step
    budget: UpdateBudget | None = None  # the device chooses
    fit: Fit | None = None  # what it is expected to choose
    arrives: float = 1.0  # of the rows' update, in squares: 1 less what the fit loses

    @property
    def budget_bytes(self) -> int:
        """Of its update, at most; 0 without a budget."""
        return 0 if self.budget is None else self.budget.size_bytes

    @property
    def error(self) -> float | None:
        """Of what arrives, against an update of all rows; None where no budget asks for it."""
        return None if self.fit is None else 1 - self.share * self.arrives

    @property
    def level(self) -> Level:
        """How large a part it is."""
        return Level(self.work.rank, self.work.density)

    @property
    def moved_bytes(self) -> int:
        """Both ways together."""
        down = self.work.slice_bytes + (self.work.global_bytes * self.work.evaluates_global)
        return self.work.update_bytes + down

    def p90_s(self, steps: int) -> float:
        """In nine rounds of ten, at most."""
        return self.rest_s + steps * self.step_s


@dataclass(frozen=True)
class Choice:
    """An offer and how many steps of it."""

    offer: Offer
    steps: int

    @property
    def work(self) -> LocalWork:
        """What is asked for."""
        return replace(self.offer.work, local_steps=self.steps)

    @property
    def p90_s(self) -> float:
        """In nine rounds of ten, at most."""
        return self.offer.p90_s(self.steps)


class Search:
    """What a device can do within its memory and its bytes."""

    def __init__(
        self,
        shape: ModelShape,
        sizes: Sizes,
        device_id: str,
        profile: DeviceProfile,
        correction: Correction,
        terms: UpdateTerms | None = None,
    ) -> None:
        self.shape, self.sizes, self.device_id = shape, sizes, device_id
        self.profile, self.correction = profile, correction
        self.terms = terms or UpdateTerms()
        self.policy = sizes.policy

    # --- what bounds it -------------------------------------------------------------------------

    @property
    def memory_bytes(self) -> int:
        """What the trainer may use, less what it is not trusted with after running out."""
        return int(self.profile.trainer_bytes * self.correction.memory_share)

    @property
    def most_steps(self) -> int:
        """Fewer than wanted after a failure."""
        p = self.policy
        return max(self.least_steps, math.ceil(p.local_steps * self.correction.work_share))

    @property
    def least_steps(self) -> int:
        """Below these a device does not take part."""
        return min(max(1, self.policy.min_local_steps), self.policy.local_steps)

    @cached_property
    def budget_bytes(self) -> int | None:
        """Bytes for this round: the owner's budget spread over the rounds that are left."""
        link = self.profile.link
        if link is None or link.budget_bytes is None:
            return None
        least = min((offer.moved_bytes for offer in self._fitting), default=0)
        fair = link.budget_bytes // max(1, self.policy.rounds_left)
        return min(link.budget_bytes, max(fair, least))

    @cached_property
    def most_share(self) -> float:
        """Metered links send half of what they could at most, where that may vary."""
        shares = [self.policy.share(level) for level in self.policy.levels]
        if self.profile.link is None or not self.profile.link.metered:
            return shares[-1]
        return max(shares[0], METERED_SHARE * shares[-1])

    def peak_bytes(self, work: LocalWork) -> int:
        """Expected, corrected, with the safety that a gate wants."""
        return int(SAFETY * device_peak_bytes(self.shape, self.profile, work, self.correction))

    def cost(self, work: LocalWork) -> Cost:
        """Seconds and bytes."""
        return round_seconds(self.shape, self.profile, work, self.correction)

    # --- what it could do -----------------------------------------------------------------------

    @cached_property
    def _fitting(self) -> tuple[Offer, ...]:
        """Everything that fits in memory; measuring the whole adapter only where that fits."""
        for evaluates in self.policy.measuring:
            found = tuple(
                offer
                for precision in self.policy.precisions
                for sequence in self.policy.sequences
                for offer in self._in_memory(precision, sequence, evaluates=evaluates)
            )
            if found:
                if evaluates and self.policy.local_steps:
                    found += tuple(self._without_measuring(offer) for offer in found)
                return found
        return ()

    def _in_memory(
        self, precision: Precision, sequence: int, *, evaluates: bool
    ) -> Iterator[Offer]:
        """For each level that fits in some way, the fastest of these ways."""
        p, encoding = self.policy, self.policy.encodings[0]
        levels = p.levels if p.local_steps else p.levels[-1:]
        works = [
            self.sizes.work(precision, sequence, encoding, level, evaluates=evaluates)
            for level in levels
        ]
        ways = [list(self.sizes.variants(work)) for work in works]
        if not ways:
            return
        counts = []  # of levels that fit, by way: memory grows with the level
        for way in range(len(ways[0])):
            at_level = [ways[i][way] for i in range(len(levels))]
            counts.append(bisect_right(at_level, self.memory_bytes, key=self.peak_bytes))
        # Which way is fastest hardly depends on the level, and must not waver with it.
        order = sorted(range(len(counts)), key=lambda way: (self.cost(ways[0][way]).p90_s, way))
        quality = BASE_QUALITY[precision]
        quality *= SHORTER_QUALITY ** math.log2(p.sequences[0] / sequence)
        for i, level in enumerate(levels):
            fits = [w for w in order if counts[w] > i]
            if not fits:
                return
            way = fits[0]
            yield from self._fitted(ways[i][way], level, quality)
            if self.terms.size_bytes is not None and p.local_steps:
                continue
            for wire in p.encodings:
                work = ways[i][way]
                if wire != encoding:
                    size = p.update(level, wire)
                    work = replace(
                        work, update_bytes=self.sizes.bytes_of(size) if p.local_steps else 0
                    )
                yield self._offer(work, wire, quality * ENCODING_QUALITY[wire])

    def _fitted(self, work: LocalWork, level: Level, quality: float) -> Iterator[Offer]:
        """The work with updates of least error in all the bytes that there are, and in halves.

        Halves, for a slow link may not carry all in time. An owner's budget counts where the run
        leaves the encoding open.
        """
        p, most = self.policy, self._update_bytes(work)
        if most is None or not p.local_steps:
            return
        for halving in range(HALVINGS):
            budget = p.budget(most >> halving)
            fit = self.sizes.fit(level, budget, self.terms.curves)
            if fit is None:
                return
            arrives = fit.arrives(fed_back=p.feeds_back)
            fitted = replace(work, update_bytes=fit.size_bytes)
            offer = self._offer(fitted, fit.payload.encoding, quality * arrives)
            yield replace(offer, budget=budget, fit=fit, arrives=arrives)
            if fit.size_bytes < budget.size_bytes // 2:
                return  # everything fits

    def _update_bytes(self, work: LocalWork) -> int | None:
        """What the update may have; None without a limit."""
        limits = [] if self.terms.size_bytes is None else [self.terms.size_bytes]
        link = self.profile.link
        if link is not None and link.budget_bytes is not None and self._chooses:
            fair = link.budget_bytes // max(1, self.policy.rounds_left)
            down = work.slice_bytes + (work.global_bytes if work.evaluates_global else 0)
            if fair > down or not limits:
                limits.append(max(0, fair - down))
        return min(limits, default=None)

    @property
    def _chooses(self) -> bool:
        return self.policy.update_encoding == "auto"

    @property
    def lacks_bytes(self) -> bool:
        """Whether the run's byte budget is too small for any update."""
        limit = self.terms.size_bytes
        trains = self.policy.local_steps > 0
        least = self.sizes.least_update_bytes(self.policy.levels[0])
        return limit is not None and trains and least > limit

    def _offer(self, work: LocalWork, encoding: Encoding, quality: float) -> Offer:
        full = self.cost(work)
        rest_s, step_s = full.p90_s, 0.0
        if work.local_steps:
            one = replace(work, local_steps=2 * work.local_steps)
            step_s = (self.cost(one).p90_s - full.p90_s) / work.local_steps
            rest_s -= step_s * work.local_steps
        share = self.policy.share(Level(work.rank, work.density))
        return Offer(work, encoding, share, quality, rest_s, step_s)

    def _without_measuring(self, offer: Offer) -> Offer:
        work = replace(offer.work, evaluates_global=False, global_bytes=0)
        other = self._offer(work, offer.encoding, offer.quality)
        return replace(other, budget=offer.budget, fit=offer.fit, arrives=offer.arrives)

    @cached_property
    def offers(self) -> tuple[Offer, ...]:
        """What fits in memory, in the round's share of the byte budget and on a metered link."""
        budget, most = self.budget_bytes, self.most_share
        return tuple(
            offer
            for offer in self._fitting
            if (budget is None or offer.moved_bytes <= budget) and offer.share <= most + 1e-9
        )

    @property
    def fits_memory(self) -> bool:
        """Whether there is anything that fits in memory."""
        return bool(self._fitting)

    @cached_property
    def largest_in_memory(self) -> Level:
        """The most that memory alone would allow."""
        return max(self._fitting, key=lambda offer: offer.share).level

    @cached_property
    def _table(self) -> tuple[NDArray[np.float64], ...]:
        rows = [
            (o.rest_s, o.step_s, o.share, o.quality, o.work.evaluates_global, o.moved_bytes)
            for o in self.offers
        ]
        return tuple(np.array(rows, dtype=np.float64).reshape(-1, 6).T)

    def steps_within(self, deadline_s: float) -> NDArray[np.float64]:
        """By offer, the steps that can be done by the deadline; below the least, -1."""
        rest, step = self._table[:2]
        with np.errstate(divide="ignore", invalid="ignore"):
            steps = np.floor((deadline_s - rest) / step + 1e-9)
        steps = np.where(step > 0, steps, np.where(rest <= deadline_s, self.most_steps, -1))
        steps = np.minimum(steps, self.most_steps)
        return np.where((steps >= self.least_steps) & (rest <= deadline_s), steps, -1)

    def best(
        self, deadline_s: float, *, wider: float = 0.0, most_share: float = math.inf,
        least_bytes: bool = False,
    ) -> Choice | None:  # fmt: skip
        """The offer that brings most by the deadline; None if none can be done by then.

        What it brings: its share of the rows, times its steps, times its quality. wider: what a
        row counts whatever its steps, so that none goes without. Measuring the whole adapter comes
        before all that. Of equals the one that takes the least time. least_bytes: of those within
        `most_share`, the widest in the fewest bytes.
        """
        if not self.offers:
            return None
        _, step, share, quality, measures, moved = self._table
        steps = self.steps_within(deadline_s)
        ok = (steps >= 0) & (share <= most_share + 1e-9)
        if not ok.any():
            return None
        ok &= measures == measures[ok].max()
        done = steps / self.policy.local_steps if self.policy.local_steps else np.ones_like(steps)
        value = share * done * quality + wider * share
        if least_bytes:
            ok &= share == share[ok].max()
            value = done * quality - moved / max(1.0, moved.max())
        late = self._table[0] + steps * step
        keys = np.lexsort((np.arange(len(value)), late, -np.round(value, 9), ~ok))
        chosen = int(keys[0])
        return Choice(self.offers[chosen], int(steps[chosen]))

    def shortest_s(self, longest_s: float) -> float | None:
        """Seconds of the least that this device can do, measuring if that is wanted and possible.

        None if even the least takes longer.
        """
        for measures in self.policy.measuring:
            least = [
                s
                for offer in self.offers
                if offer.work.evaluates_global == measures
                and (s := offer.p90_s(self.least_steps)) <= longest_s
            ]
            if least:
                return min(least)
        return None

    def could(self, level: Level, choice: Choice, round_s: float) -> bool:
        """Whether as many steps of a level can be done in a round, with an update as large."""
        return any(
            o.level == level
            and o.budget_bytes >= choice.offer.budget_bytes
            and o.p90_s(choice.steps) <= round_s
            for o in self.offers
        )

    def value(self, choice: Choice) -> float:
        """What a choice brings: rows times steps, less what packing loses under a budget."""
        wanted, offer = self.policy.local_steps, choice.offer
        return offer.share * offer.arrives * (choice.steps / wanted if wanted else 1.0)

    def again(self, before: DevicePlan, longest_s: float) -> Choice | None:
        """What the device did before, if it may still be asked for that and be done in time."""
        p = self.policy
        level = Level(before.rank, before.density)
        encoding = before.update_encoding or p.encodings[-1]
        known = (
            level in p.levels
            and before.precision in p.precisions
            and before.sequence_tokens in p.sequences
            and (encoding in p.encodings or before.budget is not None)
            and self.least_steps <= before.local_steps <= self.most_steps
        )
        if not known:
            return None
        for evaluates in p.measuring:
            work = self.sizes.work(
                before.precision, before.sequence_tokens, encoding, level, evaluates=evaluates
            )
            batch = work.micro_batch * work.accumulation
            if batch != before.micro_batch * before.accumulation:
                return None
            work = replace(
                work,
                micro_batch=before.micro_batch,
                accumulation=before.accumulation,
                checkpointing=before.checkpointing,
            )
            if self.peak_bytes(work) > self.memory_bytes:
                continue
            offers = list(self._fitted(work, level, 1.0))
            if self.terms.size_bytes is None and before.budget is None:
                offers = [self._offer(work, encoding, 1.0)]
            budget = self.budget_bytes
            for offer in offers:
                choice = Choice(offer, before.local_steps)
                affords = budget is None or offer.moved_bytes <= budget
                if affords and offer.share <= self.most_share and choice.p90_s <= longest_s:
                    return choice
        return None

    def uncorrected_peak_bytes(self, work: LocalWork) -> int:
        """As the device's report would tell it, had nothing been learnt."""
        return reported_peak_bytes(self.shape, self.profile, work)
