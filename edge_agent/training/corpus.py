"""Folders, files and globs of source code -> documents.

Knows files, languages by suffix and first line, and what is not opened at all. It knows nothing of
models, devices or the network, and nothing it reads leaves this process.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from edge_agent.training.documents import (
    MAX_DOCUMENT_BYTES,
    Corpus,
    CorpusError,
    Document,
    gather,
    split_of,
    unusable,
)

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

# Folders of tools and of other people's packages: not this device's code.
NEVER_ENTERED = frozenset(
    (".git", ".hg", ".svn", ".venv", "venv", "node_modules", "__pycache__", ".tox", ".mypy_cache")
)
BINARY_SNIFF_BYTES = 8192


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
    return unusable(text, max_file_bytes) or (raw, text)


def scan(
    include: Iterable[str],
    *,
    exclude: Sequence[str] = (),
    languages: Sequence[str] = (),
    held_out_share: float = 0.1,
    max_files: int | None = None,
    max_file_bytes: int = MAX_DOCUMENT_BYTES,
) -> Corpus:
    """Reads every source file under `include` (folders, files or globs).

    `exclude` are `fnmatch` patterns on the whole path; `languages`, when given, keeps only those;
    `max_files` keeps a uniform and stable sample, by content like the split but independent of it.
    Binaries, secrets, exact copies, oversized and undecodable files are skipped and counted.

    Raises `CorpusError` when a folder is missing or unreadable, or nothing is left to train on.
    """
    patterns, skipped = list(include), Counter[str]()
    found = source_files(
        patterns,
        skipped,
        exclude=exclude,
        languages=languages,
        held_out_share=held_out_share,
        max_file_bytes=max_file_bytes,
    )
    corpus = gather(found, skipped, max_files)
    if not corpus.files:
        raise CorpusError(
            f"no source files under {', '.join(patterns)} ({reasons(skipped)}); "
            "point [data] include at folders of source code"
        )
    return corpus


def source_files(
    patterns: Sequence[str],
    skipped: Counter[str],
    *,
    exclude: Sequence[str] = (),
    languages: Sequence[str] = (),
    held_out_share: float = 0.1,
    max_file_bytes: int = MAX_DOCUMENT_BYTES,
) -> Iterator[Document]:
    """Usable files in the order of their paths; `skipped` counts the others, copies aside.

    Raises `CorpusError` when a folder is missing or unreadable.
    """
    skip = [re.compile(fnmatch.translate(pattern)) for pattern in exclude]
    for path in sorted({p for pattern in patterns for p in _expand(pattern, skipped)}):
        if any(rule.fullmatch(str(path)) for rule in skip):
            skipped["excluded"] += 1
            continue
        if not may_be_code(path):
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
        split = split_of(digest, held_out_share)
        yield Document(((text, True),), language, digest, split, str(path))


def may_be_code(path: Path) -> bool:
    """Whether the name alone leaves that open."""
    known = path.suffix.lower() in LANGUAGE_OF_SUFFIX
    return known or not path.suffix or path.name == "CMakeLists.txt"


def reasons(skipped: Counter[str]) -> str:
    """What was left out and why, for a message."""
    return ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items())) or "no files"
