"""What a run would ask of a fleet that does not exist yet, and what that costs a day.

Takes groups of boards on links, a model's dimensions and a run's configuration; asks the same
planner as a running coordinator. Every figure is a prediction from catalogue figures: nothing
here was measured. Reads no file, prints nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.allowance import allowances
from coordinator.config import RunConfig
from coordinator.plan_types import UpdateTerms
from coordinator.planner import (
    SHORTEST_ROUND_S,
    DevicePlan,
    PlanError,
    PlanPolicy,
    RoundPlan,
    plan_round,
)
from coordinator.what_if_fleet import Group
from profiles.device import DeviceProfile
from profiles.errors import SketchfleetError
from profiles.model import ModelShape
from protos.contract import AdapterSpec

DAY_S = 86_400.0
# Of the model that devices start from: neither the first, before which some methods have less to
# send, nor an odd one (RoLoRA sends the narrower factor then).
VERSION = 2


class WhatIfError(SketchfleetError):
    """A run that cannot be planned from a model's dimensions alone."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one device."""

    up_bytes: float
    down_bytes: float


@dataclass(frozen=True)
class GroupPlan:
    """What the devices of one group are asked to do, or why they are not."""

    group: Group
    plans: tuple[DevicePlan, ...]  # of those that take part
    left_out: tuple[str, ...]  # reasons, each once
    is_unfit: bool  # no round would be long enough
    budget_bytes: int  # memory that the trainer may use
    a_day: Traffic  # of one device that takes part, on the mean

    @property
    def missing(self) -> int:
        """How many devices are left out."""
        return self.group.count - len(self.plans)

    @property
    def plan(self) -> DevicePlan | None:
        """What one of them does: the first, whom the others resemble but for their rows."""
        return self.plans[0] if self.plans else None


@dataclass(frozen=True)
class WhatIf:
    """The plan of a fleet: an ordinary round group by group, and what the rounds add up to."""

    model: str
    shape: ModelShape
    rank: int
    method: str
    precision: str  # as the run asks for it
    round_s: float  # of an ordinary round, as planned
    busy_s: float  # until the slowest device of an ordinary round has delivered
    measuring_s: float | None  # the same of a round that also measures the whole adapter
    every_rounds: int  # so often a round is such a one
    groups: tuple[GroupPlan, ...]

    @property
    def devices(self) -> int:
        """How many take part."""
        return sum(len(g.plans) for g in self.groups)

    @property
    def coverage(self) -> float:
        """How many devices train each row of the rank, on the mean."""
        return sum(p.rank * p.density for g in self.groups for p in g.plans) / self.rank

    @property
    def rounds_a_day(self) -> float:
        """Rounds one after another: each ends when the slowest device has delivered."""
        return _rounds_a_day(self.busy_s, self.measuring_s, self.every_rounds)

    @property
    def a_day(self) -> Traffic:
        """Bytes of the whole fleet."""
        return Traffic(
            sum(g.a_day.up_bytes * len(g.plans) for g in self.groups),
            sum(g.a_day.down_bytes * len(g.plans) for g in self.groups),
        )


def what_if(model: str, shape: ModelShape, config: RunConfig, groups: Sequence[Group]) -> WhatIf:
    """Plans for these groups. A fleet of which no device can take part has no plans in it.

    Raises `WhatIfError`, `ModelError`.
    """
    if config.model.modules_to_save:
        raise WhatIfError(
            "[model] modules_to_save trains tensors whole, whose sizes stand in the weights and "
            "not in config.json; leave it out to plan"
        )
    spec = _spec(model, shape, config)
    devices = {
        device_id: group.profile
        for group in groups
        if not group.board.no_trainer
        for device_id in group.device_ids
    }
    terms = _terms(shape, spec, config, devices)
    ordinary = _plan(shape, spec, _policy(config, measuring=False), devices, terms)
    measuring = _plan(shape, spec, _policy(config, measuring=True), devices, terms)
    every = config.evaluation.every_rounds
    busy_s, measuring_s = _busy(ordinary), _busy(measuring) if measuring.devices else None
    rounds = _rounds_a_day(busy_s, measuring_s, every)
    plans = {p.device_id: p for p in ordinary.devices}
    measured = {p.device_id: p for p in measuring.devices}

    def of(group: Group) -> GroupPlan:
        ids = group.device_ids
        mine = [plans[d] for d in ids if d in plans]
        # Devices that are alike are left out for like reasons; each is told once.
        whys = dict.fromkeys(
            ordinary.left_out[d].replace(d, group.name) for d in ids if d in ordinary.left_out
        )
        if why := group.board.no_trainer:
            whys = {f"{group.name} cannot train: {why}": None}
        return GroupPlan(
            group=group,
            plans=tuple(mine),
            left_out=tuple(whys),
            is_unfit=bool(why) or ordinary.unfit >= set(ids),
            budget_bytes=group.profile.trainer_bytes,
            a_day=_traffic(mine, [measured[d] for d in ids if d in measured], rounds, every),
        )

    return WhatIf(
        model=model,
        shape=shape,
        rank=config.adapter.rank,
        method=config.method.name,
        precision=config.training.precision,
        round_s=ordinary.round_s,
        busy_s=busy_s,
        measuring_s=measuring_s,
        every_rounds=every,
        groups=tuple(of(group) for group in groups),
    )


