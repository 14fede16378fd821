"""run.toml -> RunConfig: one validated, frozen object. Every knob has a unit or a docstring.

How the file is read and its mistakes are told: `profiles.settings`.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from profiles.errors import SketchfleetError
from profiles.settings import Section, host_of, load_settings
from protos.contract import Encoding, Precision

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]


class ConfigError(SketchfleetError):
    """run.toml cannot be read or holds something that cannot be run."""


class RunSection(Section):
    """What the run is."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    """Also its identity: serving the same name again continues it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    rounds: Positive = 10


class ModelSection(Section):
    """The frozen base."""

    base: str
    """A hub id or a local folder in the Hugging Face format."""
    revision: str = ""
    """Commit of a hub id; pin it for anything that matters."""
    targets: tuple[str, ...] = ()
    """Projections to adapt; empty adapts all of them."""


class AdapterSection(Section):
    """The global adapter."""

    rank: Positive = 32
    alpha: Annotated[float, Field(gt=0)] = 32.0
    rslora: bool = False


class MethodSection(Section):
    """How updates merge."""

    name: str = "fslora"
    normalisation: Literal["auto", "none", "ipw", "coverage"] = "auto"
    """FSLoRA only: what a row is divided by. "auto" is "coverage" under AdamW, else "none"."""


class TrainingSection(Section):
    """One local round."""

    precision: Precision | Literal["auto"] = "nf4"
    """Of the base; "auto" lets the planner choose per device."""
    sequence_tokens: Annotated[int, Field(ge=16)] = 512
    micro_batch: Positive = 4
    accumulation: Positive = 1
    local_steps: Positive = 20
    min_local_steps: Positive = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    optimizer: Literal["adamw", "sgd"] = "adamw"
    checkpointing: bool | Literal["auto"] = "auto"


class RoundSection(Section):
    """When a round opens and closes."""

    min_devices: Positive = 2
    gather_s: Annotated[float, Field(ge=0)] = 5.0
    """How long to wait for further devices once `min_devices` are ready."""
    quorum: Share = 0.8
    """Share of the assigned devices whose updates close a round at its deadline."""
    round_s: Annotated[float, Field(ge=0)] = 0.0
    """Length of a round; 0 lets the planner choose the shortest that covers every rank row."""
    max_round_s: Seconds = 3600.0
    late_rounds: Annotated[int, Field(ge=0)] = 1
    """Updates this many rounds late still count, at a discount."""
    min_rank: Positive = 1
    rank_multiple: Positive = 1
    """Sketch sizes are multiples of this."""
    coverage: Annotated[float, Field(gt=0)] = 1.0
    """How many devices should train each rank row per round, at least, on average."""


class WireSection(Section):
    """Encodings of what travels."""

    update: Encoding = "int8"
    slice: Encoding = "bfloat16"
    global_adapter: Encoding = "bfloat16"


class EvaluationSection(Section):
    """What devices measure on their own held-out code."""

    every_rounds: Positive = 5
    """The whole global adapter is also measured before the first round and after the last."""
    sequences: Positive = 32
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.1


class ServerSection(Section):
    """Where the coordinator listens and what it keeps."""

    listen: str = "127.0.0.1:8470"
    state: Path = Path("state")
    """Folder for the database, blobs and the join token."""
    credential_days: Annotated[float, Field(gt=0)] = 7.0

    @field_validator("listen")
    @classmethod
    def _loopback(cls, listen: str) -> str:
        host = host_of(listen)
        try:
            local = host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            local = False
        if not local:
            raise ValueError(
                f"{host} is not a loopback address; this version speaks plain text and therefore "
                "listens on loopback only: put a TLS tunnel in front of it"
            )
        return listen


class RunConfig(Section):
    """Everything `serve` needs, checked."""

    run: RunSection
    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    method: MethodSection = MethodSection()
    training: TrainingSection = TrainingSection()
    round: RoundSection = RoundSection()
    wire: WireSection = WireSection()
    evaluation: EvaluationSection = EvaluationSection()
    server: ServerSection = ServerSection()

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
        return self


def load_config(path: Path) -> RunConfig:
    """Reads run.toml; relative folders in it are relative to it.

    Raises `ConfigError` with the file, the key and what is allowed there.
    """
    config = load_settings(path, RunConfig, ConfigError)
    here = path.resolve().parent
    server = config.server.model_copy(update={"state": here / config.server.state.expanduser()})
    base = config.model.base
    if (here / base).is_dir():
        base = str((here / base).resolve())
    model = config.model.model_copy(update={"base": base})
    return config.model_copy(update={"server": server, "model": model})
