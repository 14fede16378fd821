"""A report as a document: sections of words, tables and figures, and the document as Markdown.

Tables and figures carry the captions they would have in a paper and are numbered in order. Nothing
is known of runs. `document_html` is the same as a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table with its caption: what is shown, how it is defined, in which unit.

    Cells are text; the first `text_columns` columns hold words, the others numbers. wide: more
    columns than a page of paper has room for beside each other in the usual size.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1
    wide: bool = False


@dataclass(frozen=True)
class Figure:
    """A chart (inline SVG) with its caption, and the same values as a table."""

    caption: str
    svg: str
    values: Table


@dataclass(frozen=True)
class Code:
    """A file's text, as it stands."""

    caption: str
    text: str


Part = Words | Bullets | Table | Figure | Code


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    lead: str
    sections: tuple[Section, ...]


def numbered(document: Document) -> dict[int, str]:
    """By the id() of each table and figure its name, "Table 1" or "Figure 1", in order."""
    found: dict[int, str] = {}
    tables = figures = 0
    for section in document.sections:
        for part in section.parts:
            if isinstance(part, Table):
                tables += 1
                found[id(part)] = f"Table {tables}"
            elif isinstance(part, Figure):
                figures += 1
                found[id(part)] = f"Figure {figures}"
    return found


def markdown(document: Document) -> str:
    """One Markdown file. Figures are given as the tables of their values: it holds no pictures."""
    numbers = numbered(document)
    lines = [f"# {_escaped(document.title)}", "", _escaped(document.lead)]
    for section in document.sections:
        lines += ["", f"## {_escaped(section.title)}"]
        for part in section.parts:
            lines.append("")
            if isinstance(part, Words):
                lines.append(_escaped(part.text))
            elif isinstance(part, Bullets):
                lines += [f"- {_escaped(item)}" for item in part.items]
            elif isinstance(part, Code):
                fence = "`" * 4 if "```" in part.text else "```"
                lines += [_escaped(part.caption), "", fence, part.text, fence]
            else:
                table = part.values if isinstance(part, Figure) else part
                caption = f"**{numbers[id(part)]}.** {_escaped(part.caption)}"
                lines += [caption, "", *_table(table)]
    return "\n".join(lines) + "\n"


def _table(table: Table) -> list[str]:
    rule = [":--" if n < table.text_columns else "--:" for n in range(len(table.columns))]
    rows: list[Sequence[str]] = [table.columns, rule, *table.rows]
    return [
        "| " + " | ".join(c if row is rule else _escaped(c) for c in row) + " |" for row in rows
    ]


def _escaped(text: str) -> str:
    """Text of which Markdown makes nothing else: names of devices come from devices."""
    flat = " ".join(text.split())
    for mark in "\\`*_[]<>|#":
        flat = flat.replace(mark, "\\" + mark)
    return flat
