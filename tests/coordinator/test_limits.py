"""What one device may ask for: who asks too much waits, is refused, is not heard; others are."""

from __future__ import annotations

import asyncio
import shutil
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import limits as limits_module
from coordinator.limits import (
    CALLS,
    CALLS_BURST,
    FLOOD_S,
    LEAST_SPARE_BYTES,
    MOST_ADDRESSES,
    MOST_HELD,
    NOISE_IN_BURST,
    NOISE_OUT_BURST,
    NOISE_PER_S,
    OVER_BURST,
    REFUSALS_BURST,
    Bucket,
    FloodError,
    Limits,
    Traffic,
    Watermark,
    most_bytes,
)
from coordinator.plausible import require_plausible, require_plausible_report
from profiles.device import ComputeProfile, DeviceProfile
from profiles.link import LinkProfile
from protos.contract import LocalReport, Reason, RefusalError


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Those who wait do so for an instant."""
    monkeypatch.setattr(limits_module, "HOLD_S", 0.01)


async def call(limits, device="ash", kind="NextTask"):
    """A call that is answered at once."""
    async with limits.turn(device, kind):
        pass


# --- calls --------------------------------------------------------------------------------------


async def test_a_device_that_asks_too_fast_is_told_to_wait_and_others_are_not():
    limits = Limits(lambda: 0.0)
    for _ in range(int(CALLS_BURST)):
        await call(limits)
    with pytest.raises(RefusalError) as refused:
        await call(limits)
    assert refused.value.reason is Reason.SLOW_DOWN and refused.value.retry_s > 0
    await call(limits, "birch")


async def test_who_goes_on_all_the_same_floods():
    limits = Limits(lambda: 0.0)
    for _ in range(int(CALLS_BURST)):
        await call(limits)
    told = await asyncio.gather(
        *(call(limits) for _ in range(int(OVER_BURST) + 5)), return_exceptions=True
    )
    assert sum(isinstance(error, FloodError) for error in told) == 5
    assert all(isinstance(error, RefusalError) for error in told)


async def test_after_a_while_calls_are_answered_again():
    now = [0.0]
    limits = Limits(lambda: now[0])
    for _ in range(int(CALLS_BURST)):
        await call(limits)
    now[0] = 60.0
    for _ in range(int(CALLS_BURST)):
        await call(limits)


@pytest.mark.parametrize("kind", CALLS)
async def test_of_open_calls_the_oldest_ends_so_that_a_broken_connection_holds_no_place(kind):
    limits = Limits()
    running, ended = [], []

    async def stay(number):
        try:
            async with limits.turn("ash", kind):
                running.append(number)
                await asyncio.sleep(60)
        except RefusalError:
            ended.append(number)

    most = CALLS[kind].at_once
    tasks = []
    for number in range(most + 2):
        tasks.append(asyncio.create_task(stay(number)))
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert running == list(range(most + 2)) and ended == [0, 1]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert limits._open[kind] == 0 and not limits._ended


async def test_one_device_cannot_take_the_places_of_all():
    """However many calls it opens, most of them end; the fleet's places are never full by it."""
    for kind, allowed in CALLS.items():
        assert allowed.at_once * 8 <= allowed.in_all, kind


async def test_a_call_of_a_kind_that_ends_is_ended(monkeypatch):
    monkeypatch.setitem(CALLS, "Probe", limits_module.Allowed(2, 8, longest_s=0.01))
    with pytest.raises(RefusalError, match="took too long"):
        async with Limits().turn("ash", "Probe"):
            await asyncio.sleep(60)


async def test_strangers_are_counted_by_address_and_forgotten(monkeypatch):
    monkeypatch.setattr(limits_module, "MOST_ADDRESSES", 8)
    limits = Limits()
    for number in range(50):
        await call(limits, f"@{number}", "Enroll")
    assert len(limits._devices) <= 8


