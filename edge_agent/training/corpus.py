"""Local source code -> training and held-out token sequences.

Knows files, languages, what must never be trained on (secrets, binaries, copies), how a file is
put in a split, and how token streams are cut into sequences. It knows nothing of models, devices
or the network, and nothing it reads leaves this process: `Corpus.summary` carries counts only.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from profiles.errors import SketchfleetError

Split = Literal["train", "held_out"]

LANGUAGE_OF_SUFFIX = {
    ".py": "python",
    ".pyi": "python-stub",
    ".c": "c",
    ".h": "c-header",
    ".hh": "c-header",
    ".hpp": "c-header",
    ".hxx": "c-header",
    ".cuh": "c-header",
    ".cc": "c++",
    ".cpp": "c++",
    ".cxx": "c++",
    ".cu": "cuda",
    ".js": "javascript",
    ".mjs": "javascript",
    ".jsx": "javascript",
    ".ts": "typescript",
    ".tsx": "typescript",
    ".java": "java",
    ".kt": "kotlin",
    ".go": "go",
    ".rs": "rust",
    ".rb": "ruby",
    ".php": "php",
    ".cs": "csharp",
    ".swift": "swift",
    ".scala": "scala",
    ".lua": "lua",
    ".pl": "perl",
    ".pm": "perl",
    ".r": "r",
    ".jl": "julia",
    ".sh": "shell",
    ".bash": "shell",
    ".sql": "sql",
    ".proto": "protobuf",
    ".cmake": "cmake",
    ".f90": "fortran",
    ".f": "fortran",
    ".s": "assembly",
    ".v": "verilog",
    ".sv": "verilog",
    ".vhd": "vhdl",
    ".html": "html",
    ".css": "css",
    ".tcl": "tcl",
}
LANGUAGE_OF_INTERPRETER = {
    "python": "python",
    "sh": "shell",
    "bash": "shell",
    "dash": "shell",
    "perl": "perl",
    "node": "javascript",
    "ruby": "ruby",
    "lua": "lua",
    "tclsh": "tcl",
}

# Names that hold credentials by convention; matched against the whole file name.
SECRET_FILE_NAME = re.compile(
    r"(?i)^(\.env(\..*)?|\.netrc|\.npmrc|\.pypirc|\.htpasswd|id_(rsa|dsa|ecdsa|ed25519)(\.pub)?"
    r"|credentials(\..*)?|secrets?\.(ya?ml|json|toml|ini|py)|.*\.(pem|key|p12|pfx|jks|keystore))$"
)
# Shapes of live credentials, after the public rule sets of gitleaks and detect-secrets.
SECRET_TEXT = re.compile(
    r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----\s+[A-Za-z0-9+/=]{40}"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\bgh[pousr]_[A-Za-z0-9]{36}\b"
    r"|\bgithub_pat_[A-Za-z0-9_]{60,}\b"
    r"|\bglpat-[A-Za-z0-9_-]{20}\b"
    r"|\bxox[abprs]-[A-Za-z0-9-]{20,}\b"
    r"|\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}\b"
    r"|\bsk_live_[A-Za-z0-9]{20,}\b"
    r"|\bhf_[A-Za-z0-9]{34}\b"
    r"|\bAIza[0-9A-Za-z_-]{35}\b"
    r"|\beyJ[A-Za-z0-9_-]{20,}\.eyJ[A-Za-z0-9_-]{20,}\.[A-Za-z0-9_-]{20,}"
)

# Folders of tools and of other people's packages: not this device's code.
NEVER_ENTERED = frozenset(
    (".git", ".hg", ".svn", ".venv", "venv", "node_modules", "__pycache__", ".tox", ".mypy_cache")
)
MAX_FILE_BYTES = 1 << 20
BINARY_SNIFF_BYTES = 8192


class CorpusError(SketchfleetError):
    """The data folders cannot be used; the message says which and what to do."""


@dataclass(frozen=True)
class SourceFile:
    """One file of code that may be trained on or evaluated against."""

    path: Path
    language: str
    text: str
    digest: str  # SHA-256 of the bytes, hex
    split: Split


@dataclass(frozen=True)
class CorpusSummary:
    """Counts of what was taken and what was left, and why. Safe to send: no names, no code."""

    train_files: int
    held_out_files: int
    bytes_of_language: dict[str, int]
    skipped: dict[str, int]

    @property
    def main_language(self) -> str:
        """The language with most bytes."""
        return max(self.bytes_of_language, key=lambda name: (self.bytes_of_language[name], name))


@dataclass(frozen=True)
class Corpus:
    """The files of one device, in a stable order (by digest, so that a folder's place is moot)."""

    files: tuple[SourceFile, ...]
    skipped: Counter[str] = field(default_factory=Counter)

    def of(self, split: Split) -> list[SourceFile]:
        """The files of one split."""
        return [f for f in self.files if f.split == split]

    @property
    def summary(self) -> CorpusSummary:
        """Counts only."""
        size: Counter[str] = Counter()
        for f in self.files:
            size[f.language] += len(f.text.encode())
        return CorpusSummary(
            len(self.of("train")), len(self.of("held_out")), dict(size), dict(self.skipped)
        )


def detect_language(path: Path, head: str) -> str | None:
    """Language of a file by suffix, then by its `#!` line; None when it is not source code."""
    if (found := LANGUAGE_OF_SUFFIX.get(path.suffix.lower())) is not None:
        return found
    if path.name in ("CMakeLists.txt", "Makefile"):
        return "cmake" if path.suffix else "make"
    if head.startswith("#!"):
        words = head.splitlines()[0][2:].split()
        if words and Path(words[0]).name == "env":
            words = words[1:]
        name = re.sub(r"[\d.]+$", "", Path(words[0]).name) if words else ""
        return LANGUAGE_OF_INTERPRETER.get(name)
    return None


def split_of(digest: str, held_out_share: float) -> Split:
    """The split of a file with this SHA-256 (hex): by content, so copies never straddle splits."""
    return "held_out" if int(digest[:13], 16) / 16**13 < held_out_share else "train"


def _expand(pattern: str, skipped: Counter[str]) -> list[Path]:
    """Files of a folder (walked), of a file name, or of a glob (`**` crosses folders)."""
    root = Path(pattern).expanduser()
    if root.is_dir():
        if not os.access(root, os.R_OK | os.X_OK):
            raise CorpusError(
                f"data folder {root} cannot be read; give the agent's user read permission"
            )
        return list(_walk(root, skipped))
    if root.is_file():
        return [root]
    if not glob.has_magic(pattern):
        raise CorpusError(f"data folder {root} does not exist; check the paths under [data]")
    found = glob.glob(str(root), recursive=True)  # noqa: PTH207 - absolute patterns
    return [p for p in map(Path, found) if p.is_file()]


def _walk(root: Path, skipped: Counter[str]) -> Iterator[Path]:
    """What lies below a folder, but not in `NEVER_ENTERED`; unreadable folders are counted."""

    def count(_: OSError) -> None:
        skipped["unreadable folder"] += 1

    for folder, below, names in os.walk(root, onerror=count):
        below[:] = [name for name in below if name not in NEVER_ENTERED]
        for name in names:
            yield Path(folder) / name


def _read(path: Path, max_file_bytes: int) -> tuple[bytes, str] | str:
    """The bytes and text of a source file, or the reason it is skipped."""
    if SECRET_FILE_NAME.match(path.name):
        return "secret"
    try:
        if not path.is_file():  # opening a pipe or a device may never return
            return "not a file"
        if path.stat().st_size > max_file_bytes:
            return "too large"
        raw = path.read_bytes()
    except OSError:
        return "unreadable"
    if b"\0" in raw[:BINARY_SNIFF_BYTES]:
        return "binary"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8"
    if SECRET_TEXT.search(text):
        return "secret"
    return "empty" if not text.strip() else (raw, text)


def scan(
    include: Iterable[str],
    *,
    exclude: Sequence[str] = (),
    languages: Sequence[str] = (),
    held_out_share: float = 0.1,
    max_files: int | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Corpus:
    """Reads every source file under `include` (folders, files or globs).

    `exclude` are `fnmatch` patterns on the whole path; `languages`, when given, keeps only those;
    `max_files` keeps a uniform and stable sample, by content like the split but independent of it.
    Binaries, secrets, exact copies, oversized and undecodable files are skipped and counted.

    Raises `CorpusError` when a folder is missing or unreadable, or nothing is left to train on.
    """
    patterns, skipped = list(include), Counter[str]()
    found = _sources(patterns, exclude, languages, held_out_share, max_file_bytes, skipped)
    files = {f.digest: f for f in found}
    sample = sorted(files, key=lambda digest: digest[::-1])[:max_files]
    kept = [files[digest] for digest in sorted(sample)]
    if not kept:
        raise _no_sources(patterns, skipped)
    return Corpus(tuple(kept), skipped)


def first_source(
    include: Iterable[str],
    *,
    exclude: Sequence[str] = (),
    languages: Sequence[str] = (),
    held_out_share: float = 0.1,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> SourceFile:
    """The first file that `scan` would take; the files after it are not read.

    Tells cheaply whether there is code at all. Raises `CorpusError` as `scan` does.
    """
    patterns, skipped = list(include), Counter[str]()
    found = _sources(patterns, exclude, languages, held_out_share, max_file_bytes, skipped)
    first = next(found, None)
    if first is None:
        raise _no_sources(patterns, skipped)
    return first


def _sources(
    patterns: Sequence[str],
    exclude: Sequence[str],
    languages: Sequence[str],
    held_out_share: float,
    max_file_bytes: int,
    skipped: Counter[str],
) -> Iterator[SourceFile]:
    """Usable files in the order of their paths, no two alike; `skipped` counts the others."""
    skip = [re.compile(fnmatch.translate(pattern)) for pattern in exclude]
    seen: set[str] = set()
    for path in sorted({p for pattern in patterns for p in _expand(pattern, skipped)}):
        if any(rule.fullmatch(str(path)) for rule in skip):
            skipped["excluded"] += 1
            continue
        known = path.suffix.lower() in LANGUAGE_OF_SUFFIX
        if path.suffix and not known and path.name != "CMakeLists.txt":
            skipped["not source code"] += 1
            continue
        got = _read(path, max_file_bytes)
        if isinstance(got, str):
            skipped[got] += 1
            continue
        raw, text = got
        language = detect_language(path, text[:200])
        if language is None or (languages and language not in languages):
            skipped["not source code" if language is None else "other language"] += 1
            continue
        digest = hashlib.sha256(raw).hexdigest()
        if digest in seen:
            skipped["copy"] += 1
            continue
        seen.add(digest)
        yield SourceFile(path, language, text, digest, split_of(digest, held_out_share))


def _no_sources(patterns: Sequence[str], skipped: Counter[str]) -> CorpusError:
    why = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items())) or "no files"
    return CorpusError(
        f"no source files under {', '.join(patterns)} ({why}); "
        "point [data] include at folders of source code"
    )


def pack(
    documents: Iterable[Sequence[int]], separator_id: int, sequence_tokens: int
) -> NDArray[np.int64]:
    """Joins documents with a separator and cuts the stream: (sequences, sequence_tokens) int64.

    The tail shorter than a sequence is dropped.
    """
    stream: list[int] = []
    for document in documents:
        stream.append(separator_id)
        stream.extend(document)
    whole = len(stream) // sequence_tokens
    flat = np.asarray(stream[: whole * sequence_tokens], dtype=np.int64)
    return flat.reshape(whole, sequence_tokens)


def tokenise(
    files: Sequence[SourceFile],
    encode: Callable[[list[str]], list[list[int]]],
    separator_id: int,
    sequence_tokens: int,
    max_sequences: int | None = None,
) -> NDArray[np.int64]:
    """Packed sequences of these files: (sequences, sequence_tokens) int64.

    `encode` turns texts into token ids. Stops reading once `max_sequences` are full.
    """
    documents: list[list[int]] = []
    wanted = None if max_sequences is None else max_sequences * sequence_tokens
    total = 0
    for start in range(0, len(files), 64):
        for ids in encode([f.text for f in files[start : start + 64]]):
            documents.append(ids)
            total += len(ids) + 1
        if wanted is not None and total >= wanted:
            break
    return pack(documents, separator_id, sequence_tokens)[:max_sequences]
