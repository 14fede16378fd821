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

from coordinator.plan_types import DENSE, DevicePlan, Level, PlanPolicy
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
from protos.contract import AdapterSpec, Encoding, Payload, Precision
from protos.layout import expected_bytes

# How much of a step's progress is left in less exact settings. Small, so that they only decide
# between offers of about the same size: 4-bit bases tune as well as 16-bit ones (QLoRA, arXiv
# 2305.14314, table 4), and int8 updates are rounded without bias. Halving a sequence costs
# context; assumed.
BASE_QUALITY: dict[Precision, float] = {"fp32": 1.0, "bf16": 1.0, "int8": 0.995, "nf4": 0.99}
ENCODING_QUALITY: dict[Encoding, float] = {
    "float32": 1.0, "bfloat16": 0.999, "int8": 0.998, "int4": 0.99, "int2": 0.95, "sign": 0.9,
}  # fmt: skip
SHORTER_QUALITY = 0.97
METERED_SHARE = 0.5  # of what a device would send at most, where bytes cost its owner money


class Sizes:
    """The policy as work of a given level, with packed sizes computed once."""

    def __init__(self, spec: AdapterSpec, policy: PlanPolicy) -> None:
        self.spec, self.policy = spec, policy
        self._packed: dict[Payload, int] = {}
        suffixes = tuple(dict.fromkeys(m.name.rpartition(".")[2] for m in spec.modules))
        self.targets = tuple(sorted(suffixes))

    def bytes_of(self, payload: Payload) -> int:
        """Size of a packed file."""
        if payload not in self._packed:
            self._packed[payload] = expected_bytes(self.spec, payload)
        return self._packed[payload]

    def fetched(self, level: Level, side_rank: int, *, slice_: bool, whole: bool) -> int:
        """Bytes that travel down, no file twice, and none that every device has already."""
        p = self.policy
        files: set[Payload] = set()
        if slice_:
            files |= {
                # Dense tensors are one file whatever k.
                Payload(p.rank if f == DENSE else level.rank, p.slice_encoding, f, level.density)
                for f in p.files
                if f not in p.resting
            }
            if side_rank:
                files.add(Payload(side_rank, p.slice_encoding))
        branches = 0
        if whole:
            files |= {Payload(p.rank, p.global_encoding, f) for f in p.files if f not in p.resting}
            if p.side_rank:
                # With a complement the branch to train beside is another one, even of its size.
                branch = Payload(p.side_rank, p.global_encoding)
                if p.complement:
                    branches = self.bytes_of(branch)
                else:
                    files.add(branch)
        return branches + sum(self.bytes_of(file) for file in files)

    def work(
        self,
        precision: Precision,
        sequence_tokens: int,
        encoding: Encoding,
        level: Level,
        *,
        evaluates: bool,
        steps: int | None = None,
    ) -> LocalWork:
        """What the policy asks for in these settings: its own batch, no checkpointing yet."""
        p, k = self.policy, level.rank
        steps = p.local_steps if steps is None else steps
        side = p.side_rank + (p.rank - k if p.complement and steps else 0)
        # The tokens of a batch stay: shorter rows come in larger batches.
        longer = p.sequences[0] // sequence_tokens
        down = self.fetched(level, side, slice_=steps > 0, whole=False)
        both = self.fetched(level, side, slice_=steps > 0, whole=True) if evaluates else down
        update = p.update(level, encoding)
        return LocalWork(
            precision=precision,
            rank=k,
            parameters_per_rank=self.spec.parameters_per_rank,
            global_rank=p.rank,
            sequence_tokens=sequence_tokens,
            micro_batch=p.micro_batch * longer,
            accumulation=p.accumulation,
            local_steps=steps,
            checkpointing=p.checkpointing is True,
            evaluation_sequences=p.evaluation_sequences,
            evaluates_global=evaluates,
            slice_bytes=down,
            update_bytes=self.bytes_of(update) if steps else 0,
            global_bytes=both - down,
            density=level.density,
            side_rank=side,
            dense_parameters=sum(t.out_features * t.in_features for t in self.spec.dense),
            targets=self.targets,
            optimizer=p.optimizer,
        )

    def variants(self, work: LocalWork) -> Iterator[LocalWork]:
        """The work as asked for, and with less memory at once: recomputed, or in smaller batches.

        A batch keeps its sequences: fewer at a time are accumulated longer.
        """
        choices = (False, True) if self.policy.checkpointing == "auto" else (work.checkpointing,)
        while True:
            for checkpointing in choices:
                yield replace(work, checkpointing=checkpointing)
            if work.micro_batch == 1:
                return
            parts = 2 if work.micro_batch % 2 == 0 else work.micro_batch
            work = replace(
                work,
                micro_batch=work.micro_batch // parts,
                accumulation=work.accumulation * parts,
            )


@dataclass(frozen=True)
class Offer:
    """One thing that a device could do, at all the steps that are wanted."""

    work: LocalWork
    encoding: Encoding
    share: float  # of the rows, or of the values
    quality: float
    rest_s: float  # in nine rounds of ten, at most, without any step
    step_s: float  # of each step

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
    ) -> None:
        self.shape, self.sizes, self.device_id = shape, sizes, device_id
        self.profile, self.correction = profile, correction
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
            for wire in p.encodings:
                work = ways[i][way]
                if wire != encoding:
                    size = p.update(level, wire)
                    work = replace(
                        work, update_bytes=self.sizes.bytes_of(size) if p.local_steps else 0
                    )
                yield self._offer(work, wire, quality * ENCODING_QUALITY[wire])

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
        return self._offer(work, offer.encoding, offer.quality)

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

    def value(self, choice: Choice) -> float:
        """What a choice brings: rows times steps."""
        wanted = self.policy.local_steps
        return choice.offer.share * (choice.steps / wanted if wanted else 1.0)

    def again(self, before: DevicePlan, longest_s: float) -> Choice | None:
        """What the device did before, if it may still be asked for that and be done in time."""
        p = self.policy
        level = Level(before.rank, before.density)
        encoding = before.update_encoding or p.encodings[-1]
        known = (
            level in p.levels
            and before.precision in p.precisions
            and before.sequence_tokens in p.sequences
            and encoding in p.encodings
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
            offer = self._offer(work, encoding, 1.0)
            budget = self.budget_bytes
            if budget is not None and offer.moved_bytes > budget:
                continue
            choice = Choice(offer, before.local_steps)
            fits = self.peak_bytes(work) <= self.memory_bytes and offer.share <= self.most_share
            if fits and choice.p90_s <= longest_s:
                return choice
        return None

    def uncorrected_peak_bytes(self, work: LocalWork) -> int:
        """As the device's report would tell it, had nothing been learnt."""
        return reported_peak_bytes(self.shape, self.profile, work)
