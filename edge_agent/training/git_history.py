"""A git repository with a cut-off -> what was there before it, and what changed after it.

Trains on the tree as of the cut-off, or on those of its files that changed since some earlier
point; measures on what changed between the cut-off and the head: of a changed file the new lines
count, the lines that were there before are context, so nothing that is measured was trained on.
Reads with git's plumbing only and from any kind of repository, bare ones too: no hook, filter,
external diff or pager of the repository runs, nothing is fetched and nothing is written.
"""

from __future__ import annotations

import difflib
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from edge_agent.training.corpus import SECRET_FILE_NAME, detect_language, may_be_code
from edge_agent.training.documents import (
    MAX_DOCUMENT_BYTES,
    CorpusError,
    Document,
    digest_of,
    unusable,
)
from profiles.compat import UTC, moment

DATE = re.compile(r"\d{4}-\d{2}-\d{2}.*")
ID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# What a repository's own configuration must not choose for us.
SAFE = ("--no-pager", "--no-replace-objects", "--literal-pathspecs", "-c", "core.fsmonitor=false",
        "-c", "core.hooksPath=/dev/null", "-c", "diff.external=", "-c", "protocol.allow=never",
        "-c", "diff.orderFile=/dev/null", "-c", "diff.ignoreSubmodules=all")  # fmt: skip
COMMAND_S = 120.0
LFS_POINTER = "version https://git-lfs"


@dataclass(frozen=True)
class GitRange:
    """Which part of a repository's history is trained on, and which measured."""

    repository: str
    cutoff: str  # a commit, tag or branch, or an ISO date: the last commit before it
    since: str = ""  # likewise; only files that changed between it and the cut-off are trained on
    head: str = "HEAD"


@dataclass(frozen=True)
class _Blob:
    path: str
    id: str
    before: str = ""  # the blob that this one replaced; "" for a new file


def git_documents(
    where: GitRange,
    skipped: Counter[str],
    *,
    languages: Sequence[str] = (),
    max_file_bytes: int = MAX_DOCUMENT_BYTES,
) -> Iterator[Document]:
    """Training documents, then held-out ones; `skipped` counts what is left out, copies aside.

    Raises `CorpusError` when the repository, a commit or a date cannot be used.
    """
    git = _Git(where.repository)
    head = git.commit(where.head, "git_head")
    cutoff = git.point(where.cutoff, "git_cutoff", head)
    if not git.is_ancestor(cutoff, head):
        raise CorpusError(
            f"git_cutoff {where.cutoff!r} is not in the history of {where.head!r} in "
            f"{where.repository}; give a commit or a date of that branch under [data]"
        )
    tree = git.tree(cutoff)
    trained = tree
    if where.since:
        since = git.point(where.since, "git_since", cutoff)
        changed = {blob.path for blob in git.changed(since, cutoff)}
        trained = [blob for blob in tree if blob.path in changed]
    known = {blob.id for blob in tree}
    later = [blob for blob in git.changed(cutoff, head) if blob.id not in known]
    with git.contents(max_file_bytes) as read:
        for blob in trained:
            found = _text_of(blob, read(blob.id), skipped, languages, max_file_bytes)
            if found is not None:
                text, language = found
                parts = ((text, True),)
                origin = f"{cutoff[:12]}:{blob.path}"
                yield Document(parts, language, digest_of(text), "train", origin)
        for blob in later:
            found = _text_of(blob, read(blob.id), skipped, languages, max_file_bytes)
            if found is None:
                continue
            text, language = found
            old = read(blob.before) if blob.before else b""
            before = "" if old is None else old.decode("utf-8", "replace")
            changes = changed_parts(before, text)
            if not any(new and part.strip() for part, new in changes):
                skipped["nothing new"] += 1
                continue
            origin = f"{head[:12]}:{blob.path}"
            yield Document(changes, language, digest_of(text), "held_out", origin)


def changed_parts(before: str, after: str) -> tuple[tuple[str, bool], ...]:
    """`after`, in runs of whole lines; True for those that stand nowhere in `before`.

    A line that only moved is not new.
    """
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    fresh = [True] * len(new)
    for _, start, size in matcher.get_matching_blocks():
        fresh[start : start + size] = [False] * size
    stood = set(old)
    parts: list[tuple[str, bool]] = []
    for line, is_fresh in zip(new, fresh, strict=True):
        counts = is_fresh and line not in stood
        if parts and parts[-1][1] == counts:
            parts[-1] = (parts[-1][0] + line, counts)
        else:
            parts.append((line, counts))
    return tuple(parts)


def _text_of(
    blob: _Blob,
    raw: bytes | None,
    skipped: Counter[str],
    languages: Sequence[str],
    max_file_bytes: int,
) -> tuple[str, str] | None:
    """Text and language of a blob; None, counted, when it is not taken."""
    path = PurePosixPath(blob.path)
    if SECRET_FILE_NAME.match(path.name):
        skipped["secret"] += 1
        return None
    if raw is None:
        skipped["too large"] += 1
        return None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        skipped["binary" if b"\0" in raw[:8192] else "not UTF-8"] += 1
        return None
    language = detect_language(Path(blob.path), text[:200])
    if text.startswith(LFS_POINTER):
        why: str | None = "LFS pointer"
    elif language is None:
        why = "not source code"
    elif languages and language not in languages:
        why = "other language"
    else:
        why = unusable(text, max_file_bytes)
    if why is not None:
        skipped[why] += 1
        return None
    return text, language or ""


