"""agent.toml -> AgentConfig: what the owner of a device decides about it."""

from __future__ import annotations

import difflib
import re
import socket
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from profiles.errors import SketchfleetError


class AgentConfigError(SketchfleetError):
    """agent.toml cannot be read or holds something that cannot be used."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _host_name() -> str:
    return re.sub(r"[^a-z0-9._-]", "-", socket.gethostname().lower()).strip("-._")[:63] or "device"


class DeviceSection(_Section):
    """Who this device is."""

    name: str = Field(default_factory=_host_name, pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    """Unique in the fleet and stable; the host name unless given."""
    board: str = ""
    """What to call it in reports; recognised when empty."""


class CoordinatorSection(_Section):
    """Where the coordinator is."""

    address: str = "127.0.0.1:8470"
    token_file: Path = Path("join-token")


class DataSection(_Section):
    """Which code may be trained on. It never leaves this machine."""

    include: Annotated[tuple[str, ...], Field(min_length=1)]
    """Folders, files or globs."""
    exclude: tuple[str, ...] = ()
    """Patterns on the whole path, for example "*/vendor/*"."""
    languages: tuple[str, ...] = ()
    max_files: Annotated[int, Field(ge=1)] | None = None


class ModelSection(_Section):
    """Where the base model lies, when not where the run says."""

    base: str = ""


class LimitsSection(_Section):
    """What training may use."""

    memory_mb: Annotated[int, Field(ge=64)] | None = None
    """Cap on the trainer process, MB."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Of the trainer on CPU; the same number gives the same bits."""


class StateSection(_Section):
    """Where the agent keeps its credential, journal and updates."""

    folder: Path = Path("agent-state")


class TrainerSection(_Section):
    """The process that trains."""

    python: str = ""
    """Interpreter with the `train` extra; this one when empty."""
    idle_s: Annotated[float, Field(ge=0)] = 120.0
    """How long an idle trainer keeps its memory."""


class AgentConfig(_Section):
    """Everything the agent needs, checked."""

    data: DataSection
    device: DeviceSection = Field(default_factory=DeviceSection)
    coordinator: CoordinatorSection = CoordinatorSection()
    model: ModelSection = ModelSection()
    limits: LimitsSection = LimitsSection()
    state: StateSection = StateSection()
    trainer: TrainerSection = TrainerSection()


def load_agent_config(path: Path) -> AgentConfig:
    """Reads agent.toml; relative folders in it are relative to it. Raises `AgentConfigError`."""
    try:
        plain = tomllib.loads(path.read_text())
    except OSError as error:
        raise AgentConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AgentConfigError(f"{path} is not valid TOML: {error}") from error
    try:
        config = AgentConfig.model_validate(plain)
    except ValidationError as error:
        raise AgentConfigError(f"{path}: {_explain(error)}") from error
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


def _explain(error: ValidationError) -> str:
    found: Any = error.errors()
    # A misspelt section is also a missing one; the misspelling is what helps.
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
    where = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(where[-1], _keys(where[:-1]), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown key {'.'.join(where)!r}{hint}"
    if first["type"] == "missing":
        return f"{'.'.join(where)} is missing"
    return f"{'.'.join(where)}: {first['msg'].lower()}"


def _keys(section: list[str]) -> list[str]:
    fields: dict[str, Any] = dict(AgentConfig.model_fields)
    if section and section[0] in fields:
        kind = fields[section[0]].annotation
        fields = dict(kind.model_fields) if kind is not None else {}
    return sorted(fields)
