"""Caches of prompts that were read lately: what a next one begins with is not read again.

An editor asks anew at every key, with the same file before the cursor. Knows tokens and adapters;
a cache belongs to one adapter, and only the current one's are kept; the longest unused goes first.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_agent.inference_session import Adapter, Cache, Tokens

ENTRIES = 4
MOST_BYTES = 128 * 2**20  # of all entries
LEAST_TOKENS = 16  # fewer are read faster than copied


@dataclass(frozen=True, eq=False)
class _Entry:
    tokens: Tokens
    cache: Cache


class Prefixes:
    """May be used from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._adapter: Adapter | None = None
        self._entries: list[_Entry] = []  # the one used last comes last

    def begin(self, adapter: Adapter | None) -> None:
        """Forgets all; from now on caches of this adapter are kept."""
        with self._lock:
            self._adapter = adapter
            self._entries.clear()

    def longest(self, adapter: Adapter | None, prompt: Sequence[int]) -> Cache | None:
        """The cache of the longest known beginning, short of the whole prompt; None: too short."""
        wanted = np.asarray(prompt[:-1], np.int64)  # logits come from the last token
        with self._lock:
            if adapter is not self._adapter:
                return None
            found = [(_common(entry.tokens, wanted), i) for i, entry in enumerate(self._entries)]
            size, place = max(found, default=(0, 0))
            if size < LEAST_TOKENS:
                return None
            entry = self._entries.pop(place)
            self._entries.append(entry)
        return entry.cache.first(size)

    def keep(self, adapter: Adapter | None, prompt: Sequence[int], cache: Cache) -> None:
        """Remembers a prompt's cache, unless it is too large."""
        entry = _Entry(np.asarray(prompt, np.int64), cache)
        with self._lock:
            if adapter is not self._adapter:
                return
            # One that this one goes on from tells nothing more.
            kept = [e for e in self._entries if _common(e.tokens, entry.tokens) < len(e.tokens)]
            kept = [*kept[-(ENTRIES - 1) :], entry]
            while sum(e.cache.size_bytes for e in kept) > MOST_BYTES:
                kept.pop(0)
            self._entries = kept


def _common(one: Tokens, other: Tokens) -> int:
    """Tokens that both begin with."""
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if len(differ) else size
