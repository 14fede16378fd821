"""A study's settings -> its runs: who has which data, ratio and turn, everything drawn by the seed.

A run is plain facts from which it can be played anywhere, and its key is their digest. Runs of one
seed share data sizes, participants and the order of batches, so that they can be paired.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from coordinator.config import RunConfig
from coordinator.methods import METHODS, Method, MethodOptions, make
from trials.demo import NANO_CODE
from trials.simulated_types import Sending
from trials.study.settings import Arm, Assigned, Mitigation, StudyError, StudySettings

Kind = Literal["per device", "everywhere", "equal bytes", "dense", "local", "mitigation", "method"]
FORMAT = 1  # of what a run writes; another number is another key


@dataclass(frozen=True)
class RunFacts:
    """Everything that decides what a run gives.

    level: of the means, where all devices have the same; None where they differ.
    sections: of run.toml. sizes: training sequences by device. present: devices of each round.
    tier: index of the level that each device has.
    """

    cell: str
    kind: Kind
    seed: int
    means: str
    method: str
    assignment: str
    sections: Mapping[str, Any]
    sizes: Mapping[str, int]
    sendings: Mapping[str, Mapping[str, Any]]
    tier: Mapping[str, int]
    present: Sequence[Sequence[str]]
    measured: Sequence[int]
    level: int | None = None
    mitigation: str = ""
    other_tiers: float | None = None
    """Tiers have adapters of their own, other tiers' updates at this share of their weight."""
    format: int = field(default=FORMAT)

    @property
    def key(self) -> str:
        """Digest of the facts."""
        plain = asdict(self)
        if self.other_tiers is None:  # as runs were named before there were such adapters
            del plain["other_tiers"]
        text = json.dumps(plain, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    @property
    def devices(self) -> tuple[str, ...]:
        """By name, in the order of the study's domains."""
        return tuple(self.sizes)


def runs_of(settings: StudySettings) -> tuple[RunFacts, ...]:
    """All runs, seed by seed, so that a study that is stopped has whole seeds.

    Raises `StudyError` where run.toml would refuse what a run asks for.
    """
    listed = _methods if settings.study == "methods" else _compression
    runs = tuple(run for seed in settings.design.seeds for run in listed(settings, seed))
    for run in runs:
        try:
            RunConfig.model_validate(dict(run.sections))
        except ValidationError as error:
            told = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise StudyError(f"{run.cell} cannot be run: {told}") from error
    return runs


def _compression(s: StudySettings, seed: int) -> list[RunFacts]:
    d = s.design
    dense = Arm(means="bits", method="fedit")
    found = [
        _run(s, seed, dense, "dense", level=0),
        _run(s, seed, dense, "local", level=0),
    ]
    for arm in d.per_device:
        found += [_run(s, seed, arm, "per device", assignment=a) for a in d.assignments]
    for arm in d.everywhere:
        levels = len(_levels(s, arm.means))
        found += [_run(s, seed, arm, "everywhere", level=level) for level in range(1, levels)]
        found.append(_run(s, seed, arm, "equal bytes"))
    found += [
        _run(s, seed, Arm(means=m.means, method=m.method), "mitigation",
             assignment=m.assignment, mitigation=m)
        for m in d.mitigations
    ]  # fmt: skip
    return found


def _methods(s: StudySettings, seed: int) -> list[RunFacts]:
    """Every method with the same devices: ranks differ where the method can have it."""
    found = []
    for name in s.design.methods or METHODS:
        arm = Arm(means="sketch", method=name)
        if METHODS[name].heterogeneous:
            found.append(_run(s, seed, arm, "method", assignment="independent"))
        else:
            found.append(_run(s, seed, arm, "method", level=0))
    return found


def _run(
    s: StudySettings,
    seed: int,
    arm: Arm,
    kind: Kind,
    *,
    level: int | None = None,
    assignment: Assigned | None = None,
    mitigation: Mitigation | None = None,
) -> RunFacts:
    names, sizes = s.fleet.domains, dealt_sizes(s, seed)
    if assignment is not None:
        tier = tiers(s, seed, assignment, len(_levels(s, arm.means)))
    else:
        tier = dict.fromkeys(names, level or 0)
    if kind == "equal bytes":
        sendings = dict.fromkeys(names, _mean_sending(s, arm.means))
    else:
        sendings = {name: _levels(s, arm.means)[tier[name]] for name in names}
    if _made(s, arm.method).density < 1:  # the method's own density travels
        sendings = {}
    words = [kind, arm.means, arm.method]
    words += [assignment] if assignment else []
    words += [f"level {level}"] if kind == "everywhere" else []
    words += [mitigation.name] if mitigation else []
    return RunFacts(
        cell=" | ".join(words), kind=kind, seed=seed, means=arm.means, method=arm.method,
        assignment=assignment or "", sections=_sections(s, seed, arm.method, mitigation),
        sizes=sizes, sendings={n: asdict(v) for n, v in sendings.items()}, tier=tier,
        present=turns(s, seed), measured=list(s.learning.measured), level=level,
        mitigation=mitigation.name if mitigation else "",
        other_tiers=mitigation.other_tiers if mitigation else None,
    )  # fmt: skip


def dealt_sizes(s: StudySettings, seed: int) -> dict[str, int]:
    """Training sequences by device: the sizes of the study in an order drawn by the seed."""
    order = np.random.default_rng([seed, 1]).permutation(len(s.fleet.domains))
    return {n: s.fleet.train_sequences[i] for n, i in zip(s.fleet.domains, order, strict=True)}


def turns(s: StudySettings, seed: int) -> list[list[str]]:
    """Who takes part in each round."""
    draw, names = np.random.default_rng([seed, 2]), s.fleet.domains
    chosen = [
        sorted(draw.permutation(len(names))[: s.fleet.participants])
        for _ in range(s.learning.rounds)
    ]
    return [[names[i] for i in which] for which in chosen]


def tiers(s: StudySettings, seed: int, assignment: Assigned, levels: int) -> dict[str, int]:
    """The level of each device: as many devices at each, 0 the least compressed.

    "independent": drawn. "anti-size": who has most data is compressed most. "wealth": whose code
    the base knows best is compressed least.
    """
    names = list(s.fleet.domains)
    if assignment == "independent":
        order = np.random.default_rng([seed, 3]).permutation(len(names))
        ordered = [names[i] for i in order]
    elif assignment == "anti-size":
        sizes = dealt_sizes(s, seed)
        ordered = sorted(names, key=lambda name: sizes[name])
    else:
        ordered = names
    return {name: place * levels // len(names) for place, name in enumerate(ordered)}


def _levels(s: StudySettings, means: str) -> list[Sending]:
    if means == "sketch":
        return [Sending(rank=_rows(s, share)) for share in s.ratios.sketch]
    if means == "bits":
        return [Sending(encoding) for encoding in s.ratios.bits]
    return [Sending(density=share) for share in s.ratios.top_k]


def _mean_sending(s: StudySettings, means: str) -> Sending:
    """The same for all at about the bytes of devices spread evenly over the levels.

    Of encodings the one nearest below, as there is none between them.
    """
    levels = _levels(s, means)
    if means == "sketch":
        return Sending(rank=round(float(np.mean([level.rank for level in levels]))))
    if means == "top-k":
        return Sending(density=float(np.mean([level.density for level in levels])))
    mean = np.mean([BITS[level.encoding] for level in levels])
    return max(
        (level for level in levels if BITS[level.encoding] <= mean),
        key=lambda level: BITS[level.encoding],
    )


BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4, "int2": 2, "sign": 1}


def _rows(s: StudySettings, share: float) -> int:
    return max(1, round(share * s.learning.rank))


def _sections(
    s: StudySettings, seed: int, method: str, mitigation: Mitigation | None
) -> dict[str, Any]:
    """run.toml of a run."""
    c, chosen = s.learning, _made(s, method)
    # Whole slices, where the method sends any: differences would cost more time than they tell.
    whole = {"delta": False} if chosen.density == 1 and chosen.files(0) else {}
    found: dict[str, dict[str, Any]] = {
        "run": {"name": "study", "seed": seed, "rounds": c.rounds},
        "model": {"base": NANO_CODE.name, "targets": list(c.targets)},
        "adapter": {"rank": c.rank, "alpha": c.alpha},
        "method": {"name": method},
        "fairness": {"weights": c.weights},
        "training": {
            "precision": "fp32", "sequence_tokens": c.sequence_tokens,
            "micro_batch": c.micro_batch, "local_steps": c.local_steps,
            "learning_rate": c.learning_rate,
        },
        "wire": {"update": "float32", "slice": "float32", "global_adapter": "float32", **whole},
        "evaluation": {"sequences": c.held_out_sequences, "held_out_share": c.held_out_share},
    }  # fmt: skip
    for name, keys in (mitigation.sections if mitigation else {}).items():
        found[name] = {**found.get(name, {}), **keys}
    return found


def _made(s: StudySettings, method: str) -> Method:
    return make(method, MethodOptions(rank=s.learning.rank))
