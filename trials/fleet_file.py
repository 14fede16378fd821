"""fleet.toml of a trial: the run, and devices with their boards, links and code (docs/trials.md).

Knows the file and the catalogues, and tells one mistake in one sentence. Starts nothing. The
`fleet.toml` of `sketchfleet-coordinator plan` describes devices that do not exist, in [[group]]s.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from coordinator.config import RunConfig
from edge_agent.config import AgentConfig
from profiles.boards import GIB, Board, load_boards
from profiles.catalogue import choose
from profiles.compat import tomllib
from profiles.errors import ExitCode, SketchfleetError
from profiles.links import load_links
from profiles.settings import Section, load_settings, parse_settings
from profiles.trace import LinkState, Outage, TraceError, read_trace, steady
from trials.fleet import toml_text

Plain = dict[str, dict[str, Any]]
Rate = Annotated[float, Field(gt=0)]
FOLDERS = ("include", "exclude", "jsonl", "parquet")  # of [data]: paths, or patterns of paths
MOST_DEVICES = 256  # real processes, each with a trainer


class FleetFileError(SketchfleetError):
    """fleet.toml cannot be read or holds something that cannot be tried."""

    exit_code: ClassVar[ExitCode] = ExitCode.SETTINGS


class RunTable(BaseModel):
    """[run]: a run.toml by its path, and sections that stand instead of or beside its own."""

    model_config = ConfigDict(extra="allow", frozen=True)

    file: str = ""
    """Path of a run.toml; its defaults when empty."""


class TrialTable(Section):
    """[trial]: how it is tried."""

    at_most_s: Rate | None = None
    """Ends the trial after so long, whatever is done; what is there is kept."""
    bulk_tcp_s: Annotated[float, Field(ge=0)] = 0.0
    """Before the run: how long to time plain TCP over each kind of link, to compare with."""


class OutageTable(Section):
    """Nothing passes for `lasts_s` at the end of every `every_s`."""

    every_s: Rate
    """From one end of an outage to the next."""
    lasts_s: Rate
    """How long it is."""
    begun_s: Annotated[float, Field(ge=0)] = 0.0
    """How far into the first `every_s` the trial begins, so that devices are not away together."""


class DeviceTable(Section):
    """[[device]]: one device, or `count` alike. Without link, rates or trace, loopback as it is."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,54}$")]
    """Unique; followed by a number where there are several."""
    count: Annotated[int, Field(ge=1, le=MOST_DEVICES)] = 1
    """How many alike."""
    board: str = ""
    """Of the catalogue: its memory is the cap, and its cores if there are fewer than here."""
    memory_mb: Annotated[int, Field(ge=64)] | None = None
    """Cap on the trainer, instead of the board's."""
    cpus: Rate | None = None
    """Instead of the board's; 0.5 is half a processor of this machine."""
    link: str = ""
    """Of the catalogue."""
    up_bps: Rate | None = None
    """From the device, instead of the link's."""
    down_bps: Rate | None = None
    """To the device, instead of the link's."""
    rtt_s: Annotated[float, Field(ge=0)] | None = None
    """There and back, instead of the link's."""
    loss: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Instead of the link's, or without one."""
    outage: OutageTable | None = None
    trace: str = ""
    """A recording (CSV) instead of a link."""
    data: dict[str, Any] = Field(default_factory=dict)
    """As [data] of agent.toml."""
    agent: Plain = Field(default_factory=dict)
    """Further sections of agent.toml."""


class FleetFile(Section):
    """fleet.toml."""

    run: RunTable
    device: tuple[DeviceTable, ...] = ()
    trial: TrialTable = TrialTable()


@dataclass(frozen=True)
class TrialLink:
    """A link to be emulated: what it is like t seconds after the start, and in words."""

    at: Callable[[float], LinkState]
    words: str
    lossy: bool


