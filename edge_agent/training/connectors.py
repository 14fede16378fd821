"""The owner's choice of local data -> documents: one door to every connector.

Knows which connector reads what the owner named, and that none is guessed. It knows no tokens and
imports no torch: the agent asks it at start whether there is data at all.
"""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge_agent.training.corpus import reasons, source_files
from edge_agent.training.dataset_files import dataset_files
from edge_agent.training.documents import Corpus, CorpusError, Document, Split, gather
from edge_agent.training.git_history import GitRange, git_documents
from edge_agent.training.labelled import Labelled, labelled_documents
from edge_agent.training.problem_files import read_problems
from edge_agent.training.records import Keys, jsonl_records, parquet_records, record_documents


@dataclass(frozen=True)
class Problems:
    """Programming problems to be solved and tested here, and what running an answer may use."""

    path: str  # a file in HumanEval's or MBPP's format
    samples: int = 1  # programs per problem; one is the most likely, several are drawn
    max_problems: int | None = None
    temperature: float = 0.8
    max_new_tokens: int = 256
    wall_s: float = 10.0
    memory_mb: int = 512


@dataclass(frozen=True)
class DataSelection:
    """Which local data count as this device's code. Paths are absolute."""

    include: tuple[str, ...] = ()  # folders, files and globs of source code
    exclude: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    max_files: int | None = None
    max_bytes: int | None = None
    jsonl: tuple[str, ...] = ()  # files and globs
    parquet: tuple[str, ...] = ()
    dataset: str = ""  # "owner/name" or a folder
    dataset_revision: str = ""
    dataset_folder: str = ""
    dataset_split: str = "train"
    dataset_held_out: str = ""  # the split that is held out; "": a share of dataset_split
    keys: Keys = field(default_factory=Keys)
    git: GitRange | None = None
    problems: Problems | None = None
    labelled: Labelled | None = None

    @property
    def named(self) -> str:
        """What the owner pointed at, for a message."""
        git = () if self.git is None else (self.git.repository,)
        dataset = (self.dataset,) if self.dataset else ()
        labelled = () if self.labelled is None else self.labelled.train + self.labelled.held_out
        return ", ".join((*self.include, *self.jsonl, *self.parquet, *dataset, *git, *labelled))


def collect(data: DataSelection, held_out_share: float) -> Corpus:
    """Everything that the owner chose, within their limits.

    Raises `CorpusError` when something named cannot be read or nothing is left,
    `MissingExtraError` when a format needs a package that is not installed.
    """
    skipped = Counter[str]()
    found = documents(data, held_out_share, skipped)
    corpus = gather(found, skipped, data.max_files, data.max_bytes)
    if not corpus.files:
        raise _nothing(data, skipped)
    return corpus


def require_usable(data: DataSelection) -> None:
    """Looks at the first document and the first problem, so that mistakes are told at once.

    Fetches a dataset that is not here yet. Raises as `collect` does.
    """
    first_document(data)
    if data.dataset and data.dataset_held_out:
        _dataset(data, data.dataset_held_out)
    if data.problems is not None:
        next(read_problems(Path(data.problems.path)), None)


def first_document(data: DataSelection, held_out_share: float = 0.1) -> Document:
    """The first that `collect` would take; those after it are not read.

    Raises as `collect` does.
    """
    skipped = Counter[str]()
    first = next(documents(data, held_out_share, skipped), None)
    if first is None:
        raise _nothing(data, skipped)
    return first


def documents(
    data: DataSelection, held_out_share: float, skipped: Counter[str]
) -> Iterator[Document]:
    """Usable documents of every connector that is asked for, one after the other."""
    if data.include:
        yield from source_files(
            data.include,
            skipped,
            exclude=data.exclude,
            languages=data.languages,
            held_out_share=held_out_share,
        )
    for path in _files(data.jsonl, "jsonl"):
        yield from _records(path, False, data, held_out_share, skipped)
    for path in _files(data.parquet, "parquet"):
        yield from _records(path, True, data, held_out_share, skipped)
    if data.dataset:
        apart = data.dataset_held_out
        splits: list[tuple[str, Split | None]] = [(data.dataset_split, "train" if apart else None)]
        if apart:
            splits.append((apart, "held_out"))
        for name, split in splits:
            for path in _dataset(data, name):
                parquet = path.suffix == ".parquet"
                yield from _records(path, parquet, data, held_out_share, skipped, split)
    if data.labelled is not None:
        yield from _labelled(data.labelled, held_out_share, skipped)
    if data.git is not None:
        yield from git_documents(data.git, skipped, languages=data.languages)


def _labelled(data: Labelled, held_out_share: float, skipped: Counter[str]) -> Iterator[Document]:
    apart: Split | None = "train" if data.held_out else None
    chosen = [(path, apart) for path in _files(data.train, "labelled")]
    chosen += [(path, "held_out") for path in _files(data.held_out, "labelled_held_out")]
    for path, split in chosen:
        yield from labelled_documents(
            path, data.columns, skipped, held_out_share=held_out_share, split=split
        )


def _records(
    path: Path,
    parquet: bool,
    data: DataSelection,
    held_out_share: float,
    skipped: Counter[str],
    split: Split | None = None,
) -> Iterator[Document]:
    keys = data.keys
    records = parquet_records(path, keys.wanted) if parquet else jsonl_records(path, skipped)
    return record_documents(
        records,
        keys,
        skipped,
        languages=data.languages,
        held_out_share=held_out_share,
        split=split,
    )


def _dataset(data: DataSelection, split: str) -> list[Path]:
    return dataset_files(data.dataset, data.dataset_revision, data.dataset_folder, split)


def _files(patterns: Sequence[str], key: str) -> list[Path]:
    """Files by name or glob, in the order of their paths, each once."""
    found: set[Path] = set()
    for pattern in patterns:
        if not glob.has_magic(pattern):
            found.add(Path(pattern))
            if not Path(pattern).exists():
                raise CorpusError(f"{pattern} does not exist; check [data] {key}")
            continue
        matched = glob.glob(pattern, recursive=True)  # noqa: PTH207 - absolute patterns
        if not matched:
            raise CorpusError(f"{pattern} matches no file; check [data] {key}")
        found.update(map(Path, matched))
    return sorted(found)


def _nothing(data: DataSelection, skipped: Counter[str]) -> CorpusError:
    return CorpusError(
        f"no usable code under {data.named} ({reasons(skipped)}); point [data] at source code"
    )
