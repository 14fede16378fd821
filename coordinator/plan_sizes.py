"""What a policy's settings weigh: files down and up, and the local round that they make.

Sizes and fits are found once for all devices of a plan that are alike. Knows files and byte
budgets; neither devices nor what they could afford (`coordinator.plan_search`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from coordinator.plan_types import DENSE, Level, PlanPolicy
from profiles.cost import LocalWork
from protos.contract import AdapterSpec, Encoding, ErrorCurve, Payload, Precision, UpdateBudget
from protos.distortion import ROW_SPREAD, prior_curve, usable_curves
from protos.fitting import Fit, best_expected, least_bytes
from protos.layout import expected_bytes


class Sizes:
    """The policy as work of a given level, with packed sizes computed once."""

    def __init__(self, spec: AdapterSpec, policy: PlanPolicy) -> None:
        self.spec, self.policy = spec, policy
        self._packed: dict[Payload, int] = {}
        self._fits: dict[Any, Fit | None] = {}
        suffixes = tuple(dict.fromkeys(m.name.rpartition(".")[2] for m in spec.modules))
        self.targets = tuple(sorted(suffixes))

    def bytes_of(self, payload: Payload) -> int:
        """Size of a packed file."""
        if payload not in self._packed:
            self._packed[payload] = expected_bytes(self.spec, payload)
        return self._packed[payload]

    def fit(self, level: Level, budget: UpdateBudget, told: tuple[ErrorCurve, ...]) -> Fit | None:
        """The update of least expected error in a budget; found once for devices that are alike.

        told: curves of the device's last update, if there are any.
        """
        key = (level, budget.size_bytes, told)
        if key not in self._fits:
            p, known = self.policy, usable_curves(told)

            def curve(encoding: Encoding, group: int) -> ErrorCurve:
                return known.get((encoding, group)) or prior_curve(
                    encoding, group, p.feeds_back, ROW_SPREAD.get(p.optimizer, 0.0)
                )

            payload = p.update(level, p.encodings[0])
            self._fits[key] = best_expected(self.spec, payload, budget, curve)
        return self._fits[key]

    def least_update_bytes(self, level: Level) -> int:
        """The smallest update of a level that a byte budget would have to allow."""
        p = self.policy
        return least_bytes(self.spec, p.update(level, p.encodings[0]), p.budget(0))

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
            local_only=p.local_only and steps > 0,
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