async def test_who_is_turned_away_again_and_again_waits_and_then_is_hung_up_on():
    limits = Limits(lambda: 0.0)
    for _ in range(int(REFUSALS_BURST)):
        await limits.refused("10.0.0.1")
    told = await asyncio.gather(
        *(limits.refused("10.0.0.1") for _ in range(MOST_HELD + 3)), return_exceptions=True
    )
    assert sum(isinstance(error, FloodError) for error in told) == 3
    await limits.refused("10.0.0.2")
    assert not limits._held and len(limits._addresses) <= MOST_ADDRESSES


async def test_a_device_that_floods_is_not_heard_for_a_while_and_strangers_are():
    now = [0.0]
    limits = Limits(lambda: now[0])
    for device in ("ash", "@10.0.0.1"):
        calls = (call(limits, device) for _ in range(int(CALLS_BURST + OVER_BURST) + 400))
        told = await asyncio.gather(*calls, return_exceptions=True)
        assert any(isinstance(error, FloodError) for error in told)
    now[0] = FLOOD_S - 1
    with pytest.raises(FloodError):
        await call(limits)
    await call(limits, "@10.0.0.1")  # there may be others
    await call(limits, "birch")
    now[0] = FLOOD_S + 1
    await call(limits)


# --- noise --------------------------------------------------------------------------------------


def test_messages_and_what_goes_along_with_them_are_no_noise():
    limits = Limits(lambda: 0.0)
    own = limits._of("ash")
    for _ in range(1000):
        own.noise.taken(1 << 20)
        assert not limits.crossed("ash", int(1.05 * (1 << 20)), 1 << 14)
        own.noise.given(1 << 20)
        assert not limits.crossed("ash", 1 << 14, int(1.05 * (1 << 20)))


def test_messages_may_come_before_they_are_taken_and_go_after_they_are_given():
    limits = Limits(lambda: 0.0)
    own = limits._of("ash")
    for _ in range(100):
        assert not limits.crossed("ash", 30 << 20, 0)  # a window's worth
        own.noise.taken(30 << 20)
        own.noise.given(30 << 20)
        assert not limits.crossed("ash", 0, 0)
        assert not limits.crossed("ash", 0, 30 << 20)


def test_a_flood_of_frames_is_forgiven_after_its_time_however_large_it_was(caplog):
    now = [0.0]
    limits = Limits(lambda: now[0])
    assert limits.crossed("ash", int(100 * NOISE_IN_BURST), 0)
    assert not limits.crossed("ash", 1000, 0)
    assert limits.crossed("ash", int(2 * NOISE_IN_BURST), 0)
    assert caplog.text.count("floods") == 1
    now[0] = FLOOD_S + 1
    assert not limits.crossed("ash", 1000, 0)


