"""run.toml -> RunConfig: one validated, frozen object. Every knob has a unit or a docstring.

How the file is read and its mistakes are told: `profiles.settings`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from coordinator.methods import Method, MethodOptions, RowMethod
from coordinator.methods import make as make_method
from coordinator.plan_types import Aim, PlanPolicy
from coordinator.robust import Robust, require_fit
from coordinator.robust_rules import Rule
from coordinator.server_config import (
    ENVIRONMENT,
    ConfigError,
    PkiSection,
    ServerSection,
    WebSection,
    placed_state,
)
from coordinator.server_optimizer import ServerOptimizer, make_optimizer
from coordinator.weights import WeightOptions, WeightRule, make_rule
from profiles.errors import SketchfleetError
from profiles.events import LogSection
from profiles.layers import Layered, load_layered
from profiles.settings import Section
from protos.contract import Encoding, Objective, Part, Precision
from protos.layout import LEAST_GROUP, MOST_GROUP, codec_of
from protos.mirror import sent_whole

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]


SliceEncoding = Literal["float32", "bfloat16", "int8", "int4", "int2"]
"""Of what devices begin with: fewer bits would leave little of a weight."""


class RunSection(Section):
    """What the run is."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    """Also its identity: serving the same name again continues it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Of every random choice; the same seed, plans and updates give the same bits."""
    rounds: Positive = 10
    """Training rounds; then the run is finished."""


class ModelSection(Section):
    """The frozen base."""

    base: str
    """A hub id or a local folder in the Hugging Face format."""
    task: Literal["causal-lm", "sequence-classification"] = "causal-lm"
    """What is trained: the next token of code, or the label of a text or a pair of texts, whose
    task head is drawn from the run's seed and trained whole beside the adapter."""
    labels: tuple[str, ...] = ()
    """To be told apart, as the data spell them; the model's outputs have this order."""
    revision: str = ""
    """Commit of a hub id; pin it for anything that matters."""
    targets: tuple[str, ...] = ()
    """Projections to adapt; empty adapts all of them."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole beside the adapter, by name in the base ("lm_head", "model.norm")."""

    @model_validator(mode="after")
    def _labels_fit(self) -> ModelSection:
        classifies = self.task == "sequence-classification"
        if classifies and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError("task = sequence-classification needs labels, two or more, each once")
        if self.labels and not classifies:
            raise ValueError("labels need task = sequence-classification")
        return self


class AdapterSection(Section):
    """The global adapter."""

    rank: Positive = 32
    """Rows of the global adapter; a device trains as many of them as it can afford."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """LoRA's alpha: products count by alpha / rank."""
    rslora: bool = False
    """Whether they count by alpha / sqrt(rank) instead (arXiv 2312.03732)."""


class MethodSection(Section):
    """How updates merge (`docs/methods.md`). Keys that the method does not take are refused."""

    name: str = "fslora"
    """As in `docs/methods.md`: "fslora", "fedit", "flexlora", "flora", ..."""
    normalisation: Literal["auto", "none", "ipw", "coverage"] = "auto"
    """FSLoRA: what a row is divided by. "auto" is "coverage" under AdamW, else "none"."""
    sketches: Literal["stratified", "independent"] = "stratified"
    """FSLoRA, Fed-PLoRA: blocks of one permutation, or every device its own draw."""
    energy: Share = 0.95
    """FLoRIST: share of the squared singular values that is kept."""
    regularisation: Annotated[float, Field(ge=0)] = 0.01
    """LoRA-FAIR: lambda, how strongly the mean of B is held to."""
    side_rank: Annotated[int, Field(ge=0)] = 0
    """FLoRA, FedEx-LoRA: rows of the branch beside the base; 0 means four times the rank."""
    density: Share = 0.25
    """FLASC: share of the values that travel, at most."""
    prune_keep: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """HetLoRA: the tail that a device may drop begins at this share of its rank."""
    prune_penalty: Annotated[float, Field(ge=0)] = 1e-3
    """HetLoRA: weight of the tail's norm in the local loss."""
    robust: Rule = "clip"
    """How far a few hostile updates can pull (`docs/security.md`): "none", "clip" with every
    method; "trimmed-mean", "median", "geometric-median", "multi-krum" with those that average."""


