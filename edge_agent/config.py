"""agent.toml -> AgentConfig: what the owner of a device decides about it.

How the file is read and its mistakes are told: `profiles.settings`.
"""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from profiles.errors import SketchfleetError
from profiles.settings import Section, host_of, load_settings


class AgentConfigError(SketchfleetError):
    """agent.toml cannot be read or holds something that cannot be used."""


def _host_name() -> str:
    return re.sub(r"[^a-z0-9._-]", "-", socket.gethostname().lower()).strip("-._")[:63] or "device"


class DeviceSection(Section):
    """Who this device is."""

    name: str = Field(default_factory=_host_name, pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    """Unique in the fleet and stable; the host name unless given."""
    board: str = ""
    """What to call it in reports; recognised when empty."""


class CoordinatorSection(Section):
    """Where the coordinator is."""

    address: str = "127.0.0.1:8470"
    token_file: Path = Path("join-token")

    @field_validator("address")
    @classmethod
    def _host_and_port(cls, address: str) -> str:
        host_of(address)
        return address


class DataSection(Section):
    """Which code may be trained on. It never leaves this machine."""

    include: Annotated[tuple[str, ...], Field(min_length=1)]
    """Folders, files or globs."""
    exclude: tuple[str, ...] = ()
    """Patterns on the whole path, for example "*/vendor/*"."""
    languages: tuple[str, ...] = ()
    max_files: Annotated[int, Field(ge=1)] | None = None


class ModelSection(Section):
    """Where the base model lies, when not where the run says."""

    base: str = ""


class LimitsSection(Section):
    """What training may use."""

    memory_mb: Annotated[int, Field(ge=64)] | None = None
    """Cap on the trainer process, MB."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Of the trainer on CPU; the same number gives the same bits."""


class PersonalSection(Section):
    """What this device has for itself."""

    ditto: Annotated[float, Field(ge=0)] = 0.0
    """Ditto's lambda: how strongly the device's own adapter is held to the fleet's
    (arXiv 2012.04221); 0 trains none. Costs as many local steps again."""


class StateSection(Section):
    """Where the agent keeps its credential, journal, updates and what is the device's own."""

    folder: Path = Path("agent-state")


class TrainerSection(Section):
    """The process that trains."""

    python: str = ""
    """Interpreter with the `train` extra; this one when empty."""
    idle_s: Annotated[float, Field(ge=0)] = 120.0
    """How long an idle trainer keeps its memory."""


class AgentConfig(Section):
    """Everything the agent needs, checked."""

    data: DataSection
    device: DeviceSection = Field(default_factory=DeviceSection)
    coordinator: CoordinatorSection = CoordinatorSection()
    model: ModelSection = ModelSection()
    limits: LimitsSection = LimitsSection()
    personal: PersonalSection = PersonalSection()
    state: StateSection = StateSection()
    trainer: TrainerSection = TrainerSection()


def load_agent_config(path: Path) -> AgentConfig:
    """Reads agent.toml; relative folders in it are relative to it. Raises `AgentConfigError`."""
    config = load_settings(path, AgentConfig, AgentConfigError)
    here = path.resolve().parent
    base = config.model.base
    if base and (here / base).is_dir():
        base = str((here / base).resolve())
    return config.model_copy(
        update={
            "coordinator": config.coordinator.model_copy(
                update={"token_file": here / config.coordinator.token_file.expanduser()}
            ),
            "data": config.data.model_copy(
                update={"include": tuple(_absolute(here, i) for i in config.data.include)}
            ),
            "model": config.model.model_copy(update={"base": base}),
            "state": config.state.model_copy(
                update={"folder": here / config.state.folder.expanduser()}
            ),
        }
    )


def _absolute(here: Path, pattern: str) -> str:
    return str(here / Path(pattern).expanduser())