@pytest.mark.parametrize(
    ("received", "sent"), [(NOISE_IN_BURST + 1, 0), (0, NOISE_OUT_BURST + 1)],
    ids=["frames that nothing answers", "answers to pings"],
)  # fmt: skip
def test_frames_that_are_in_no_message_are_a_flood(received, sent, caplog):
    now = [0.0]
    limits = Limits(lambda: now[0])
    assert not limits.crossed("birch", int(received / 2), int(sent / 2))
    assert limits.crossed("ash", int(received), int(sent))
    assert "revoke ash" in caplog.text
    now[0] = FLOOD_S + 1
    assert not limits.crossed("ash", 0, 0)
    per_s = int(NOISE_PER_S)
    for _ in range(1000):
        now[0] += 1
        assert not limits.crossed("birch", per_s // 2, per_s // 2)


@given(st.lists(st.floats(0, 10), max_size=50), st.floats(0.1, 100), st.floats(1, 100))
def test_a_bucket_gives_no_more_than_its_burst_and_its_rate(steps, per_s, burst):
    bucket, now, given_out = Bucket(per_s, burst, 0.0), 0.0, 0
    for step in steps:
        now += step
        given_out += bucket.take(now, 0.0) is not None
    assert given_out <= burst + per_s * now + 1e-6


# --- bytes --------------------------------------------------------------------------------------


def test_the_bytes_of_a_file_may_cross_the_link_some_times_and_not_more():
    traffic = Traffic(None, lambda: 0.0)
    size, moved = 10 << 20, 0
    with pytest.raises(RefusalError, match="moved 4 times") as refused:
        while moved < 10 * size:
            traffic.take("ash", "update", size, 1 << 19)
            moved += 1 << 19
    assert most_bytes(size) <= moved <= most_bytes(size) + (1 << 19)
    assert refused.value.reason is Reason.SLOW_DOWN
    traffic.take("ash", "another", size, 1 << 19)
    traffic.take("birch", "update", size, 1 << 19)


def test_messages_without_bytes_count_too():
    traffic = Traffic(None, lambda: 0.0)
    with pytest.raises(RefusalError):
        for _ in range(5000):
            traffic.take("ash", "update", 1000, 0)


def test_a_days_bytes_are_whole_again_at_midnight():
    now = [86_400.0 * 3 + 80_000]
    traffic = Traffic(1, lambda: now[0])
    for number in range(2):
        traffic.take("ash", str(number), 500_000, 500_000)
    with pytest.raises(RefusalError, match="mb_per_day") as refused:
        traffic.take("ash", "2", 500_000, 1)
    assert refused.value.retry_s == pytest.approx(6400)
    traffic.take("birch", "2", 500_000, 1)
    now[0] += 6400
    traffic.take("ash", "2", 500_000, 1)


def disk(monkeypatch, total, free):
    usage = types.SimpleNamespace(total=total, used=total - free, free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)


def test_uploads_are_refused_before_the_disk_is_full(monkeypatch, tmp_path):
    disk(monkeypatch, 100 << 30, 6 << 30)
    room = Watermark(tmp_path, 0.95)
    room.require(1 << 29)
    with pytest.raises(RefusalError) as refused:
        room.require(2 << 30)
    assert refused.value.reason is Reason.NO_ROOM and refused.value.retry_s == 60


def test_of_a_small_disk_something_is_always_left(monkeypatch, tmp_path):
    disk(monkeypatch, 100 << 20, LEAST_SPARE_BYTES)
    with pytest.raises(RefusalError):
        Watermark(tmp_path, 1.0).require(1)


# --- claims -------------------------------------------------------------------------------------


def profile(**changes):
    compute = {"tokens_per_s": 100.0, "forward_tokens_per_s": 300.0, "precision": "nf4",
               "micro_batch": 1, **changes.pop("compute", {})}  # fmt: skip
    measured = ComputeProfile(base_digest="ab", baseline_bytes=1, peak_bytes=1, rank=1,
                              sequence_tokens=64, **compute)  # fmt: skip
    return DeviceProfile("board", "cpu", 4, 2**33, 2**33, 2**36, "0", compute=measured, **changes)


@pytest.mark.parametrize(
    ("claimed", "name"),
    [
        ({"compute": {"tokens_per_s": 0.0}}, "compute.tokens_per_s"),
        ({"compute": {"forward_tokens_per_s": -1.0}}, "compute.forward_tokens_per_s"),
        ({"compute": {"precision": "int3"}}, "compute.precision"),
        ({"compute": {"micro_batch": 0}}, "compute.micro_batch"),
        ({"link": LinkProfile(-1.0, 1.0, 0.1)}, "link.up_bps"),
        ({"memory_cap_bytes": -5}, "memory_cap_bytes"),
    ],
)
def test_claims_that_cannot_be_are_refused_before_anybody_plans_with_them(claimed, name):
    require_plausible(profile())
    with pytest.raises(RefusalError, match=name) as refused:
        require_plausible(profile(**claimed))
    assert refused.value.reason is Reason.BAD_REQUEST


def test_reports_of_negative_times_are_refused():
    require_plausible_report(LocalReport("a", "done", train_s=1.0))
    with pytest.raises(RefusalError, match="train_s"):
        require_plausible_report(LocalReport("a", "done", train_s=-1.0))
