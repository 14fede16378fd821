"""Writes that come while the disk is busy share one transaction, and none is answered before it."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest

from coordinator.store.group_commit import GroupCommit
from coordinator.store.records import Records
from coordinator.store.rows import UploadRecord

UPLOAD = UploadRecord("u", "run.0.ash", "a" * 64, 10)


@pytest.fixture
def records(tmp_path):
    found = Records(tmp_path / "state.sqlite")
    yield found
    found.close()


def put(records, name):
    return lambda: records.put_upload(replace(UPLOAD, upload_id=name))


async def test_whoever_comes_while_the_disk_is_busy_shares_the_next_transaction(records):
    sizes, free, real = [], threading.Event(), records.together

    def slow(calls):
        sizes.append(len(calls))
        free.wait(10)
        return real(calls)

    records.together = slow
    writes = GroupCommit(records)
    first = asyncio.ensure_future(writes.write(put(records, "first")))
    while not sizes:
        await asyncio.sleep(0.001)
    others = [asyncio.ensure_future(writes.write(put(records, f"u{i}"))) for i in range(20)]
    await asyncio.sleep(0.05)
    assert not first.done() and not any(other.done() for other in others), "answered too early"
    free.set()
    await asyncio.gather(first, *others)
    assert sizes == [1, 20]
    assert all(records.upload(f"u{i}") is not None for i in range(20))


async def test_what_fails_fails_alone(records):
    writes = GroupCommit(records)
    answers = await asyncio.gather(
        writes.write(put(records, "one")),
        writes.write(lambda: records.put_update("run.9.nobody", "a" * 64, 1, 0.0)),
        writes.write(put(records, "two")),
        writes.write(lambda: records.upload("one")),
        return_exceptions=True,
    )
    assert answers[0] is None and answers[2] is None
    assert isinstance(answers[1], Exception)
    assert answers[3] == replace(UPLOAD, upload_id="one")
    assert records.upload("two") is not None
    assert await writes.write(lambda: 7) == 7, "and those who come later are served"


async def test_a_write_whose_caller_left_is_carried_out_all_the_same(records):
    writes = GroupCommit(records)
    leaving = asyncio.ensure_future(writes.write(put(records, "left")))
    await asyncio.sleep(0)
    leaving.cancel()
    await writes.write(put(records, "stayed"))
    assert records.upload("left") is not None and records.upload("stayed") is not None


def test_a_transaction_that_breaks_leaves_nothing_behind_of_itself(records):
    """Each of its writes is tried on its own, once."""
    tries = []

    def refused():
        records.put_upload(replace(UPLOAD, upload_id=f"try-{len(tries)}"))
        tries.append(1)
        raise RuntimeError

    kept, failed = records.together([put(records, "kept"), refused])
    assert kept is None and isinstance(failed, RuntimeError)
    assert records.upload("kept") is not None
    assert records.upload("try-0") is None, "what the broken transaction wrote"
    assert len(tries) == 2
