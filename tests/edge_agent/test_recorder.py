"""A link is written down as it is: its rates, delay, loss and outages, and nothing it was not."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.authority import Authority
from coordinator.listeners import open_listeners
from coordinator.server_config import ServerSection
from coordinator.store.records import Records
from edge_agent.identity import Identity
from edge_agent.joining import enroll
from edge_agent.link import LinkError
from edge_agent.recorder import CONNECTIONS, Recorder, RecordError, Recording
from profiles.settings import host_of
from profiles.trace import LinkState, Outage, read_trace, steady
from protos.invitation import Invitation, pin_of
from trials.fleet import free_port
from trials.tunnel import DeviceNetwork, unavailable

ROOT = Path(__file__).resolve().parent.parent.parent


class World:
    """A clock that only tests move, and a link that behaves as `at` says."""

    def __init__(self, at):
        self.now, self.at = 0.0, at

    async def sleep(self, seconds):
        self.now += seconds

    async def knock(self, patience_s):
        state = self.at(self.now)
        if state.up_bps == 0:
            self.now += patience_s
            return None
        self.now += 2 * state.delay_s
        return 2 * state.delay_s

    async def rate(self, direction, size_bytes):
        state = self.at(self.now)
        if state.up_bps == 0:
            raise LinkError("nothing passes")
        bps = state.up_bps if direction == "up" else state.down_bps
        took_s = 8 * CONNECTIONS * size_bytes / bps + 2 * state.delay_s
        self.now += took_s
        return [took_s] * CONNECTIONS

    async def recorded(self, lasts_s, every_s=30.0):
        recorder = Recorder(self, every_s, lambda at_s, state: None, lambda: self.now, self.sleep)
        await recorder.run(lasts_s)
        return recorder.recording


async def test_a_steady_link_is_one_state():
    truth = LinkState(2e6, 8e6, 0.05)
    found = await World(steady(truth)).recorded(120)
    assert found.times == [0.0]
    assert found.states[0].up_bps == pytest.approx(2e6, rel=0.01)
    assert found.states[0].down_bps == pytest.approx(8e6, rel=0.01)
    assert found.states[0].delay_s == 0.05 and found.with_loss[0].loss == 0


async def test_an_outage_begins_with_the_first_handshake_that_is_not_answered():
    world = World(steady(LinkState(2e6, 8e6, 0.05), Outage(every_s=100, lasts_s=20)))
    found = await world.recorded(110, every_s=1000)
    assert [state.up_bps > 0 for state in found.states] == [True, False, True]
    assert found.times[2] - found.times[1] == pytest.approx(20, abs=3.5)
    assert found.ended_s == pytest.approx(110, abs=5)
    assert found.states[2] == found.states[0], "it is as it was before"


async def test_a_single_lost_handshake_is_no_outage():
    truth = LinkState(2e6, 8e6, 0.05)

    class Flaky(World):
        async def knock(self, patience_s):
            took_s = await super().knock(patience_s)
            self.knocks = getattr(self, "knocks", 0) + 1
            return None if self.knocks == 20 else took_s

    found = await Flaky(steady(truth)).recorded(60)
    assert all(state.up_bps > 0 for state in found.states)


async def test_a_link_that_changes_is_measured_again():
    def at(t_s):
        return LinkState(2e6, 8e6, 0.05) if t_s < 40 else LinkState(5e5, 1e6, 0.2)

    found = await World(at).recorded(150, every_s=15)
    last = found.states[-1]
    assert (last.up_bps, last.down_bps) == pytest.approx((5e5, 1e6), rel=0.2)
    assert last.delay_s == pytest.approx(0.2, rel=0.01)
    changed = next(t for t, s in zip(found.times, found.states, strict=True) if s.up_bps < 1e6)
    assert 20 < changed < 100


async def test_handshakes_that_were_sent_again_tell_the_loss():
    class Lossy(World):
        knocks = 0

        async def knock(self, patience_s):
            self.knocks += 1
            took_s = await super().knock(patience_s)
            again_s = 1.0 if self.knocks % 10 == 0 else 0.0
            self.now += again_s
            return took_s + again_s

    found = await Lossy(steady(LinkState(2e6, 8e6, 0.05))).recorded(280, every_s=1000)
    assert found.with_loss[0].loss == pytest.approx(1 - 0.9**0.5, abs=0.01)
    assert found.states[0].delay_s == 0.05, "what was sent again says nothing of the delay"


async def test_a_link_that_never_answers_is_no_recording():
    world = World(lambda t_s: LinkState(0, 0, 0.05))
    with pytest.raises(RecordError, match="did not answer"):
        await world.recorded(60)


def test_what_does_not_change_takes_no_row():
    found, same = Recording(), LinkState(1e6, 1e6, 0.1)
    for at_s in (0.0, 1.0, 2.0):
        found.note(at_s, same)
    assert found.times == [0.0]


# --- over a real link -----------------------------------------------------------------------------


class _Idle:
    """An engine that nobody asks for work."""


def serving(folder, port):
    """A coordinator that enrols and echoes, not yet listening for its devices."""
    records = Records(folder / "coordinator.sqlite")
    server = ServerSection(
        listen=f"127.0.0.1:{port}", enrolment="127.0.0.1:0", state=folder, plain_text=False
    )
    return open_listeners(server, None, _Idle(), records)


@pytest.mark.slow
@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
async def test_a_recording_of_a_known_link_plays_back_as_that_link(tmp_path):

    truth = LinkState(2e6, 6e6, 0.03, loss=0.01)
    port = free_port()
    link = steady(truth, Outage(every_s=25, lasts_s=6))
    (tmp_path / "code.py").write_text("pass\n")
    with DeviceNetwork("test-record", 8010, port, link) as net:
        authority = Authority.create(tmp_path / "authority", ["127.0.0.1", host_of(net.address)])
        server = serving(tmp_path, port)
        await server.start()
        invitation = Invitation(
            server.enrolment.create_token(), f"127.0.0.1:{server.joining_port}",
            pin_of(authority.trust), authority.trust,
        )  # fmt: skip
        identity = Identity(tmp_path / "state" / "identity")
        await asyncio.to_thread(enroll, identity, invitation, "ash", "test", lambda: None, 20.0)
        (tmp_path / "agent.toml").write_text(
            f"[device]\nname = 'ash'\n[coordinator]\naddress = '{net.address}'\n"
            f"[data]\ninclude = ['code.py']\n[state]\nfolder = 'state'\n"
        )
        words = [
            "-m",
            "edge_agent.cli",
            "record",
            "--config",
            str(tmp_path / "agent.toml"),
            "--out",
            str(tmp_path / "trace.csv"),
            "--minutes",
            "0.4",
            "--every",
            "60",
        ]
        process = await asyncio.create_subprocess_exec(
            *net.wrap([sys.executable, *words]), env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        said = (await asyncio.wait_for(process.communicate(), 50))[0].decode()
    await server.stop(None)
    assert process.returncode == 0, said
    found = read_trace(tmp_path / "trace.csv")
    first = found(0.0)
    assert first.up_bps == pytest.approx(truth.up_bps, rel=0.25), said
    assert first.down_bps == pytest.approx(truth.down_bps, rel=0.25), said
    assert first.delay_s == pytest.approx(truth.delay_s, rel=0.25), said
    assert first.loss <= 0.15, said  # twenty handshakes tell no more
    silent = sum(found(t / 10).up_bps == 0 for t in range(240)) / 10
    assert 4 <= silent <= 9, f"6 s of outage were recorded as {silent} s\n{said}"
