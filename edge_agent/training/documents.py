"""What is trained on and measured: texts, what of them counts, and the split each is in.

Knows what must never be taken (secrets, binaries, copies), how a text finds its split, and how a
sample is kept within bounds while a large source streams by. It knows no files, formats or
tokens: connectors bring documents, `row_packing` turns them into rows.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from profiles.errors import SketchfleetError

Split = Literal["train", "held_out"]
MAX_DOCUMENT_BYTES = 1 << 20
BINARY_SNIFF_CHARACTERS = 8192

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


class CorpusError(SketchfleetError):
    """The local data cannot be used; the message says which and what to do."""


@dataclass(frozen=True)
class Document:
    """One text that may be trained on or evaluated against."""

    parts: tuple[tuple[str, bool], ...]  # in order; whether predicting this part counts
    language: str  # "" when unknown
    digest: str  # SHA-256, hex: of the text, or of prompt and completion
    split: Split
    origin: str  # where it came from; for local messages only, never sent
    together: bool = False  # a prompt with its completion: is not cut apart
    label: str | None = None  # of a text or a pair of texts to be classified

    @property
    def text(self) -> str:
        """All parts."""
        return "".join(text for text, _ in self.parts)


@dataclass(frozen=True)
class CorpusSummary:
    """Counts of what was taken and what was left, and why. Safe to send: no names, no code."""

    train_files: int
    held_out_files: int
    bytes_of_language: dict[str, int]
    skipped: dict[str, int]

    @property
    def main_language(self) -> str:
        """The language with most bytes; "" when no language is known."""
        known = {name: size for name, size in self.bytes_of_language.items() if name}
        return max(known, key=lambda name: (known[name], name), default="")


@dataclass(frozen=True)
class Corpus:
    """The documents of one device, in a stable order (by digest, so that their place is moot)."""

    files: tuple[Document, ...]
    skipped: Counter[str] = field(default_factory=Counter)

    def of(self, split: Split) -> list[Document]:
        """The documents of one split."""
        return [f for f in self.files if f.split == split]

    @property
    def summary(self) -> CorpusSummary:
        """Counts only."""
        size: Counter[str] = Counter()
        for f in self.files:
            size[f.language] += _bytes(f)
        return CorpusSummary(
            len(self.of("train")), len(self.of("held_out")), dict(size), dict(self.skipped)
        )


def split_of(digest: str, held_out_share: float) -> Split:
    """The split of a text with this SHA-256 (hex): by content, so copies never straddle splits."""
    return "held_out" if int(digest[:13], 16) / 16**13 < held_out_share else "train"


def digest_of(*texts: str) -> str:
    """SHA-256 (hex) of one text, or of several told apart. Raises `UnicodeEncodeError`."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def unusable(text: str, max_bytes: int = MAX_DOCUMENT_BYTES) -> str | None:
    """Why a text is not taken, in a word or two that can be counted; None when it is."""
    if not text.strip():
        return "empty"
    if len(text) > max_bytes:
        return "too large"
    if "\0" in text[:BINARY_SNIFF_CHARACTERS]:
        return "binary"
    return "secret" if SECRET_TEXT.search(text) else None


def gather(
    found: Iterable[Document],
    skipped: Counter[str],
    max_files: int | None = None,
    max_bytes: int | None = None,
) -> Corpus:
    """No two alike, at most `max_files` of at most `max_bytes` in all, in the order of digests.

    What is kept is a uniform sample by content, like the split but independent of it, and the same
    in whatever order documents come: those with the smallest keys, up to the first that does not
    fit. Memory is bounded by the limits, not by the source. `skipped` counts the others. Of a text
    that a source names in both splits the held-out one stays.
    """
    kept: dict[str, Document] = {}
    largest: list[tuple[int, str]] = []  # a heap: the greatest key first
    size, bar = 0, 16**64
    for document in found:
        key = int(document.digest[::-1], 16)
        if document.digest in kept:
            skipped["copy"] += 1
            if document.split == "held_out":
                kept[document.digest] = document
            continue
        if key >= bar:
            skipped["beyond the limit"] += 1
            continue
        kept[document.digest] = document
        heapq.heappush(largest, (-key, document.digest))
        size += _bytes(document)
        while (max_files is not None and len(kept) > max_files) or (
            max_bytes is not None and size > max_bytes
        ):
            negative, digest = heapq.heappop(largest)
            bar = -negative
            size -= _bytes(kept.pop(digest))
            skipped["beyond the limit"] += 1
    return Corpus(tuple(kept[digest] for digest in sorted(kept)), skipped)


def _bytes(document: Document) -> int:
    return sum(len(text.encode()) for text, _ in document.parts)