class ScreeningSection(Section):
    """Which updates are kept out of the merge (`docs/security.md`)."""

    enabled: bool = True
    """Whether updates are judged before they are merged."""
    clean_rounds: Positive = 3
    """Rounds in a row that a quarantined device must deliver sound updates before they count."""


class ServerOptimizerSection(Section):
    """How the merged change is applied (FedOpt, arXiv 2003.00295)."""

    name: Literal["plain", "momentum", "adam"] = "plain"
    """The step as it was merged, with momentum, or Adam's."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """1 unless given; 0.01 for Adam, whose steps are about this long whatever the change."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """How much of the former steps is kept, with momentum and Adam."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Adam: how much of the former second moment is kept."""
    tau: Annotated[float, Field(gt=0)] = 1e-3
    """Adam: added to the root of the second moment."""


class FairnessSection(Section):
    """Whose update counts how much, and what devices minimise."""

    weights: str = "samples"
    """"samples", "uniform", "q-ffl", "afl" or "term"."""
    q: Annotated[float, Field(ge=0)] = 1.0
    """q-FFL: the power of a device's loss."""
    step: Annotated[float, Field(gt=0)] = 0.1
    """AFL: how fast weight moves to devices of high loss."""
    t: float = 1.0
    """TERM: the tilt; negative plays down outliers."""
    loss: Literal["plain", "propfair"] = "plain"
    """What devices minimise: their loss, or -log(1 - loss / ceiling) (arXiv 2202.01666)."""
    propfair_ceiling: Annotated[float, Field(ge=0)] = 0.0
    """M, nats per token: at least 1.5 times the highest loss at the start."""
    propfair_margin: Annotated[float, Field(gt=0)] = 0.2
    """Losses closer to the ceiling than this are counted as if they were this close."""

    @property
    def objective(self) -> Objective | None:
        """What devices minimise in place of their loss; None: nothing."""
        plain = self.loss == "plain"
        return None if plain else Objective(self.propfair_ceiling, self.propfair_margin)


class TrainingSection(Section):
    """One local round."""

    precision: Precision | Literal["auto"] = "nf4"
    """Of the base; "auto" lets the planner choose per device."""
    sequence_tokens: Annotated[int, Field(ge=16)] | Literal["auto"] = 512
    """Length of a row; "auto" lets the planner choose between 128 and 1024 per device."""
    micro_batch: Positive = 4
    """Rows that go through the model at once."""
    accumulation: Positive = 1
    """Micro-batches of one optimiser step."""
    local_steps: Positive = 20
    """Optimiser steps of a device in a round, at most."""
    min_local_steps: Positive = 1
    """Fewer are never planned."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Of the optimiser on the device."""
    optimizer: Literal["adamw", "adamw8bit", "sgd"] = "adamw"
    """On the device; "adamw8bit" holds the moments in a byte each (bitsandbytes)."""
    keep_optimizer: bool = False
    """Whether a device's optimiser goes on where it stopped, while its rows stay the same."""
    checkpointing: bool | Literal["auto"] = "auto"
    """Whether activations are computed again instead of kept; "auto" where memory asks for it."""
    fill_in_middle: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of documents rearranged for completion in the middle, where the tokenizer can."""


class PlanSection(Section):
    """What the planner aims at (`docs/devices.md`)."""

    policy: Aim = "fastest"
    """"fastest": least time to the target. "fairest": the same share of the adapter and as many
    steps for all. "cheapest": the fewest bytes that still cover every rank row."""
    bytes_per_round: Annotated[int, Field(ge=0)] = 0
    """Of each device's update, at most; 0 sets no limit. With `[wire] update = "auto"` the encoding
    is chosen too, with `error_feedback` also the share of values: by the least expected error."""
    bytes_per_day: Annotated[int, Field(ge=0)] = 0
    """Of each device's updates in a day of UTC, spread over the rounds left of it; 0: no limit."""


