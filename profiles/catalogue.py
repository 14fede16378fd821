"""Facts that ship with the package: reading a folder of them, and choosing one by its name.

Knows how a catalogue is laid out (one TOML file an entry, named like the entry, every fact with
its source) and how people misspell names. Knows no board and no link: `boards`, `links`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from profiles.errors import SketchfleetError
from profiles.settings import parse_settings

Status = Literal["published", "measured", "derived", "assumed", "unverified"]


class CatalogueError(SketchfleetError):
    """A file of the catalogue is not as it should be, or a name is in none of them."""


@dataclass(frozen=True)
class Source:
    """Where facts come from and how far they may be trusted.

    published: read in the document named; measured: on such a device, as described; derived: from
    other facts, by the rule given; assumed: a choice for planning; unverified: not looked up.
    A fact is named by its place ("memory.bandwidth_gb_per_s"), or with others by their table
    ("memory"); the narrowest name counts.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    facts: tuple[str, ...]
    source: str
    status: Status


class Entry(Protocol):
    """What every entry of a catalogue has."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def sources(self) -> tuple[Source, ...]: ...  # noqa: D102


E = TypeVar("E", bound=Entry)
V = TypeVar("V")

UNSOURCED = ("name", "title", "kind", "sources")  # our own words, not facts about the thing


def read_folder(folder: str, kind: type[E]) -> dict[str, E]:
    """The entries in `profiles/<folder>`, by name, in the order of their names.

    Raises `CatalogueError` on unknown keys, on a file named unlike its entry, on a fact without a
    source and on a source without a fact.
    """
    found: dict[str, E] = {}
    for name, text in read_texts(folder, ".toml"):
        place = f"profiles/{folder}/{name}.toml"
        entry = parse_settings(text, place, kind, CatalogueError)
        if entry.name != name:
            raise CatalogueError(f"{place} describes {entry.name!r}; name the file like the entry")
        facts = list(_facts(entry))
        if loose := [fact for fact in facts if source_of(entry, fact) is None]:
            raise CatalogueError(f"{place}: no source for {', '.join(loose)}")
        named = [fact for source in entry.sources for fact in source.facts]
        if idle := [n for n in named if not any(_covers(n, fact) for fact in facts)]:
            raise CatalogueError(f"{place}: a source is given for {', '.join(idle)}, not a fact")
        found[name] = entry
    return found


def read_texts(folder: str, suffix: str) -> list[tuple[str, str]]:
    """(name without suffix, text) of the files of a catalogue, by name."""
    files = (f for f in resources.files("profiles").joinpath(folder).iterdir() if f.is_file())
    return sorted(
        (f.name.removesuffix(suffix), f.read_text(encoding="utf-8"))
        for f in files
        if f.name.endswith(suffix)
    )


def source_of(entry: Entry, fact: str) -> Source | None:
    """The source of one fact: that of its narrowest name."""
    covering = [
        (len(name), source)
        for source in entry.sources
        for name in source.facts
        if _covers(name, fact)
    ]
    return max(covering, key=lambda pair: pair[0])[1] if covering else None


def choose(name: str, catalogue: Mapping[str, V], what: str) -> V:
    """The entry of that name, however it is capitalised.

    Raises `CatalogueError` with the names that come near, or all of them.
    """
    if (found := catalogue.get(name.strip().lower())) is not None:
        return found
    raise CatalogueError(f"there is no {what} {name!r}; {suggestion(name, tuple(catalogue))}")


def suggestion(name: str, known: Sequence[str]) -> str:
    """The names that come near ("did you mean a or b?"), or all there are."""
    wanted = name.strip().lower()
    near = difflib.get_close_matches(wanted, known, n=3)
    near += [n for n in known if wanted and n not in near and (wanted in n or n in wanted)]
    return f"did you mean {' or '.join(near[:4])}?" if near else f"there are {', '.join(known)}"


def _facts(value: Any, path: str = "") -> Iterator[str]:
    """Places of everything that holds a value; a list is one fact."""
    if not dataclasses.is_dataclass(value):
        yield path
        return
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if (path or field.name not in UNSOURCED) and inner not in (None, (), ""):
            yield from _facts(inner, f"{path}.{field.name}" if path else field.name)


def _covers(name: str, fact: str) -> bool:
    return fact == name or fact.startswith(f"{name}.")
