"""JSONL and Parquet files -> records -> documents, one at a time.

Knows the two formats (JSONL also as .gz, .bz2 or .xz), which keys of a record hold text, and how to
say what is wrong with a file. Memory is one record, or some pages of a Parquet file, however large
the file. It does not know where the files came from, nor how many documents are wanted.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
from profiles.errors import MissingExtraError

MAX_LINE_BYTES = 1 << 24
BATCH_RECORDS = 16
READ_AHEAD_BYTES = 1 << 20
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
Open = Callable[..., Any]
COMPRESSED: dict[str, Open] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
Record = tuple[str, dict[str, Any]]  # where it stands, and its values


@dataclass(frozen=True)
class Keys:
    """Which values of a record are text: one, or a prompt and its completion."""

    text: str = "text"
    prompt: str = ""
    completion: str = ""
    language: str = ""

    @property
    def wanted(self) -> tuple[str, ...]:
        """All that must be there."""
        texts = (self.prompt, self.completion) if self.prompt else (self.text,)
        return (*texts, self.language) if self.language else texts


def is_jsonl(path: Path) -> bool:
    """By its name, compressed or not."""
    name = path.with_suffix("") if path.suffix in COMPRESSED else path
    return name.suffix in JSONL_SUFFIXES


def jsonl_records(path: Path, skipped: Counter[str]) -> Iterator[Record]:
    """The objects of a file with one JSON object per line; blank lines are passed over.

    Lines over 16 MiB are counted in `skipped`. Raises `CorpusError` with file and line.
    """
    if not path.is_file():  # a pipe may never end
        raise CorpusError(f"{path} is not a file; check the paths under [data]")
    number, rest = 0, False
    try:
        with COMPRESSED.get(path.suffix, Path.open)(path, "rb") as stream:
            while line := stream.readline(MAX_LINE_BYTES):
                goes_on, rest = rest, not line.endswith(b"\n")
                if rest and len(line) < MAX_LINE_BYTES:
                    rest = False  # the last line, without its end
                number += not goes_on
                if goes_on or rest:
                    skipped["too large"] += not goes_on
                elif line.strip():
                    yield f"{path} line {number}", _object(line, path, number)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise CorpusError(f"{path} cannot be read after line {number}: {error}") from error


def _object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{path} line {number} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CorpusError(
            f"{path} line {number} holds a {type(values).__name__}, not an object; "
            "the file must have one JSON object per line"
        )
    return values


def parquet_records(path: Path, keys: Sequence[str]) -> Iterator[Record]:
    """These columns of a Parquet file, row by row.

    Raises `CorpusError` on a damaged file or a missing column, `MissingExtraError` without pyarrow.
    """
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data") from error
    try:
        # Buffered: otherwise a column of a whole row group, often a whole file, is read at once.
        with parquet.ParquetFile(path, buffer_size=READ_AHEAD_BYTES, pre_buffer=False) as file:
            names = file.schema_arrow.names
            for key in keys:
                if key not in names:
                    raise _missing(f"{path} has no column", key, names)
            row = 0
            for batch in file.iter_batches(BATCH_RECORDS, columns=list(keys), use_threads=False):
                for values in batch.to_pylist():
                    row += 1
                    yield f"{path} row {row}", values
    except (OSError, arrow.ArrowException) as error:
        raise CorpusError(f"{path} is not a readable Parquet file: {error}") from error


def _missing(what: str, key: str, names: Sequence[str]) -> CorpusError:
    has = ", ".join(sorted(map(str, names))) or "nothing"
    return CorpusError(
        f"{what} {key!r} (it has: {has}); say which keys hold the text with text_key, or "
        "prompt_key and completion_key, under [data]"
    )


def record_documents(
    records: Iterator[Record],
    keys: Keys,
    skipped: Counter[str],
    *,
    languages: Sequence[str] = (),
    held_out_share: float = 0.1,
    split: Split | None = None,
) -> Iterator[Document]:
    """The usable records; `skipped` counts the others, copies aside.

    Only completions count. Records with the same prompt are in the same split, so that none is
    trained on and measured with another answer; `split`, when given, is that of all.

    Raises `CorpusError` on a record that lacks a key or holds something other than text there.
    """
    for where, values in records:
        texts = [_text(values, key, where) for key in keys.wanted]
        language = texts.pop().lower() if keys.language else ""
        if languages and language not in languages:
            skipped["other language"] += 1
            continue
        if (why := _unusable(texts)) is not None:
            skipped[why] += 1
            continue
        try:
            digest, key = digest_of(*texts), digest_of(texts[0])
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
            skipped["not UTF-8"] += 1
            continue
        counted = [len(texts) == 1 or i == 1 for i in range(len(texts))]
        yield Document(
            tuple(zip(texts, counted, strict=True)),
            language,
            digest,
            split or split_of(key, held_out_share),
            where,
            together=len(texts) == 2,
        )


def _text(values: dict[str, Any], key: str, where: str) -> str:
    """The text under a key; nothing where there is null."""
    if key not in values:
        raise _missing(f"{where} has no key", key, list(values))
    value = values[key]
    if value is not None and not isinstance(value, str):
        raise CorpusError(
            f"{where} holds a {type(value).__name__} under {key!r}, which must be text"
        )
    return value or ""


def _unusable(texts: Sequence[str]) -> str | None:
    found = [unusable(text) for text in texts]
    if len(texts) == 2 and found[0] == "empty":
        found[0] = None  # nothing asked, something answered
    return next((why for why in found if why is not None), None)
