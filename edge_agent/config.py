"""agent.toml -> AgentConfig: what the owner of a device decides about it.

How the file is read and its mistakes are told: `profiles.settings`.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from edge_agent.network import NetworkSection
from edge_agent.policy import Policy
from edge_agent.serving_settings import ServeSection
from edge_agent.training.connectors import DataSelection, Problems
from edge_agent.training.git_history import GitRange
from edge_agent.training.labelled import Columns, Labelled
from edge_agent.training.records import Keys
from profiles.errors import ExitCode, SketchfleetError
from profiles.events import LogSection
from profiles.layers import Layered, load_layered
from profiles.places import config_places, find_config, state_folder
from profiles.settings import Section, host_of, is_loopback

PREFIX = "SKETCHFLEET_AGENT"  # of variables: SKETCHFLEET_AGENT__SECTION__KEY
FILE = "agent.toml"
BESIDE = "agent-state"


class AgentConfigError(SketchfleetError):
    """agent.toml cannot be read or holds something that cannot be used."""

    exit_code: ClassVar[ExitCode] = ExitCode.SETTINGS


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

    address: str = ""
    """As enrolling told when empty."""
    ca: Path | None = None
    """For a fleet of your own PKI: roots that the coordinator's certificate is verified up to, PEM;
    with them `certificate` and `key` of this device. They are read again when they change."""
    certificate: Path | None = None
    """This device's own, PEM."""
    key: Path | None = None
    """Its private key, PEM."""
    plain_text: bool = False
    """No TLS, and a join token from a file: for trials within this machine."""
    token_file: Path = Path("join-token")
    """Of a plain-text fleet."""

    @field_validator("address")
    @classmethod
    def _host_and_port(cls, address: str) -> str:
        if address:
            host_of(address)
        return address

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        given = [path is not None for path in (self.ca, self.certificate, self.key)]
        if any(given) and not all(given):
            raise ValueError("needs ca, certificate and key together, or none of them")
        if self.plain_text and self.address and not is_loopback(host_of(self.address)):
            raise ValueError(
                f"plain_text is for trials within one machine, {self.address} is another; join "
                "with `sketchfleet-agent enroll`"
            )
        if all(given) and not self.address:
            raise ValueError("needs an address beside ca, certificate and key")
        return self

    @property
    def own_pki(self) -> tuple[Path, Path, Path] | None:
        """CA, certificate and key of the owner's PKI."""
        if self.ca is None or self.certificate is None or self.key is None:
            return None
        return self.ca, self.certificate, self.key

    def placed(self, here: Path) -> CoordinatorSection:
        """The same with absolute paths."""
        paths = {key: None if path is None else here / path.expanduser()
                 for key in ("ca", "certificate", "key", "token_file")
                 for path in [getattr(self, key)]}  # fmt: skip
        return self.model_copy(update=paths)