class RoundSection(Section):
    """When a round opens and closes."""

    min_devices: Positive = 2
    """A round waits for so many."""
    gather_s: Annotated[float, Field(ge=0)] = 5.0
    """How long to wait for further devices once `min_devices` are ready."""
    quorum: Share = 0.8
    """Share of the assigned devices whose updates close a round at its deadline."""
    round_s: Annotated[float, Field(ge=0)] = 0.0
    """Length of a round; 0 lets the planner choose."""
    max_round_s: Seconds = 3600.0
    """No round is planned to be longer."""
    late_rounds: Annotated[int, Field(ge=0)] = 1
    """Updates this many rounds late still count, at a discount."""
    min_rank: Positive = 1
    """A device that cannot train so many rows takes no part."""
    rank_multiple: Positive = 1
    """Sketch sizes are multiples of this."""
    coverage: Annotated[float, Field(gt=0)] = 1.0
    """How many devices should train each rank row per round, at least, on average."""


class WireSection(Section):
    """Encodings of what travels."""

    update: Encoding | Literal["auto"] = "int8"
    """Of what devices send; "auto" chooses between bfloat16 and int8 per device."""
    slice: SliceEncoding = "bfloat16"
    """Of the rows that a device is sent to train."""
    global_adapter: SliceEncoding = "bfloat16"
    """Of the whole adapter, which devices are sent to evaluate."""
    group: Annotated[int, Field(ge=0, le=MOST_GROUP)] = 0
    """Neighbouring values of an update that share a scale, 8 or more; 0: a whole row."""
    compressed: bool = False
    """Whether updates are compressed by Zstandard, where that makes them shorter."""
    error_feedback: bool = False
    """Whether what an update leaves out is added to the device's next one."""
    delta: bool = True
    """Whether devices are sent differences from what they hold, where those are smaller."""


class EvaluationSection(Section):
    """What devices measure on their own held-out code."""

    every_rounds: Positive = 5
    """The whole global adapter is also measured before the first round and after the last."""
    sequences: Positive = 32
    """Held-out rows of each device that are measured, at most."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of a device's documents that are never trained on."""
    completions: Annotated[int, Field(ge=0)] = 0
    """Lines of held-out code that devices generate and compare in each evaluation."""
    local_only: bool = False
    """Whether devices also train an adapter on their own code alone, with the same budget, to tell
    whether taking part is worth it. Doubles the time of training."""


class LimitsSection(Section):
    """What devices may use of this machine; rates and counts are fixed (`docs/security.md`)."""

    disk_share: Share = 0.95
    """Updates are refused, for the time being, when the disk is fuller; or has 10 GiB left."""
    mb_per_day: Positive | None = None
    """Of one device, both ways, in a day of UTC; none: what its rounds need, some times over."""


