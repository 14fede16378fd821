"""Requests in turn: so many are answered at once, so many wait, and who leaves is not worked for.

A completion is written on a thread, piece by piece, and read by the event loop. Knows the engine
and which adapter a text was begun on; it knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from edge_agent.inference import Engine, Piece
from edge_agent.inference_folder import ContextLengthError, InferenceError
from edge_agent.serving_requests import Completion, RequestError


@dataclass(frozen=True)
class Begun:
    """A completion that is about to be written. adapter: the name of what it is written with."""

    index: int
    prompt_tokens: int
    counts_prompt: bool  # the first of those that share a prompt
    echo: str
    adapter: str
    pieces: Iterator[Piece]


class Desk:
    """Answers at most `at_once` requests at a time; `waiting` more wait in order."""

    def __init__(self, engine: Engine, at_once: int, waiting: int) -> None:
        self.engine = engine
        self.answering = self.queued = 0
        self._most_queued = waiting
        self._places = asyncio.Semaphore(at_once)
        self._cancels: set[threading.Event] = set()
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="completion")

    @contextlib.asynccontextmanager
    async def place(self, cancel: threading.Event) -> AsyncIterator[None]:
        """A request's turn, for as long as the block lasts; `cancel` ends its work.

        Raises `RequestError` when too many wait.
        """
        if self._places.locked() and self.queued >= self._most_queued:
            raise RequestError(
                f"{self.answering} requests are being answered and {self.queued} wait; try again "
                "in a moment",
                status=429, kind="rate_limit_error", code="rate_limit_exceeded",
            )  # fmt: skip
        self.queued += 1
        try:
            await self._places.acquire()
        finally:
            self.queued -= 1
        self.answering += 1
        self._cancels.add(cancel)
        try:
            yield
        finally:
            self._cancels.discard(cancel)
            self.answering -= 1
            self._places.release()

    async def begin(self, wanted: Completion, cancel: threading.Event) -> list[Begun]:
        """All completions of a request, on one adapter. Raises `RequestError`."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, self._begin, wanted, cancel)
        except ContextLengthError as error:
            raise RequestError(
                str(error), param="prompt", code="context_length_exceeded"
            ) from error
        except InferenceError as error:
            raise RequestError(str(error)) from error

    def _begin(self, wanted: Completion, cancel: threading.Event) -> list[Begun]:
        engine = self.engine
        prompts: list[tuple[Sequence[int], str]] = []
        for prompt in wanted.prompts:
            if isinstance(prompt, str):
                room = min(wanted.max_tokens, engine.info.context_tokens // 2)
                # With a suffix an editor sends whole files: what is far from the cursor may go.
                ids = engine.encode(
                    prompt, suffix=wanted.suffix, room=None if wanted.suffix is None else room
                )
                prompts.append((ids, prompt if wanted.echo else ""))
            else:
                prompts.append((prompt, ""))
        while True:
            adapter = engine.adapter
            begun = [
                Begun(
                    wanted.n * at + copy, len(ids), copy == 0, echo, adapter,
                    engine.generate(
                        ids, max_tokens=wanted.max_tokens, temperature=wanted.temperature,
                        top_p=wanted.top_p, stop=wanted.stop, cancel=cancel,
                        seed=None if wanted.seed is None else wanted.seed + copy,
                    ),
                )
                for at, (ids, echo) in enumerate(prompts)
                for copy in range(wanted.n)
            ]  # fmt: skip
            if engine.adapter == adapter:  # else a round's adapter came in between
                return begun

    async def write(self, begun: Begun, cancel: threading.Event) -> AsyncGenerator[Piece, None]:
        """The pieces of one completion as they come. Ends its thread when it is closed."""
        loop = asyncio.get_running_loop()
        found: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

        def tell(item: Piece | Exception | None) -> None:
            loop.call_soon_threadsafe(found.put_nowait, item)

        def work() -> None:
            try:
                for piece in begun.pieces:
                    tell(piece)
            except Exception as error:  # noqa: BLE001 - raised where the pieces are awaited
                tell(error)
            tell(None)

        writing = loop.run_in_executor(self._threads, work)
        item: Piece | Exception | None = None
        try:
            while (item := await found.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            if item is not None:  # nobody reads on
                cancel.set()
            await asyncio.shield(writing)

    def close(self) -> None:
        """Ends the threads, and what still runs on them."""
        for cancel in tuple(self._cancels):
            cancel.set()
        self._threads.shutdown(wait=True, cancel_futures=True)
