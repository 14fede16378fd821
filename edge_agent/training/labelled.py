"""Labelled texts and pairs of texts, as GLUE's tasks come (arXiv 1804.07461) -> documents.

Knows tab-separated files with a header line and JSON lines, both also compressed, and which columns
each task keeps its texts and label in. In GLUE's files a quotation mark is a character like any
other: nothing is quoted or escaped, so a line is a row and a tab ends a column. It does not know
which labels a run has.
"""

from __future__ import annotations

import lzma
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.training.documents import (
    CorpusError,
    Document,
    Split,
    digest_of,
    split_of,
    unusable,
)
from edge_agent.training.records import (
    COMPRESSED,
    MAX_LINE_BYTES,
    Record,
    is_jsonl,
    jsonl_records,
)

NO_LABEL = "-"  # MNLI and SNLI, where annotators did not agree


@dataclass(frozen=True)
class Columns:
    """Where a record has its first text, the second of a pair ("": none), and its label."""

    first: str
    second: str
    label: str

    @property
    def named(self) -> tuple[str, ...]:
        """All that there are."""
        return tuple(name for name in (self.first, self.second, self.label) if name)


# MNLI before what else has its two sentences: it also keeps each annotator's label.
GLUE: Mapping[str, Columns] = {
    "MNLI": Columns("sentence1", "sentence2", "gold_label"),
    "RTE": Columns("sentence1", "sentence2", "label"),
    "MRPC": Columns("#1 String", "#2 String", "Quality"),
    "QQP": Columns("question1", "question2", "is_duplicate"),
    "QNLI": Columns("question", "sentence", "label"),
    "SST-2": Columns("sentence", "", "label"),
    "NLI": Columns("premise", "hypothesis", "label"),
}
"""By task, in the order in which they are looked for; RTE stands for WNLI too."""


@dataclass(frozen=True)
class Labelled:
    """Files and globs of labelled texts; without `held_out` a share of `train` is held out."""

    train: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    columns: Columns | None = None  # None: as GLUE's tasks name them


def labelled_documents(
    path: Path,
    columns: Columns | None,
    skipped: Counter[str],
    *,
    held_out_share: float = 0.1,
    split: Split | None = None,
) -> Iterator[Document]:
    """The usable rows of a file; `skipped` counts the others, copies aside.

    Rows with the same texts are in the same split; `split`, when given, is that of all. Raises
    `CorpusError` with file and line on a row of other columns than the header's, or without text
    or label.
    """
    records = jsonl_records(path, skipped) if is_jsonl(path) else tsv_records(path, skipped)
    for where, values in records:
        if columns is None:
            columns = _recognised(where, values)
        texts = [_text(values, name, where) for name in columns.named[:-1]]
        label = _label(values, columns.label, where)
        if label == NO_LABEL:
            skipped["no label agreed on"] += 1
            continue
        if (why := next((w for w in map(unusable, texts) if w is not None), None)) is not None:
            skipped[why] += 1
            continue
        try:
            key, digest = digest_of(*texts), digest_of(*texts, label)
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
            skipped["not UTF-8"] += 1
            continue
        yield Document(
            tuple((text, False) for text in texts),
            "",
            digest,
            split or split_of(key, held_out_share),
            where,
            together=True,
            label=label,
        )


def tsv_records(path: Path, skipped: Counter[str]) -> Iterator[Record]:
    """The rows of a tab-separated file by the names in its first line; blank lines are passed over.

    Lines over 16 MiB are counted in `skipped`. Raises `CorpusError` with file and line.
    """
    if not path.is_file():  # a pipe may never end
        raise CorpusError(f"{path} is not a file; check the paths under [data]")
    names: list[str] = []
    number = 0
    try:
        with COMPRESSED.get(path.suffix, Path.open)(path, "rb") as stream:
            while raw := stream.readline(MAX_LINE_BYTES):
                number += 1
                if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
                    skipped["too large"] += 1
                    while (rest := stream.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                        pass
                    continue
                line = _decoded(raw, path, number)
                if not names:
                    names = _header(line, path)
                elif line:
                    yield f"{path} line {number}", _row(line, names, path, number)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise CorpusError(f"{path} cannot be read after line {number}: {error}") from error


def _decoded(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} line {number} is not UTF-8; convert the file") from error


def _header(line: str, path: Path) -> list[str]:
    names = line.split("\t")
    if len(names) < 2 or len(set(names)) < len(names):
        raise CorpusError(
            f"{path} line 1 is no header of two or more tab-separated names, each once; a file "
            "without one (CoLA's) needs a first line such as source, label, mark, sentence"
        )
    return names


def _row(line: str, names: Sequence[str], path: Path, number: int) -> dict[str, Any]:
    values = line.split("\t")
    if len(values) != len(names):
        raise CorpusError(
            f"{path} line {number} has {len(values)} columns where its header names {len(names)}; "
            "texts must hold no tabs, and nothing is quoted"
        )
    return dict(zip(names, values, strict=True))


def _recognised(where: str, values: Mapping[str, Any]) -> Columns:
    """The first of GLUE's tasks whose columns are all there. Raises `CorpusError`."""
    for columns in GLUE.values():
        if all(name in values for name in columns.named):
            return columns
    raise CorpusError(
        f"{where} has columns {', '.join(map(str, values))}, which are none of "
        f"{', '.join(GLUE)}; name them with first_key, second_key and label_key under [data]"
    )


def _text(values: Mapping[str, Any], name: str, where: str) -> str:
    value = values.get(name)
    if not isinstance(value, str):
        raise _lacks(where, name, "text", values)
    return value


def _label(values: Mapping[str, Any], name: str, where: str) -> str:
    """A label as text; JSON may have it as a whole number."""
    value = values.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise _lacks(where, name, "label", values)
    return value.strip()


def _lacks(where: str, name: str, what: str, values: Mapping[str, Any]) -> CorpusError:
    return CorpusError(
        f"{where} has no {what} under {name!r} (it has: {', '.join(map(str, values))}); correct "
        "the file, or the keys under [data]"
    )