class RunConfig(Section):
    """Everything `serve` needs, checked."""

    run: RunSection
    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    method: MethodSection = MethodSection()
    screening: ScreeningSection = ScreeningSection()
    server_optimizer: ServerOptimizerSection = ServerOptimizerSection()
    fairness: FairnessSection = FairnessSection()
    training: TrainingSection = TrainingSection()
    plan: PlanSection = PlanSection()
    round: RoundSection = RoundSection()
    wire: WireSection = WireSection()
    evaluation: EvaluationSection = EvaluationSection()
    server: ServerSection = ServerSection()
    pki: PkiSection | None = None
    limits: LimitsSection = LimitsSection()
    log: LogSection = LogSection()
    web: WebSection = WebSection()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.round.min_rank > self.adapter.rank:
            raise ValueError(
                f"[round] min_rank {self.round.min_rank} exceeds [adapter] rank {self.adapter.rank}"
            )
        if self.training.min_local_steps > self.training.local_steps:
            raise ValueError("[training] min_local_steps exceeds local_steps")
        if self.round.round_s > self.round.max_round_s:
            raise ValueError("[round] round_s exceeds max_round_s")
        f = self.fairness
        if f.loss == "propfair" and f.propfair_ceiling <= f.propfair_margin:
            raise ValueError(
                "[fairness] loss = propfair needs propfair_ceiling above propfair_margin: about "
                "1.5 times the highest loss at the start"
            )
        self._refuse_idle_keys()
        self._check_method()
        return self

    def _refuse_idle_keys(self) -> None:
        """Refuses keys that would change nothing: whoever wrote them expects otherwise."""
        if self.model.labels:
            text = (("training", "fill_in_middle"), ("evaluation", "completions"))
            for section, key in text:
                if getattr(getattr(self, section), key):
                    raise ValueError(
                        f"[{section}] {key} is for text that a model writes, which a classifier "
                        "does not; leave it out"
                    )
        fairness, optimizer = self.fairness, self.server_optimizer
        needs = {
            ("fairness", "q"): ("weights", "q-ffl", fairness.weights),
            ("fairness", "step"): ("weights", "afl", fairness.weights),
            ("fairness", "t"): ("weights", "term", fairness.weights),
            ("fairness", "propfair_ceiling"): ("loss", "propfair", fairness.loss),
            ("fairness", "propfair_margin"): ("loss", "propfair", fairness.loss),
            ("server_optimizer", "beta2"): ("name", "adam", optimizer.name),
            ("server_optimizer", "tau"): ("name", "adam", optimizer.name),
        }
        for (section, key), (other, wanted, found) in needs.items():
            if key in _changed(getattr(self, section)) and found != wanted:
                raise ValueError(
                    f'[{section}] {key} does nothing with {other} = "{found}"; it needs '
                    f'{other} = "{wanted}"'
                )

    def _check_method(self) -> None:
        """Refuses what the method cannot use."""
        try:
            method = self.make_method()
            self.make_weight_rule()
            require_fit(self.method.robust, method)
        except SketchfleetError as error:
            raise ValueError(str(error)) from error
        if foreign := sorted(_changed(self.method) - {"name", "robust"} - set(method.options)):
            takes = f"takes {', '.join(method.options)}" if method.options else "takes no options"
            raise ValueError(f"[method] {foreign[0]} is not for {method.name}, which {takes}")
        optimizer = self.server_optimizer
        if not isinstance(method, RowMethod) and (
            optimizer.name != "plain" or optimizer.learning_rate not in (None, 1)
        ):
            raise ValueError(
                f"[server_optimizer] {optimizer.name} cannot be used with {method.name}: its merge "
                "fits or rebuilds the factors and is no step that could be lengthened or "
                "remembered; leave the section out"
            )
        stale = (
            f"cannot be used with {method.name}: its rows mean something else each round, so that "
            "what a device kept of the last would be wrong; set it to false"
        )
        if self.training.keep_optimizer and not method.keeps_basis:
            raise ValueError(f"[training] keep_optimizer {stale}")
        wire = self.wire
        if 0 < wire.group < LEAST_GROUP:
            raise ValueError(f"[wire] group {wire.group} is too small; use 0, or {LEAST_GROUP} up")
        if wire.group and wire.update != "auto" and not codec_of(wire.update).scaled:
            raise ValueError(
                f"[wire] group does nothing with {wire.update}, which has no scales; leave it out"
            )
        if wire.update == "sign" and not wire.error_feedback:
            raise ValueError(
                "[wire] update = sign keeps signs only and would never learn sizes; set "
                "error_feedback = true, or use int2"
            )
        whole = self.model.modules_to_save or self.model.labels
        travels = method.density == 1 and (method.files(0) or whole)
        if not wire.delta and not travels:
            raise ValueError(
                f"[wire] delta = false does nothing with {method.name}, which sends no differences "
                "of the adapter anyway; leave it out"
            )
        if "int2" in (wire.slice, wire.global_adapter) and not (wire.delta and travels):
            raise ValueError(
                "[wire] slice and global_adapter = int2 are for differences (delta), whose losses "
                "are made good later; use int4 where rows are sent whole"
            )
        if self.wire.error_feedback:
            if not method.keeps_basis:
                raise ValueError(f"[wire] error_feedback {stale}")
            if method.heterogeneous and method.scaling == "common":
                raise ValueError(
                    f"[wire] error_feedback cannot be used with {method.name}: its rows are scaled "
                    "by a device's rank, so that what was kept at one rank is wrong at another; "
                    "set it to false"
                )

    def make_method(self) -> Method:
        """The method with its options. Raises `UnknownMethodError`."""
        options = MethodOptions(
            rank=self.adapter.rank,
            optimizer=self.training.optimizer.removesuffix("8bit"),  # the same rule
            **self.method.model_dump(exclude={"name", "robust"}),
        )
        return make_method(self.method.name, options)

    def make_robust(self) -> Robust:
        """The rule that merges robustly."""
        return Robust(self.method.robust)

    def plan_policy(
        self,
        method: Method,
        *,
        files: tuple[tuple[Part, ...], ...],
        update_parts: tuple[Part, ...],
        side_rank: int,
        evaluates_global: bool,
        rounds_left: int,
        resting: tuple[tuple[Part, ...], ...] = (),
        most_rank: int | None = None,
        evaluate_only: bool = False,
    ) -> PlanPolicy:
        """What a round asks for: this run's wishes, and the facts of the round as `PlanPolicy`'s
        fields of those names.
        """
        varies: Literal["rank", "density", "nothing"] = "nothing"
        if method.heterogeneous:
            varies = "rank"
        elif method.density < 1:
            varies = "density"
        return PlanPolicy(
            rank=self.adapter.rank,
            min_rank=self.round.min_rank,
            rank_multiple=self.round.rank_multiple,
            precision=self.training.precision,
            sequence_tokens=self.training.sequence_tokens,
            micro_batch=self.training.micro_batch,
            accumulation=self.training.accumulation,
            local_steps=0 if evaluate_only else self.training.local_steps,
            min_local_steps=self.training.min_local_steps,
            checkpointing=self.training.checkpointing,
            update_encoding=self.wire.update,
            update_group=self.wire.group,
            compressed=self.wire.compressed,
            slice_encoding=sent_whole(self.wire.slice),
            global_encoding=sent_whole(self.wire.global_adapter),
            coverage=self.round.coverage,
            round_s=self.round.round_s or None,
            max_round_s=self.round.max_round_s,
            evaluation_sequences=self.evaluation.sequences,
            varies=varies,
            density=method.density,
            most_rank=most_rank,
            files=files,
            resting=resting,
            update_parts=update_parts,
            side_rank=side_rank,
            complement=method.complement,
            evaluates_global=evaluates_global,
            optimizer=self.training.optimizer,
            aim=self.plan.policy,
            rounds_left=rounds_left,
            feeds_back=self.wire.error_feedback,
            local_only=self.evaluation.local_only and not evaluate_only,
        )

    def make_server_optimizer(self) -> ServerOptimizer:
        """The server's optimiser."""
        return make_optimizer(**self.server_optimizer.model_dump(exclude_none=True))

    def make_weight_rule(self) -> WeightRule:
        """The rule that weighs devices. Raises `WeightRuleError`."""
        f = self.fairness
        return make_rule(f.weights, WeightOptions(q=f.q, t=f.t, step=f.step))