def _terms(
    shape: ModelShape, spec: AdapterSpec, config: RunConfig, devices: dict[str, DeviceProfile]
) -> dict[str, UpdateTerms]:
    """Byte budgets at the beginning of a day whose rounds are as long as without one."""
    plan = config.plan
    if not plan.bytes_per_round and not plan.bytes_per_day:
        return {}
    free = _plan(shape, spec, _policy(config, measuring=False), devices, {})
    limits = allowances(
        (), devices, 0.0, per_round=plan.bytes_per_round, per_day=plan.bytes_per_day,
        length_s=_busy(free), rounds_left=config.run.rounds,
    )  # fmt: skip
    return {device_id: UpdateTerms(size) for device_id, size in limits.items()}


def _plan(
    shape: ModelShape,
    spec: AdapterSpec,
    policy: PlanPolicy,
    devices: dict[str, DeviceProfile],
    terms: dict[str, UpdateTerms],
) -> RoundPlan:
    try:
        return plan_round(shape, spec, policy, devices, terms=terms)
    except PlanError as error:
        return error.plan


def _spec(model: str, shape: ModelShape, config: RunConfig) -> AdapterSpec:
    return AdapterSpec(
        run_id=config.run.name,
        base=model,
        base_revision="",
        base_digest="",
        rank=config.adapter.rank,
        alpha=config.adapter.alpha,
        use_rslora=config.adapter.rslora,
        seed=config.run.seed,
        modules=shape.modules(config.model.targets),
    )


def _policy(config: RunConfig, *, measuring: bool) -> PlanPolicy:
    """What the run asks for in the middle of it, as `coordinator.issuing` would put it."""
    method = config.make_method()
    return config.plan_policy(
        method,
        files=method.files(VERSION),
        update_parts=method.sent(VERSION),
        side_rank=getattr(method, "budget", 0),  # the branch beside the base at its largest
        evaluates_global=measuring,
        rounds_left=config.run.rounds,
    )


def _busy(plan: RoundPlan) -> float:
    """Until the slowest device has delivered; starting a trainer takes a while at any speed."""
    return max([SHORTEST_ROUND_S, *(p.predicted.total_s for p in plan.devices)])


def _rounds_a_day(busy_s: float, measuring_s: float | None, every: int) -> float:
    seldom = busy_s if measuring_s is None else measuring_s
    return DAY_S * every / ((every - 1) * busy_s + seldom)


def _traffic(
    plans: Sequence[DevicePlan], measured: Sequence[DevicePlan], rounds: float, every: int
) -> Traffic:
    """A day's bytes of the mean device, one in `every` rounds being a measuring one."""
    if not plans:
        return Traffic(0.0, 0.0)
    usual = _mean(plans)
    seldom = _mean(measured) if measured else usual
    share = 1 / every
    return Traffic(
        rounds * ((1 - share) * usual.up_bytes + share * seldom.up_bytes),
        rounds * ((1 - share) * usual.down_bytes + share * seldom.down_bytes),
    )


def _mean(plans: Sequence[DevicePlan]) -> Traffic:
    return Traffic(
        sum(p.predicted.up_bytes for p in plans) / len(plans),
        sum(p.predicted.down_bytes for p in plans) / len(plans),
    )
