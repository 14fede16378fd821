"""Tokens <-> text: prompts as the model was trained to see them, pieces of whole characters.

Knows the tokenizer, where a text is over, and which end of a prompt may be cut. No networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_agent.inference_folder import (
    TOKENIZER_FILE,
    ContextLengthError,
    ExportInfo,
    InferenceError,
)
from profiles.errors import MissingExtraError

CONTEXT_TOKENS = 8  # a character's tokens, and a word's: some tokenizers join these
LEAST_PREFIX_SHARE = 0.5  # of the room: what stands before the cursor tells more


class Text:
    """The tokenizer of an export."""

    def __init__(self, folder: Path, info: ExportInfo) -> None:
        """Raises `InferenceError`, `MissingExtraError`."""
        try:
            import tokenizers
        except ImportError as error:
            raise MissingExtraError("tokenizers", "serve") from error
        try:
            self.tokenizer: Any = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        except Exception as error:  # tokenizers raises bare exceptions
            raise InferenceError(
                f"{folder / TOKENIZER_FILE} cannot be read ({error}); export the base anew"
            ) from error
        self.tokenizer.no_truncation()  # which the file may ask for
        self.tokenizer.no_padding()
        self._stream: Any = tokenizers.decoders.DecodeStream
        self._info = info

    def encode(self, prompt: str, suffix: str | None, room: int | None) -> list[int]:
        """As `Engine.encode`."""
        info = self._info
        before = self.bare(prompt)
        parts: tuple[list[int], list[int], list[int], list[int]]
        if suffix is None:
            parts = [info.separator], before, [], []
        else:
            marks = info.marks
            if marks is None:
                raise InferenceError(
                    f"the tokenizer of {info.base} has no marks to fill in the middle; ask without "
                    "a suffix"
                )
            after = self.bare(suffix)
            parts = [info.separator, marks.prefix], before, [marks.suffix], [*after, marks.middle]
        if room is None:
            return [token for part in parts for token in part]
        most = info.context_tokens - room
        fixed = len(parts[0]) + len(parts[2]) + (suffix is not None)
        if most <= fixed:
            raise ContextLengthError(
                f"{room} tokens leave nothing of a context of {info.context_tokens} for the "
                "prompt; ask for fewer"
            )
        return self._fitted(parts, most - fixed)

    def _fitted(
        self, parts: tuple[list[int], list[int], list[int], list[int]], most: int
    ) -> list[int]:
        """Prefix and suffix of at most `most` tokens: one loses its beginning, one its end."""
        opening, before, between, closing = parts
        after, mark = closing[:-1], closing[-1:]
        kept = min(len(before), max(most - len(after), int(most * LEAST_PREFIX_SHARE)))
        before, after = before[len(before) - kept :], after[: most - kept]
        return [*opening, *before, *between, *after, *mark]

    def bare(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def writer(self, prompt: Sequence[int], stops: Sequence[str]) -> Writer:
        """What turns the tokens after a prompt into pieces of text."""
        before = list(prompt[-CONTEXT_TOKENS:])
        return Writer(self.tokenizer, self._stream(ids=before, skip_special_tokens=True), stops)


class Writer:
    """Whole characters of one text, up to the first of its stop strings.

    A token may end within a character, and a piece within a stop string; either is held back until
    it is known what it becomes.
    """

    def __init__(self, tokenizer: Any, stream: Any, stops: Sequence[str]) -> None:
        self._tokenizer, self._stream = tokenizer, stream
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def write(self, token: int) -> str:
        """The text that this token makes certain; sets `stopped` when a stop string came."""
        self._held += self._stream.step(self._tokenizer, token) or ""
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        cut = len(self._held) - self._pending()
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def rest(self) -> str:
        """What was held back, once nothing more comes. A character left half is dropped."""
        text, self._held = self._held, ""
        return text

    def _pending(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        held = self._held
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(held)), 0, -1):
            if any(stop.startswith(held[-size:]) for stop in self._stops):
                return size
        return 0
