"""Writes of many callers as one transaction: one wait for the disk for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from coordinator.store.records import Records

T = TypeVar("T")


class GroupCommit:
    """Whoever comes while a transaction is synced shares the next one. Use from one event loop."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._waiting: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []
        self._flushing: asyncio.Task[None] | None = None

    async def write(self, call: Callable[[], T]) -> T:
        """What a call of a method of the records returns, or raises, once it is on disk."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((call, future))
        if self._flushing is None:
            self._flushing = asyncio.ensure_future(self._flush())
        return await future

    async def _flush(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                outcomes = await asyncio.to_thread(
                    self._records.together, [call for call, _ in batch]
                )
                for (_, future), outcome in zip(batch, outcomes, strict=True):
                    if future.done():  # nobody waits any more
                        continue
                    if isinstance(outcome, Exception):
                        future.set_exception(outcome)
                    else:
                        future.set_result(outcome)
        finally:
            self._flushing = None
