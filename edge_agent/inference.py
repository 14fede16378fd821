"""Code completion on the device through ONNX Runtime: a base exported once, adapters swapped live.

    engine = Engine.open(folder)                      # of `sketchfleet-agent export-base`
    engine.swap(file)                                 # of `inference_adapter`; requests go on
    for piece in engine.generate("def ", max_tokens=32):
        print(piece.text, end="")

Knows requests: tokens in, pieces of text out, on the adapter that was current when each began.
How the network runs is `inference_session`'s, how tokens become text `inference_text`'s. Needs
onnxruntime and tokenizers; no torch.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from edge_agent.inference_adapter import load_adapter
from edge_agent.inference_evaluation import HeldOut, evaluate
from edge_agent.inference_folder import (
    MODEL_FILE,
    ContextLengthError,
    ExportInfo,
    InferenceError,
    read_info,
)
from edge_agent.inference_prefixes import Prefixes
from edge_agent.inference_sampling import Sampler
from edge_agent.inference_session import Adapter, Cache, Logits, Session
from edge_agent.inference_text import Text, Writer
from edge_agent.training.rows import Rows

PROMPT_PART_TOKENS = 512

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Piece:
    """What one step of a request gave.

    text: whole characters; empty while a character or a stop string may still be under way.
    token: the id that was drawn; None where none was (cancelled before it). finish: set in the
    last piece only. "stop": the model ended the text or a stop string came (which is not part of
    the text); "length": `max_tokens` or the end of the context; "cancelled".
    """

    text: str
    token: int | None
    finish: Finish | None = None


class CancelledError(Exception):
    """A request was ended from outside."""


class Engine:
    """One loaded base. Every method may be called from several threads at once."""

    def __init__(self, info: ExportInfo, session: Session, text: Text) -> None:
        """`open` is the usual way."""
        self.info = info
        self._text = text
        self._session: Session | None = session
        self._swapping = threading.Lock()
        self._current: Adapter | None = None
        self._loaded: weakref.WeakSet[Adapter] = weakref.WeakSet()
        self._prefixes = Prefixes()

    @classmethod
    def open(cls, folder: Path, *, threads: int | None = None) -> Engine:
        """Loads a folder that `export-base` wrote, without an adapter.

        threads: that all requests share; None: the processors this process may use. Raises
        `InferenceError` on a folder that is not such an export or was damaged,
        `MissingExtraError` without onnxruntime or tokenizers.
        """
        info = read_info(folder)
        text = Text(folder, info)
        return cls(info, Session(folder / MODEL_FILE, info, threads), text)

    @property
    def adapter(self) -> str:
        """Name (stem of the file) of the adapter that the next request gets; "": the bare base."""
        current = self._current
        return "" if current is None else current.name

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of all adapters in memory: the current one and those that requests still run on."""
        with self._swapping:
            return tuple(sorted(adapter.name for adapter in self._loaded))

    def swap(self, adapter_file: Path | None) -> float:
        """Makes an adapter file (`inference_adapter`) the current one; None: none.

        Running requests finish on the adapter they began with. Returns the seconds it took.
        Raises `InferenceError` when the file is damaged or of another base: then nothing changes.
        """
        began = time.perf_counter()
        with self._swapping:
            loaded = None if adapter_file is None else load_adapter(adapter_file, self.info)
            if loaded is not None:
                self._loaded.add(loaded)
            self._current = loaded
            self._prefixes.begin(loaded)
        return time.perf_counter() - began

    def encode(
        self, prompt: str, *, suffix: str | None = None, room: int | None = None
    ) -> list[int]:
        """Token ids of a prompt as the model was trained to see it (separator first, marks set).

        suffix: text after the place to fill in. room: tokens that must still fit the context; the
        prompt then loses its beginning and the suffix its end. Raises `InferenceError` when the
        tokenizer has no marks for a suffix, `ContextLengthError` when `room` leaves nothing.
        """
        return self._text.encode(prompt, suffix, room)

    def encode_bare(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        return [self._text.bare(text) for text in texts]

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
        cancel: threading.Event | None = None,
    ) -> Iterator[Piece]:
        """Yields one piece per token, the last with `finish`; greedy at temperature 0.

        prompt: text (`encode` is applied) or token ids as `encode` gives them. top_p: drawn from
        the smallest set of tokens with that much of the probability. seed: the same request with
        the same seed gives the same tokens, whatever else runs. cancel: ends the request at the
        next step when set, from any thread; so does closing the iterator. Refuses at once, before
        the first piece: `ContextLengthError` when the prompt fills the context, `InferenceError`
        on other bad values.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        left = self.info.context_tokens - len(ids)
        if left < 1:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens, of a context of {self.info.context_tokens}; "
                "shorten it"
            )
        if not ids or not all(0 <= token < self.info.vocabulary for token in ids):
            raise InferenceError(
                f"a prompt needs at least one token, and ids below {self.info.vocabulary}"
            )
        if max_tokens < 0:
            raise InferenceError(f"{max_tokens} tokens cannot be written; ask for 0 or more")
        request = _Request(
            ids,
            min(max_tokens, left),
            frozenset(self.info.ends),
            Sampler(temperature, top_p, seed),
            self._text.writer(ids, stop),
            self._current,
            cancel or threading.Event(),
        )
        return request.pieces(self._open_session(), self._prefixes)

    def held_out(self, rows: Rows) -> HeldOut:
        """What the model with the current adapter predicts of text it was not trained on.

        The same measures as a round's own evaluation. Raises `InferenceError` when nothing of
        `rows` counts or a text in them is longer than the context.
        """
        return evaluate(self._open_session(), self.info, rows, self._current)

    def close(self) -> None:
        """Frees the model once no request runs; later requests are refused."""
        self._session = None
        self.swap(None)

    def _open_session(self) -> Session:
        if self._session is None:
            raise InferenceError("the engine is closed; open the folder again")
        return self._session


@dataclass(frozen=True)
class _Request:
    """One text that is being written, on the adapter that was current when it was asked for."""

    prompt: list[int]
    most: int  # tokens
    ends: frozenset[int]
    sampler: Sampler
    writer: Writer
    adapter: Adapter | None
    cancel: threading.Event

    def pieces(self, session: Session, prefixes: Prefixes) -> Iterator[Piece]:
        if self.most == 0:
            yield Piece("", None, "length")
            return
        try:
            logits, cache = self._read_prompt(session, prefixes)
            for count in range(1, self.most + 1):
                token = self.sampler.pick(logits)
                if token in self.ends:
                    yield Piece(self.writer.rest(), token, "stop")
                    return
                text = self.writer.write(token)
                if self.writer.stopped:
                    yield Piece(text, token, "stop")
                    return
                if count == self.most:
                    yield Piece(text + self.writer.rest(), token, "length")
                    return
                yield Piece(text, token)
                logits, cache = self._step(session, [token], cache)
        except CancelledError:
            yield Piece(self.writer.rest(), None, "cancelled")

    def _read_prompt(self, session: Session, prefixes: Prefixes) -> tuple[Logits, Cache]:
        """Logits (vocabulary,) after the prompt, and its cache; of a known prefix, from there."""
        cache = prefixes.longest(self.adapter, self.prompt) or session.empty
        logits = None
        while cache.tokens < len(self.prompt):  # in parts: one can be cancelled, and fits memory
            part = self.prompt[cache.tokens : cache.tokens + PROMPT_PART_TOKENS]
            logits, cache = self._step(session, part, cache)
        assert logits is not None  # a known prefix is shorter than the prompt
        prefixes.keep(self.adapter, self.prompt, cache)
        return logits, cache

    def _step(self, session: Session, tokens: list[int], cache: Cache) -> tuple[Logits, Cache]:
        """Logits (vocabulary,) after these tokens."""
        if self.cancel.is_set():
            raise CancelledError
        ids = np.array([tokens], np.int64)
        logits, cache = session.run(ids, cache, [len(tokens) - 1], self.adapter)
        return logits[0, 0], cache