def _changed(section: Section) -> set[str]:
    """Keys that differ from their defaults; a stored configuration names every key."""
    fields = type(section).model_fields
    return {key for key in fields if getattr(section, key) != fields[key].default}


def load_config(path: Path) -> RunConfig:
    """run.toml as it is in force. Raises `ConfigError` as `load_layers` does."""
    return load_layers(path).settings


def load_layers(path: Path, given: Sequence[str] = ()) -> Layered[RunConfig]:
    """Reads run.toml with what SKETCHFLEET_COORDINATOR__SECTION__KEY and `--set` put in its place.

    given: "section.key=value" of each `--set`. Relative folders are relative to the file. Raises
    `ConfigError` with the file or variable, the key and what is allowed there.
    """
    found = load_layered(path, RunConfig, ConfigError, ENVIRONMENT, given)
    config = found.settings
    here = path.resolve().parent
    server, sources = placed_state(config.server, path, found.sources)
    base = config.model.base
    if (here / base).is_dir():
        base = str((here / base).resolve())
    model = config.model.model_copy(update={"base": base})
    pki = None if config.pki is None else config.pki.placed(here)
    web = config.web
    if web.token_file is not None:
        web = web.model_copy(update={"token_file": here / web.token_file.expanduser()})
    placed = config.model_copy(update={"server": server, "model": model, "pki": pki, "web": web})
    return Layered(placed, sources)