class _Git:
    """One repository, read-only."""

    def __init__(self, repository: str) -> None:
        self.folder = Path(repository).expanduser()
        if not self.folder.is_dir():
            raise CorpusError(f"git repository {self.folder} does not exist; check [data] git")
        self._run("rev-parse", "--git-dir")

    def commit(self, name: str, key: str) -> str:
        """The id of a commit by any name of it."""
        asked = ("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        found = self._run(*asked, may_fail=True).decode().strip()
        if not ID.fullmatch(found):
            raise CorpusError(
                f"{name!r} names no commit in {self.folder}; correct {key} under [data] (a date "
                "is written 2026-03-31)"
            )
        return found

    def point(self, name: str, key: str, head: str) -> str:
        """A commit by name, or the last on the first-parent line of `head` before a date."""
        if not DATE.fullmatch(name):
            return self.commit(name, key)
        try:
            when = moment(name)
        except ValueError as error:
            raise CorpusError(
                f"{key} {name!r} is not a date; write 2026-03-31 or 2026-03-31T12:00+00:00"
            ) from error
        when = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
        before = f"--before={int(when.timestamp()) - 1}"  # git takes the second itself as before
        found = self._run("rev-list", "-1", "--first-parent", before, head).decode().strip()
        if not found:
            raise CorpusError(
                f"{self.folder} has no commit before {key} {name!r}; give a later date, or fetch "
                "the history if the clone is shallow"
            )
        return found

    def is_ancestor(self, one: str, other: str) -> bool:
        """Whether a commit is in the history of another."""
        return self._run("rev-list", "-1", f"{one}", f"^{other}") == b""

    def tree(self, commit: str) -> list[_Blob]:
        """Regular files of a commit, those that may be code, by path."""
        listed = self._run("ls-tree", "-r", "-z", "--full-tree", commit)
        found = []
        for entry in filter(None, listed.split(b"\0")):
            facts, _, path = entry.partition(b"\t")
            mode, kind, blob = facts.split()[:3]
            if kind == b"blob" and mode != b"120000":  # no links, no submodules
                found.append(_Blob(os.fsdecode(path), blob.decode()))
        return _code(found)

    def changed(self, one: str, other: str) -> list[_Blob]:
        """Files that are new or different in `other`, those that may be code, by path."""
        how = ("-r", "-z", "--raw", "-M", "--no-ext-diff", "--no-textconv", "--no-relative")
        told = self._run("diff-tree", *how, "--full-index", "--diff-filter=AMR", one, other)
        words = iter(told.split(b"\0"))
        found = []
        for facts in words:
            if not facts:
                break
            _, mode, old, new, status = facts.decode().lstrip(":").split()
            path = next(words)
            if status.startswith("R"):
                path = next(words)  # after its old name
            if mode in ("100644", "100755"):
                before = "" if status == "A" else old
                found.append(_Blob(os.fsdecode(path), new, before))
        return _code(found)

    @contextmanager
    def contents(self, max_bytes: int) -> Iterator[_Reader]:
        """A function from blob id to bytes, served by one process."""
        with subprocess.Popen(  # noqa: S603 - git, by name, with fixed flags
            [*self._command(), "cat-file", "--batch"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            try:
                yield _Reader(process.stdin, process.stdout, max_bytes)
            finally:
                process.kill()

    def _command(self) -> list[str]:
        return ["git", *SAFE, "-C", str(self.folder)]

    def _run(self, *words: str, may_fail: bool = False) -> bytes:
        try:
            done = subprocess.run(  # noqa: S603 - git, by name, with fixed flags
                [*self._command(), *words],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env=_environment(),
                timeout=COMMAND_S,
                check=False,
            )
        except FileNotFoundError as error:
            raise CorpusError("[data] git needs the git command; install git") from error
        except subprocess.TimeoutExpired as error:
            raise CorpusError(
                f"git {words[0]} in {self.folder} took over {COMMAND_S:.0f} s; is the disk there?"
            ) from error
        if done.returncode and not may_fail:
            raise CorpusError(self._explain(done.stderr.decode(errors="replace")))
        return done.stdout

    def _explain(self, said: str) -> str:
        if "dubious ownership" in said:
            return (
                f"{self.folder} belongs to another user, and git does not read such repositories; "
                "run the agent as its owner, or, if you trust it, run as the agent's user: git "
                f"config --global --add safe.directory {self.folder.resolve()}"
            )
        if "not a git repository" in said:
            return f"{self.folder} is not a git repository; check [data] git"
        first = next((line for line in said.splitlines() if line.strip()), "no reason given")
        return f"git cannot read {self.folder}: {first.removeprefix('fatal: ')}"


class _Reader:
    """`git cat-file --batch`: one question, one answer."""

    def __init__(self, ask: IO[bytes], answers: IO[bytes], max_bytes: int) -> None:
        self._ask, self._answers, self._max_bytes = ask, answers, max_bytes

    def __call__(self, blob: str) -> bytes | None:
        """The bytes of a blob; None when they are too many or not here (a partial clone)."""
        self._ask.write(blob.encode() + b"\n")
        self._ask.flush()
        head = self._answers.readline().split()
        if len(head) != 3:
            if head[1:] == [b"missing"]:
                return None
            raise CorpusError("git cat-file broke off; is the repository damaged? run git fsck")
        left = size = int(head[2])
        if size <= self._max_bytes:
            content = self._answers.read(size)
            self._answers.read(1)
            return content
        left += 1
        while left > 0:
            left -= len(self._answers.read(min(left, 1 << 20))) or left
        return None


def _code(blobs: list[_Blob]) -> list[_Blob]:
    return sorted((b for b in blobs if may_be_code(Path(b.path))), key=lambda b: b.path)


def _environment() -> dict[str, str]:
    """Of this process, less what would steer git; it asks, fetches and locks nothing."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return plain | {
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_OPTIONAL_LOCKS": "0",
        "LC_ALL": "C",
    }