@dataclass(frozen=True)
class TrialDevice:
    """One device of a trial."""

    name: str
    board: Board | None
    memory_bytes: int | None  # cap
    cpus: float | None  # cap
    link: TrialLink | None
    agent: Plain  # sections of agent.toml that fleet.toml decides


@dataclass(frozen=True)
class Trial:
    """A checked fleet.toml."""

    path: Path
    run: RunConfig
    sections: Plain  # the same as run.toml has it
    settings: TrialTable
    devices: tuple[TrialDevice, ...]


def read_trial(path: Path, *, remote: bool = False) -> Trial:
    """Reads and checks fleet.toml; relative paths in it are relative to it.

    `remote`: devices are machines of their own, so only their names count, and other keys are
    refused. Raises `FleetFileError`, `CatalogueError`, `TraceError`.
    """
    file = load_settings(path, FleetFile, FleetFileError)
    if not file.device:
        raise FleetFileError(f"{path} names no devices; give at least one [[device]]")
    devices: list[TrialDevice] = []
    for number, table in enumerate(file.device, 1):
        place = f"{path}: [[device]] {number} ({table.name})"
        try:
            one = _remote(table, place) if remote else _device(table, place, path.parent)
        except (SketchfleetError, OSError) as error:
            if isinstance(error, FleetFileError):
                raise
            raise FleetFileError(f"{place}: {error}") from error
        names = [d.name for d in devices]
        for name in _names(table):
            if name in names:
                raise FleetFileError(f"{path} has two devices named {name!r}; name them apart")
            devices.append(dataclasses.replace(one, name=name))
    if len(devices) > MOST_DEVICES:
        raise FleetFileError(
            f"{path} has {len(devices)} devices, and at most {MOST_DEVICES} can be started here"
        )
    sections, config = _run(file.run, path, len(devices))
    return Trial(path, config, sections, file.trial, tuple(devices))


def _names(table: DeviceTable) -> list[str]:
    if table.count == 1:
        return [table.name]
    width = len(str(table.count))
    return [f"{table.name}-{i:0{width}d}" for i in range(1, table.count + 1)]


def _remote(table: DeviceTable, place: str) -> TrialDevice:
    given = table.model_fields_set - {"name", "count"}
    if given:
        raise FleetFileError(
            f"{place} has {', '.join(sorted(given))}, which a real machine decides itself; with "
            "--remote give only name and count"
        )
    return TrialDevice(table.name, None, None, None, None, {})


def _device(table: DeviceTable, place: str, here: Path) -> TrialDevice:
    if not table.data:
        raise FleetFileError(f"{place} has no code to train on; give it data.include")
    board = choose(table.board, load_boards(), "board") if table.board else None
    if board is not None and board.no_trainer:
        raise FleetFileError(f"{place}: {board.title} {board.no_trainer}; choose another board")
    memory_bytes, cpus = None, table.cpus
    if board is not None:
        memory_bytes = int((board.memory.visible_gib - board.memory.idle_gib) * GIB)
    if table.memory_mb is not None:
        memory_bytes = table.memory_mb * 10**6
    agent: Plain = {
        **table.agent,
        "data": {k: _beside(k, v, here) for k, v in table.data.items()},
    }
    for name in ("device", "coordinator", "state"):
        if name in table.agent:
            raise FleetFileError(f"{place}: [{name}] of agent.toml is the trial's to write")
    parse_settings(toml_text(agent), f"{place}, as agent.toml", AgentConfig, FleetFileError)
    return TrialDevice(table.name, board, memory_bytes, cpus, _link(table, place, here), agent)


def _beside(key: str, value: Any, here: Path) -> Any:
    """Paths of [data] relative to fleet.toml; a missing folder is told here, not by an agent."""
    if key not in FOLDERS or not isinstance(value, list):
        return value
    found = []
    for text in value:
        path = str(here.resolve() / Path(str(text)).expanduser())
        plain = not any(c in str(text) for c in "*?[")
        if key != "exclude" and plain and not Path(path).exists():
            raise FleetFileError(f"data.{key} names {text}, which is not there")
        found.append(text if key == "exclude" else path)
    return found


