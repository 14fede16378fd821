"""study.toml -> `StudySettings`: what a study varies, on which devices, and how often.

Every key has a unit or a docstring; mistakes are told with the key and what is allowed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from coordinator.methods import METHODS
from profiles.errors import SketchfleetError
from profiles.settings import Section, load_settings
from protos.contract import Encoding
from trials.domains import DOMAINS

Means = Literal["sketch", "bits", "top-k"]
Assigned = Literal["independent", "anti-size", "wealth"]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
SHIPPED = Path(__file__).resolve().parent.parent / "studies"


class StudyError(SketchfleetError):
    """A study that cannot be read, continued or concluded."""


class FleetSection(Section):
    """The devices. Each has one domain; sizes and participants are drawn anew for every seed."""

    domains: tuple[str, ...]
    """Of `trials.domains`, from the code that the base knows best to what it knows least: in the
    assignment "wealth" the first are compressed least."""
    train_sequences: tuple[Positive, ...]
    """As many as domains; dealt out at random for each seed."""
    participants: Positive
    """Devices that take part in a round, drawn at random; all, if as many as domains."""

    @model_validator(mode="after")
    def _sound(self) -> FleetSection:
        if unknown := [name for name in self.domains if name not in DOMAINS]:
            raise ValueError(f"no domain is called {unknown[0]!r}; choose of {', '.join(DOMAINS)}")
        if len(set(self.domains)) != len(self.domains) or len(self.domains) < 4:
            raise ValueError("give at least four domains, each once")
        if len(self.train_sequences) != len(self.domains):
            raise ValueError("train_sequences must be as many as domains")
        if self.participants > len(self.domains):
            raise ValueError("participants exceed the domains")
        return self


class LearningSection(Section):
    """One run, as in run.toml."""

    rank: Positive
    """Of the global adapter."""
    alpha: Annotated[float, Field(gt=0)]
    """LoRA's."""
    targets: tuple[str, ...] = ()
    """Projections to adapt; all when empty."""
    sequence_tokens: Annotated[int, Field(ge=16)]
    """Length of a row."""
    micro_batch: Positive
    """Rows of a step."""
    local_steps: Positive
    """Of a device in a round."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Of AdamW on the device."""
    rounds: Positive
    """Of one run."""
    measured: tuple[Positive, ...]
    """After how many rounds the global adapter is measured on every device; the last is `rounds`,
    the first is what bytes are matched at."""
    held_out_sequences: Annotated[int, Field(ge=4)]
    """Rows of each device that are measured."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Of each domain's documents."""
    weights: str = "samples"
    """Whose update counts how much ([fairness] weights of run.toml), unless a mitigation says."""

    @model_validator(mode="after")
    def _sound(self) -> LearningSection:
        if list(self.measured) != sorted(set(self.measured)) or self.measured[-1] != self.rounds:
            raise ValueError("measured must rise and end with rounds")
        return self


class RatioSection(Section):
    """Four or so levels for each means of compression; the first is no compression at all."""

    sketch: tuple[Share, ...] = (1.0, 0.5, 0.25, 0.125)
    """Of the adapter's rows."""
    bits: tuple[Encoding, ...] = ("float32", "int8", "int4", "int2")
    """Encodings of an update."""
    top_k: tuple[Share, ...] = (1.0, 0.25, 0.0625, 0.015625)
    """Of an update's values, the largest."""

    @model_validator(mode="after")
    def _sound(self) -> RatioSection:
        if self.sketch[:1] != (1.0,) or self.bits[:1] != ("float32",) or self.top_k[:1] != (1.0,):
            raise ValueError("the first level of every means must be no compression: 1 or float32")
        return self


class Arm(Section):
    """A means of compression under a method of `docs/methods.md`."""

    means: Means
    """How an update is made smaller."""
    method: str
    """Of `docs/methods.md`."""

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.means}, {self.method}"


class Mitigation(Section):
    """Something that may help, on one arm and assignment, against the same without it."""

    name: str
    """What the report calls it."""
    means: Means
    """Of the arm."""
    method: str
    """Of the arm."""
    assignment: Assigned
    """Which devices are at which ratio."""
    sections: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Of run.toml, over the study's own."""
    other_tiers: Annotated[float, Field(ge=0, le=1)] | None = None
    """Devices at the same ratio have an adapter of their own, which other tiers' updates enter at
    this share of their weight; absent: all have the global one."""


class DesignSection(Section):
    """What is varied."""

    seeds: tuple[int, ...]
    """One run of every setting for each."""
    per_device: tuple[Arm, ...] = ()
    """Devices at different ratios, under every assignment."""
    assignments: tuple[Assigned, ...] = ()
    """Which devices are at which ratio: by chance, the largest data compressed most, or the best
    known domains least."""
    everywhere: tuple[Arm, ...] = ()
    """All devices at the same ratio, one run for each level."""
    mitigations: tuple[Mitigation, ...] = ()
    methods: tuple[str, ...] = ()
    """`study methods`: which, the first the one that others are held against; empty: all."""

    @model_validator(mode="after")
    def _sound(self) -> DesignSection:
        arms = [arm.method for arm in (*self.per_device, *self.everywhere)]
        for name in (*self.methods, *arms, *(m.method for m in self.mitigations)):
            if name not in METHODS:
                raise ValueError(f"no method is called {name!r}; choose of {', '.join(METHODS)}")
        return self


class LinkSection(Section):
    """The link that the seconds of `study methods` are counted with, bit/s."""

    up_bps: Annotated[float, Field(gt=0)] = 1e6
    """From a device."""
    down_bps: Annotated[float, Field(gt=0)] = 4e6
    """To a device."""


class AnalysisSection(Section):
    """How sure to be."""

    permutations: Annotated[int, Field(ge=99)] = 9999
    """Of a permutation test."""
    replicates: Annotated[int, Field(ge=100)] = 2000
    """Of a bootstrap."""
    seed: int = 1
    """Of both."""


class StudySettings(Section):
    """A whole study."""

    study: Literal["compression-fairness", "methods"]
    """Which study these settings are for."""
    fleet: FleetSection
    learning: LearningSection
    ratios: RatioSection = RatioSection()
    design: DesignSection
    link: LinkSection = LinkSection()
    analysis: AnalysisSection = AnalysisSection()

    @model_validator(mode="after")
    def _sound(self) -> StudySettings:
        if not self.design.seeds or len(set(self.design.seeds)) != len(self.design.seeds):
            raise ValueError("[design] seeds must be given, each once")
        return self


def load_study(path: Path) -> StudySettings:
    """Reads a study's file. Raises `StudyError`."""
    return load_settings(path, StudySettings, StudyError)


def shipped(name: str, quick: bool) -> Path:
    """The file of a study that comes with Sketchfleet. Raises `StudyError`."""
    path = SHIPPED / f"{name.replace('-', '_')}{'_quick' if quick else ''}.toml"
    if not path.is_file():
        raise StudyError(f"no study is called {name!r}; give its file by --config")
    return path