class DataSection(Section):
    """Which code may be trained on. It never leaves this machine."""

    include: tuple[str, ...] = ()
    """Folders, files or globs of source code."""
    exclude: tuple[str, ...] = ()
    """Patterns on the whole path, for example "*/vendor/*"."""
    languages: tuple[str, ...] = ()
    """Only these; all when empty."""
    max_files: Annotated[int, Field(ge=1)] | None = None
    """Documents, of whatever source; a sample by content."""
    max_mb: Annotated[int, Field(ge=1)] = 64
    """Of text; a sample by content. Bounds the memory that a large source takes."""
    jsonl: tuple[str, ...] = ()
    """Files or globs, one JSON object per line; also .gz, .bz2 and .xz."""
    parquet: tuple[str, ...] = ()
    """Files or globs. Needs the extra "data"."""
    dataset: str = ""
    """A Hugging Face dataset of JSONL or Parquet files: "owner/name", or a folder."""
    dataset_revision: str = ""
    """A commit of it; the newest when empty."""
    dataset_folder: str = ""
    """Only files below this folder of it."""
    dataset_split: str = "train"
    """The split that is trained on."""
    dataset_held_out: str = ""
    """The split that is held out; a share of `dataset_split` when empty."""
    text_key: str = "text"
    """Where the text of a record is, unless it has a prompt and a completion."""
    prompt_key: str = ""
    """Where a record's prompt is."""
    completion_key: str = ""
    """With a prompt and a completion, only the completion counts."""
    language_key: str = ""
    """Where a record names its programming language; needed to choose by `languages`."""
    git: str = ""
    """A repository. Needs `git_cutoff`; nothing else may be named beside it."""
    git_cutoff: str = ""
    """A commit, tag or ISO date: before it is trained on, what changed after it is held out."""
    git_since: str = ""
    """Only files that changed between this and the cut-off are trained on."""
    git_head: str = "HEAD"
    """The newest commit that counts."""
    labelled: tuple[str, ...] = ()
    """Files or globs of labelled texts or pairs, for runs that classify: TSV with a header, or one
    JSON object per line; also compressed. Nothing else may be named beside it."""
    labelled_held_out: tuple[str, ...] = ()
    """What of it is held out; a share of `labelled` when empty."""
    first_key: str = ""
    """Column of the text, or of the first of a pair."""
    second_key: str = ""
    """Column of the second text of a pair."""
    label_key: str = ""
    """Columns of the texts and the label; as GLUE's tasks name them when empty."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        sources = ("include", "jsonl", "parquet", "dataset", "git", "labelled")
        named = [key for key in sources if getattr(self, key)]
        if not named:
            raise ValueError(f"names no data; give {', '.join(sources[:-1])} or labelled")
        if self.labelled and len(named) > 1:
            raise ValueError(
                f"labelled stands alone, but {' and '.join(named[:-1])} is named too, which no run "
                "could use beside it; run a second agent for it"
            )
        if self.labelled_held_out and not self.labelled:
            raise ValueError("labelled_held_out needs labelled")
        if bool(self.first_key) != bool(self.label_key) or (self.second_key and not self.first_key):
            raise ValueError("first_key and label_key go together, and second_key goes with them")
        if self.first_key and not self.labelled:
            raise ValueError("first_key and label_key need labelled")
        if self.git and len(named) > 1:
            others = " and ".join(named[:-1])
            raise ValueError(
                f"git stands alone, but {others} is named too, which could hold what changed "
                "after git_cutoff; run a second agent for it"
            )
        if bool(self.git) != bool(self.git_cutoff):
            raise ValueError("git and git_cutoff go together")
        if self.git_since and not self.git:
            raise ValueError("git_since needs git")
        if bool(self.prompt_key) != bool(self.completion_key):
            raise ValueError("prompt_key and completion_key go together")
        records = self.jsonl or self.parquet or self.dataset
        if self.languages and records and not self.language_key:
            raise ValueError("languages needs language_key to know those of jsonl or parquet")
        return self


class ModelSection(Section):
    """Where the base model lies, when not where the run says."""

    base: str = ""
    """A folder or hub id with the same weights, which are checked by their digest."""


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

    folder: Path = Path(BESIDE)
    """In the standard place of state when not given: systemd's STATE_DIRECTORY,
    /var/lib/sketchfleet/agent or $XDG_STATE_HOME/sketchfleet/agent; beside a settings file that
    lies elsewhere."""


class TrainerSection(Section):
    """The process that trains."""

    python: str = ""
    """Interpreter with the `train` extra; this one when empty."""
    idle_s: Annotated[float, Field(ge=0)] = 120.0
    """How long an idle trainer keeps its memory."""


class EvaluationSection(Section):
    """What the fleet's adapter is tested with on this device, beside held-out code.

    Programs that the model writes are run here, in a sandbox; none are while `problems` is empty.
    """

    problems: str = ""
    """A file in HumanEval's or MBPP's format."""
    samples: Annotated[int, Field(ge=1, le=200)] = 1
    """Programs per problem: one is the most likely, several are drawn."""
    max_problems: Annotated[int, Field(ge=1)] | None = None
    """The first so many; all when not given."""
    temperature: Annotated[float, Field(gt=0, le=2)] = 0.8
    """Of programs that are drawn."""
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 256
    """Of one program, at most."""
    wall_s: Annotated[float, Field(gt=0, le=600)] = 10.0
    """Of one program with its tests."""
    memory_mb: Annotated[int, Field(ge=64)] = 512
    """Of one program."""


class AgentConfig(Section):
    """Everything the agent needs, checked."""

    data: DataSection
    evaluation: EvaluationSection = EvaluationSection()
    device: DeviceSection = Field(default_factory=DeviceSection)
    coordinator: CoordinatorSection = CoordinatorSection()
    model: ModelSection = ModelSection()
    limits: LimitsSection = LimitsSection()
    log: LogSection = LogSection()
    network: NetworkSection = NetworkSection()
    policy: Policy = Policy()
    personal: PersonalSection = PersonalSection()
    serve: ServeSection = ServeSection()
    state: StateSection = StateSection()
    trainer: TrainerSection = TrainerSection()

    @property
    def selection(self) -> DataSelection:
        """What [data] and [evaluation] choose, as the trainer takes it."""
        data, tested = self.data, self.evaluation
        return DataSelection(
            include=data.include,
            exclude=data.exclude,
            languages=data.languages,
            max_files=data.max_files,
            max_bytes=data.max_mb * 10**6,
            jsonl=data.jsonl,
            parquet=data.parquet,
            dataset=data.dataset,
            dataset_revision=data.dataset_revision,
            dataset_folder=data.dataset_folder,
            dataset_split=data.dataset_split,
            dataset_held_out=data.dataset_held_out,
            keys=Keys(data.text_key, data.prompt_key, data.completion_key, data.language_key),
            git=GitRange(data.git, data.git_cutoff, data.git_since, data.git_head)
            if data.git
            else None,
            problems=Problems(
                tested.problems,
                tested.samples,
                tested.max_problems,
                tested.temperature,
                tested.max_new_tokens,
                tested.wall_s,
                tested.memory_mb,
            )
            if tested.problems
            else None,
            labelled=self._labelled,
        )

    @property
    def _labelled(self) -> Labelled | None:
        data = self.data
        if not data.labelled:
            return None
        named = Columns(data.first_key, data.second_key, data.label_key)
        columns = named if data.first_key else None
        return Labelled(data.labelled, data.labelled_held_out, columns)


def load_agent_config(
    path: Path | None = None,
    given: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> AgentConfig:
    """The settings of `read_agent_config`."""
    return read_agent_config(path, given, environ).settings


def read_agent_config(
    path: Path | None = None,
    given: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Layered[AgentConfig]:
    """Reads agent.toml, the environment above it and `given` (of `--set`) above both.

    Relative folders are relative to the file, or where there is none to where one is now. Without
    a path the standard places are searched. Raises `AgentConfigError`.
    """
    environ = os.environ if environ is None else environ
    path = path or find_config(FILE, environ)
    if path is None and not any(name.startswith(f"{PREFIX}__") for name in environ) and not given:
        places = ", ".join(map(str, config_places(FILE, environ)))
        raise AgentConfigError(
            f"no {FILE} in the standard places ({places}); write one there or pass --config FILE"
        )
    found = load_layered(path, AgentConfig, AgentConfigError, PREFIX, given, environ)
    config = found.settings
    sources = dict(found.sources)
    here = Path.cwd() if path is None else path.resolve().parent
    folder = here / config.state.folder.expanduser()
    if "folder" not in config.state.model_fields_set:
        folder, sources["state.folder"] = state_folder("agent", path, BESIDE, environ)
    base = config.model.base
    if base and (here / base).is_dir():
        base = str((here / base).resolve())
    problems = config.evaluation.problems
    placed = config.model_copy(
        update={
            "coordinator": config.coordinator.placed(here),
            "data": _placed(here, config.data),
            "evaluation": config.evaluation.model_copy(
                update={"problems": _absolute(here, problems) if problems else ""}
            ),
            "model": config.model.model_copy(update={"base": base}),
            "serve": config.serve.placed(here),
            "state": config.state.model_copy(update={"folder": folder}),
        }
    )
    return Layered(placed, sources)


def _placed(here: Path, data: DataSection) -> DataSection:
    """The same with absolute paths."""
    paths: dict[str, object] = {
        key: tuple(_absolute(here, pattern) for pattern in getattr(data, key))
        for key in ("include", "jsonl", "parquet", "labelled", "labelled_held_out")
    }
    if data.git:
        paths["git"] = _absolute(here, data.git)
    if data.dataset and Path(_absolute(here, data.dataset)).is_dir():
        paths["dataset"] = _absolute(here, data.dataset)  # else a name on the hub
    return data.model_copy(update=paths)


def _absolute(here: Path, pattern: str) -> str:
    return str(here / Path(pattern).expanduser())