def _link(table: DeviceTable, place: str, here: Path) -> TrialLink | None:
    numbers = ("up_bps", "down_bps", "rtt_s", "loss")
    own = {k: v for k in numbers if (v := getattr(table, k)) is not None}
    if table.trace:
        if table.link or own or table.outage is not None:
            raise FleetFileError(f"{place} has a trace and a link; leave one of them out")
        path = here / Path(table.trace).expanduser()
        if not path.is_file():
            raise FleetFileError(f"{place}: there is no trace {path}; record one with "
                                 "`sketchfleet-agent record`")  # fmt: skip
        at = read_trace(path)
        return TrialLink(at, f"as recorded in {table.trace}", lossy=True)
    facts = {"rtt_s": 0.0, "loss": 0.0}
    words = []
    if table.link:
        known = choose(table.link, load_links(), "link")
        facts = {k: float(getattr(known, k)) for k in numbers}
        words = [table.link]
    elif not own and table.outage is None:
        return None
    facts |= own
    if missing := [k for k in ("up_bps", "down_bps") if k not in facts]:
        raise FleetFileError(f"{place} has no {' and no '.join(missing)}; give it, or a link")
    outage = None
    if table.outage is not None:
        try:
            outage = Outage(table.outage.every_s, table.outage.lasts_s)
        except TraceError as error:
            raise FleetFileError(f"{place}: {error}") from error
    state = LinkState(facts["up_bps"], facts["down_bps"], facts["rtt_s"] / 2, facts["loss"])
    words.append(
        f"{state.up_bps / 1e6:.3g} / {state.down_bps / 1e6:.3g} Mbit/s up / down, "
        f"{1000 * facts['rtt_s']:.0f} ms round trip, {state.loss:.1%} loss"
    )
    if outage is not None:
        words.append(f"{outage.lasts_s:.0f} s of every {outage.every_s:.0f} s nothing")
    begun_s = 0.0 if table.outage is None else table.outage.begun_s
    at = steady(state, outage)
    return TrialLink(lambda t_s: at(t_s + begun_s), ", ".join(words), lossy=state.loss > 0)


def _run(table: RunTable, path: Path, devices: int) -> tuple[Plain, RunConfig]:
    """run.toml as it will be used: the file's sections, then those written here."""
    written: Mapping[str, Any] = table.model_extra or {}
    known = list(RunConfig.model_fields)
    for name, section in written.items():
        if name not in known or not isinstance(section, dict):
            near = difflib.get_close_matches(name, ["file", *known], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: file, {', '.join(known)}"
            raise FleetFileError(f"{path}: [run] {name} is no section of run.toml; {hint}")
    base_folder = path.parent
    sections: Plain = {}
    if table.file:
        source = path.parent / Path(table.file).expanduser()
        load_settings(source, RunConfig, FleetFileError)  # its own mistakes under its own name
        sections = tomllib.loads(source.read_text(encoding="utf-8"))
        base_folder = source.parent
    elif not written:
        raise FleetFileError(
            f'{path}: [run] says nothing of the run; give file = "run.toml", or sections such as '
            "[run.model]"
        )
    for name, section in written.items():
        sections[name] = {**sections.get(name, {}), **section}
        if name == "model" and "base" in section:
            base_folder = path.parent
    sections.setdefault("run", {}).setdefault("name", "trial")
    base = str(sections.get("model", {}).get("base", ""))
    if base and (base_folder / base).is_dir():
        sections["model"] = {**sections["model"], "base": str((base_folder / base).resolve())}
    # A trial is of the whole fleet unless it says otherwise.
    sections["round"] = {"min_devices": devices, **sections.get("round", {})}
    text = toml_text(sections)
    return sections, parse_settings(text, f"{path}: [run]", RunConfig, FleetFileError)
