"""What Python 3.11 brought and the project uses, for Python 3.10 (JetPack 6) as well.

Only what is used is here. `Self` comes from typing_extensions.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import hashlib
import sys
from collections.abc import AsyncIterator, Awaitable
from datetime import datetime, timezone
from typing import TYPE_CHECKING, BinaryIO, TypeVar

__all__ = [
    "UTC", "StrEnum", "file_digest", "moment", "timeout", "tomllib", "uncancel",
    "wait_for",
]  # fmt: skip

if TYPE_CHECKING:
    from hashlib import _Hash

if sys.version_info >= (3, 11):
    import tomllib
    from asyncio import timeout
    from enum import StrEnum
else:
    import async_timeout
    import tomli as tomllib

    class StrEnum(str, enum.Enum):
        """An enumeration whose members are, and print as, their strings."""

        __str__ = str.__str__

    @contextlib.asynccontextmanager
    async def timeout(seconds: float | None) -> AsyncIterator[None]:
        """Cancels what is awaited within after `seconds` and raises the built-in `TimeoutError`."""
        try:
            async with async_timeout.timeout(seconds):
                yield
        except asyncio.TimeoutError as error:  # before 3.11 not the built-in one
            raise TimeoutError from error


UTC = timezone.utc
BLOCK_BYTES = 1 << 18

T = TypeVar("T")


async def wait_for(work: Awaitable[T], seconds: float | None) -> T:
    """`asyncio.wait_for` as of 3.12: never swallows a cancellation. Raises `TimeoutError`."""
    async with timeout(seconds):
        return await work


def moment(text: str) -> datetime:
    """An ISO 8601 date or time; `Z` is UTC also before 3.11. Raises `ValueError`."""
    return datetime.fromisoformat(f"{text[:-1]}+00:00" if text.endswith(("Z", "z")) else text)


def file_digest(stream: BinaryIO) -> _Hash:
    """SHA-256 of what is left of a binary file."""
    digest = hashlib.sha256()
    while block := stream.read(BLOCK_BYTES):
        digest.update(block)
    return digest


def uncancel(task: asyncio.Task[object]) -> None:
    """Takes back one cancellation that was handled; before 3.11 they are not counted."""
    if sys.version_info >= (3, 11):
        task.uncancel()
