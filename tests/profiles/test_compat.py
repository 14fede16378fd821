"""What Python 3.10 lacks behaves the same wherever it comes from."""

import asyncio
import hashlib
import io
from datetime import datetime, timedelta

import pytest

from profiles.compat import (
    UTC,
    StrEnum,
    file_digest,
    moment,
    timeout,
    tomllib,
    uncancel,
    wait_for,
)


class Colour(StrEnum):
    RED = "red"


def test_a_member_is_and_prints_as_its_string():
    assert Colour.RED == "red"
    assert (str(Colour.RED), f"{Colour.RED}", f"{Colour.RED:>5}") == ("red", "red", "  red")
    assert Colour("red") is Colour.RED


async def test_time_that_runs_out_is_the_built_in_error():
    with pytest.raises(TimeoutError):
        async with timeout(0.01):
            await asyncio.sleep(5)
    with pytest.raises(TimeoutError):
        await wait_for(asyncio.sleep(5), 0.01)
    assert await wait_for(asyncio.sleep(0, "done"), 5) == "done"
    assert await wait_for(asyncio.sleep(0, "done"), None) == "done"


async def test_a_cancellation_from_outside_is_not_taken_for_time_that_ran_out():
    task = asyncio.ensure_future(wait_for(asyncio.sleep(5), 5))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_that_was_handled_is_forgotten():
    async def stubborn():
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            uncancel(asyncio.current_task())
        async with timeout(5):
            return await asyncio.sleep(0, "done")

    task = asyncio.ensure_future(stubborn())
    await asyncio.sleep(0)
    task.cancel()
    assert await task == "done"


def test_a_time_may_end_in_z():
    assert moment("2026-03-31T12:00Z") == datetime(2026, 3, 31, 12, tzinfo=UTC)
    assert moment("2026-03-31T12:00+02:00").utcoffset() == timedelta(hours=2)
    assert moment("2026-03-31").tzinfo is None
    with pytest.raises(ValueError, match="soon"):
        moment("soon")


@pytest.mark.parametrize("size", [0, 5, 600_000])
def test_the_digest_of_a_file_is_that_of_its_bytes(size):
    content = bytes(size)
    assert file_digest(io.BytesIO(content)).digest() == hashlib.sha256(content).digest()


def test_toml_is_read():
    assert tomllib.loads("a = 1") == {"a": 1}
    with pytest.raises(tomllib.TOMLDecodeError):
        tomllib.loads("a")
