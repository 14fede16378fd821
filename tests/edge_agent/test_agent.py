"""The network process between a scripted coordinator and a trainer that only pretends to train.

What travels is real: gRPC over loopback, files, the journal. A round that was cut off is done again
from the same home; what did not change since the last round is not fetched again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
from pathlib import Path

import grpc
import numpy as np
import pytest

from edge_agent.agent import Agent, AgentError
from edge_agent.config import AgentConfig
from edge_agent.link_estimate import Transfer
from edge_agent.policy import CALM_S, Cause
from edge_agent.readings import Readings
from edge_agent.trainer_process import TrainerError
from profiles.device import ComputeProfile, DeviceProfile
from profiles.link import LinkProfile
from profiles.model import ModuleShape
from protos.contract import (
    AdapterSpec,
    Assignment,
    BlobRef,
    LocalReport,
    Payload,
    ProfileRequest,
    Progress,
    Reason,
    from_message,
    from_plain,
    to_message,
    to_plain,
)
from protos.sketchfleet.v1 import fleet_pb2 as pb
from protos.sketchfleet.v1 import fleet_pb2_grpc as rpc
from protos.status import status_of
from protos.transfer import crc32
from tests.coordinator.test_downlink import Ends, first_model, moved

HALF = Payload(2, "float32", ("down",))
SPEC = AdapterSpec(
    run_id="run", base="base", base_revision="", base_digest="b" * 64, rank=4, alpha=8.0,
    use_rslora=False, seed=7, modules=(ModuleShape("layer", 8, 8),),
)  # fmt: skip
UP, DOWN, SIDE = (name * 50_000 for name in (b"up", b"down", b"side"))  # two chunks and more


class KilledError(Exception):
    """The agent's process is gone at this very instant."""


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def ref(data: bytes) -> BlobRef:
    return BlobRef(digest_of(data), len(data), HALF)


def assign(number=0, **changes) -> Assignment:
    """What the device is asked to do in round `number`."""
    facts = {
        "assignment_id": f"run.{number}.ash", "run_id": "run", "round": number,
        "device_id": "ash", "method": "rolora", "rank": 2, "rows": "prefix", "sketch_offset": 0,
        "alpha": 8.0, "trained": ("up", "down"), "personal": (), "keeps_basis": True,
        "keeps_state": False,
        "error_feedback": False, "fresh": False, "precision": "fp32", "sequence_tokens": 16,
        "micro_batch": 1, "accumulation": 1, "checkpointing": False, "local_steps": 2,
        "learning_rate": 0.1, "optimizer": "sgd", "update": HALF, "evaluation_sequences": 1,
        "held_out_share": 0.1, "evaluates_global": False, "seed": number, "deadline_s": 60.0,
        "reason": "as the test wants it",
    }  # fmt: skip
    return Assignment(**(facts | changes))


class Coordinator(
    rpc.EnrolmentServiceServicer, rpc.FleetServiceServicer, rpc.TransferServiceServicer
):
    """Hands out these tasks one after the other and notes what comes back."""

    def __init__(self, *tasks):
        self.tasks = list(tasks)
        self.blobs = {digest_of(data): data for data in (UP, DOWN, SIDE)}
        self.fetched, self.pushed, self.reports, self.profiles = [], [], [], []
        self.progress = []  # what heartbeats told
        self.mirrors = []  # what polls said is held
        self.refuse = None  # the reason for which updates are turned down

    async def Enroll(self, request, context):
        return pb.EnrollResponse(device_id="ash", credential="ash:secret", expires_in_s=86400.0)

    async def NextTask(self, request, context):
        if request.HasField("profile"):
            self.profiles.append(from_message(request.profile, DeviceProfile))
        self.mirrors.append(request.mirror if request.HasField("mirror") else None)
        if request.working_on:
            self.progress.append(from_message(request.progress, Progress))
            return pb.NextTaskResponse(kind=pb.NextTaskResponse.KIND_WAIT)
        if not self.tasks:
            return pb.NextTaskResponse(kind=pb.NextTaskResponse.KIND_RUN_FINISHED)
        task = self.tasks.pop(0)
        if isinstance(task, ProfileRequest):
            return pb.NextTaskResponse(
                kind=pb.NextTaskResponse.KIND_PROFILE, spec=to_message(SPEC, pb.AdapterSpec),
                profile_request=to_message(task, pb.ProfileRequest),
            )  # fmt: skip
        return pb.NextTaskResponse(
            kind=pb.NextTaskResponse.KIND_ASSIGNMENT, spec=to_message(SPEC, pb.AdapterSpec),
            assignment=to_message(task, pb.Assignment), remaining_s=60.0,
        )  # fmt: skip

    async def Report(self, request, context):
        self.reports.append(from_message(request.report, LocalReport))
        return pb.ReportResponse()

    async def Probe(self, request_iterator, context):
        async for message in request_iterator:
            if message.last:
                yield pb.ProbeResponse(timed_bytes=1, timed_s=2.0)

    async def Fetch(self, request, context):
        self.fetched.append((request.digest, request.offset))
        whole = self.blobs[request.digest]
        for offset in range(request.offset, len(whole), 100_000):
            data = whole[offset : offset + 100_000]
            yield pb.FetchResponse(offset=offset, data=data, crc32=crc32(data))

    async def Push(self, request_iterator, context):
        if self.refuse is not None:
            await context.abort_with_status(status_of(self.refuse, "not wanted"))
        async for request in request_iterator:
            if request.HasField("update"):
                yield pb.PushResponse(chunk_bytes=1 << 17)
                continue
            self.pushed.append(request.data)
            if request.acknowledge:
                yield pb.PushResponse(durable_bytes=request.offset + len(request.data))
        yield pb.PushResponse(receipt="r", outcome="accepted")


class Trainer:
    """Notes its jobs; the update and the new home depend on the old home and the seed alone."""

    def __init__(self, keeps=True):
        self.keeps = keeps
        self.jobs, self.blobs, self.homes = [], [], []
        self.fails = None

    async def run(self, job, progress=None):
        self.jobs.append(job)
        if job["job"] == "profile":
            compute = ComputeProfile(SPEC.base_digest, "fp32", 1000.0, 3000.0, 1, 2, 2, 16, 1)
            return {"compute": to_plain(compute)}
        if self.fails is not None:
            raise self.fails
        task = from_plain(Assignment, job["assignment"])
        paths = [*job["slice_paths"], *job["global_paths"], job["side_path"],
                 job["global_side_path"]]  # fmt: skip
        self.blobs.append([Path(path).read_bytes() for path in paths if path is not None])
        home = Path(job["home_path"]).read_bytes() if job["home_path"] else b""
        self.homes.append(home)
        if job["update_path"] is not None:
            Path(job["update_path"]).write_bytes(b"update %d of %s" % (task.seed, home))
        if job["home_out"] is not None and self.keeps:
            Path(job["home_out"]).write_bytes(b"%s<%d>" % (home, task.seed))
        return {"report": to_plain(LocalReport(task.assignment_id, "done", train_examples=3))}

    async def stop(self):
        pass


class Calm:
    """A machine that always tells the same."""

    def __init__(self, **readings):
        self.readings = Readings(**readings)

    def read(self, waiting):
        return self.readings


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def live(tmp_path, impatient):
    """One life of the agent with this coordinator: until the run is finished, or it is killed."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("print('a')\n" * 20)
    (tmp_path / "token").write_text("token")

    async def with_these(coordinator, trainer=None, *, prepare=lambda agent: None, **sections):
        server = grpc.aio.server()
        rpc.add_EnrolmentServiceServicer_to_server(coordinator, server)
        rpc.add_FleetServiceServicer_to_server(coordinator, server)
        rpc.add_TransferServiceServicer_to_server(coordinator, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        agent = Agent(AgentConfig.model_validate({
            "data": {"include": [str(tmp_path / "code")]},
            "device": {"name": "ash"},
            "coordinator": {"address": f"127.0.0.1:{port}", "plain_text": True,
                            "token_file": str(tmp_path / "token")},
            "state": {"folder": str(tmp_path / "state")},
            **sections,
        }))  # fmt: skip
        agent.trainer = trainer or Trainer()
        agent.activity = Calm()
        agent.bases.checked[SPEC.base_digest] = tmp_path
        prepare(agent)
        try:
            with contextlib.suppress(KilledError):
                await agent.run()
        finally:
            await server.stop(0)
        return agent.trainer

    return with_these


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- the job ------------------------------------------------------------------------------------


async def test_the_trainer_is_told_every_path_in_the_order_of_the_assignment(live, state):
    task = assign(
        slice=(ref(UP), ref(DOWN)), global_adapter=(ref(DOWN), ref(UP)), side=ref(SIDE),
        global_side=ref(UP), evaluates_global=True,
    )  # fmt: skip
    coordinator = Coordinator(task)
    trainer = await live(coordinator, personal={"ditto": 0.5}, limits={"memory_mb": 100})
    (job,) = trainer.jobs
    assert trainer.blobs == [[UP, DOWN, DOWN, UP, SIDE, UP]]
    assert (job["job"], from_plain(Assignment, job["assignment"])) == ("train", task)
    assert (job["personal_weight"], job["memory_cap_bytes"]) == (0.5, 100 * 10**6)
    assert job["home_path"] is None and job["home_out"] == str(state / "work" / "run.0.ash.home")
    assert job["update_path"] == str(state / "work" / "run.0.ash.update")
    assert sorted(coordinator.fetched) == sorted((digest_of(b), 0) for b in (UP, DOWN, SIDE))
    (report,) = coordinator.reports
    assert report.fetched_bytes == len(UP) + len(DOWN) + len(SIDE), "each is fetched once"


async def test_an_assignment_that_only_evaluates_has_no_update_and_leaves_the_home(live, state):
    only = assign(1, local_steps=0, global_adapter=(ref(UP),), evaluates_global=True)
    coordinator = Coordinator(assign(0), only, assign(2))
    trainer = await live(coordinator)
    job = trainer.jobs[1]
    assert (job["update_path"], job["home_out"], job["side_path"]) == (None, None, None)
    assert (job["slice_paths"], job["global_side_path"]) == ([], None)
    assert trainer.homes == [b"", b"<0>", b"<0>"]
    assert len(coordinator.pushed) == 2 and len(coordinator.reports) == 3


@pytest.mark.parametrize("place", ["slice", "global_adapter", "side", "global_side"])
async def test_a_digest_that_is_none_is_no_file_name(live, tmp_path, place):
    bad = BlobRef("../../token", 5, HALF)
    with pytest.raises(AgentError, match="no file names"):
        await live(Coordinator(assign(**{place: bad if "side" in place else (bad,)})))
    assert (tmp_path / "token").read_text() == "token"


# --- blobs --------------------------------------------------------------------------------------


async def test_a_blob_that_did_not_change_is_not_fetched_again(live, state):
    rounds = [assign(0, slice=(ref(UP), ref(DOWN))), assign(1, slice=(ref(UP), ref(SIDE))),
              assign(2, slice=(ref(UP), ref(SIDE)))]  # fmt: skip
    coordinator = Coordinator(*rounds)
    trainer = await live(coordinator)
    assert coordinator.fetched == [(digest_of(b), 0) for b in (UP, DOWN, SIDE)]
    assert trainer.blobs == [[UP, DOWN], [UP, SIDE], [UP, SIDE]]
    assert [r.fetched_bytes for r in coordinator.reports] == [len(UP) + len(DOWN), len(SIDE), 0]
    assert names(state / "blobs") == [], "nothing is kept of a run that is over"


async def test_kept_blobs_serve_the_next_life_and_others_go_before_anything_is_fetched(live, state):
    both = {"slice": (ref(UP), ref(DOWN))}
    await live(Coordinator(assign(0, **both), assign(1, **both)), prepare=die_at(1))
    assert names(state / "blobs") == sorted([digest_of(UP), digest_of(DOWN)])
    (state / "blobs" / f"{digest_of(DOWN)}.part").write_bytes(b"stale")
    (state / "blobs" / f"{digest_of(SIDE)}.part").write_bytes(SIDE[:1000])
    coordinator = Coordinator(assign(1, slice=(ref(UP), ref(SIDE))))
    held = []
    real = coordinator.Fetch

    async def noting(request, context):
        held.extend(names(state / "blobs"))
        async for piece in real(request, context):
            yield piece

    coordinator.Fetch = noting
    trainer = await live(coordinator)
    assert held == sorted([digest_of(UP), f"{digest_of(SIDE)}.part"])
    assert coordinator.fetched == [(digest_of(SIDE), 1000)], "what had arrived is not sent again"
    assert trainer.blobs == [[UP, SIDE]]
    assert coordinator.reports[0].fetched_bytes == len(SIDE) - 1000


@pytest.mark.parametrize("damage", [lambda b: b[:-1] + b"?", lambda b: b[:5000], lambda b: b""])
async def test_a_kept_blob_that_was_damaged_is_fetched_again(live, state, caplog, damage):
    path = state / "blobs" / digest_of(UP)
    await live(Coordinator(assign(0, slice=(ref(UP),))), prepare=die_at(0))
    path.write_bytes(damage(path.read_bytes()))
    coordinator = Coordinator(assign(1, slice=(ref(UP),)))
    with caplog.at_level(logging.WARNING):
        trainer = await live(coordinator)
    assert coordinator.fetched == [(digest_of(UP), 0)] and trainer.blobs == [[UP]]
    assert coordinator.reports[0].fetched_bytes == len(UP)
    assert "is damaged and is fetched again" in caplog.text


async def test_what_rotted_while_it_was_trained_from_is_fetched_and_trained_again(live, state):
    class Rotting(Trainer):
        async def run(self, job, progress=None):
            found = await super().run(job, progress)
            if len(self.jobs) == 1:
                Path(job["slice_paths"][0]).write_bytes(b"?" * len(UP))
            return found

    task = assign(0, slice=(ref(UP),))
    coordinator = Coordinator(task, task)
    trainer = await live(coordinator, Rotting())
    assert trainer.blobs == [[UP], [UP]] and len(coordinator.fetched) == 2
    assert len(coordinator.pushed) == len(coordinator.reports) == 1


# --- mirrors ------------------------------------------------------------------------------------


@pytest.fixture
def steps(tmp_path):
    """Two assignments whose adapters come as steps of a mirror, and the blobs they name."""
    ends, rng = Ends(tmp_path / "ends", spec=SPEC), np.random.default_rng(1)
    model, tasks = first_model(SPEC), []
    for round_ in range(2):
        model = moved(model, rng, 0.01)
        tasks.append(ends.sent(model, assign(round_)))
    paths = [p for p in (tmp_path / "ends" / "blobs").glob("??/*") if len(p.name) == 64]
    return tasks, {p.name: p.read_bytes() for p in paths}


def files(task):
    return [(file.blob.digest, 0) for file in task.mirror.files]


async def test_the_mirror_goes_on_from_life_to_life_and_is_named_at_every_poll(live, state, steps):
    (first, second), blobs = steps
    before, after = Coordinator(first, second), Coordinator(second)
    before.blobs |= blobs
    after.blobs |= blobs
    await live(before, prepare=die_at(1))
    held = [first.mirror.result.digest, second.mirror.result.digest]
    assert before.mirrors == ["", held[0]]
    assert before.fetched == files(first) + files(second)
    trainer = await live(after)
    assert after.mirrors == [held[1], held[1]] and after.fetched == [], "the step was taken"
    assert trainer.jobs[0]["mirror_path"] == str(state / "mirror" / held[1])
    assert names(state / "mirror") == [], "nothing is kept of a run that is over"


async def test_an_adapter_that_came_whole_outlives_the_run(live, state, tmp_path):
    ends = Ends(tmp_path / "ends", spec=SPEC)
    task = ends.sent(first_model(SPEC), assign(0, evaluates_global=True))
    coordinator = Coordinator(task)
    paths = [p for p in (tmp_path / "ends" / "blobs").glob("??/*") if len(p.name) == 64]
    coordinator.blobs |= {p.name: p.read_bytes() for p in paths}
    await live(coordinator)
    assert names(state / "mirror") == []
    assert names(state / "held") == sorted([task.mirror.result.digest, "held.json"])


@pytest.mark.parametrize("loss", ["gone", "rotten"])
async def test_a_device_that_lost_its_mirror_has_the_same_one_in_the_end(
    live, state, steps, loss, caplog
):
    (first, second), blobs = steps
    before, after = Coordinator(first), Coordinator(second)
    before.blobs |= blobs
    after.blobs |= blobs
    await live(before, prepare=die_at(0))
    path = state / "mirror" / first.mirror.result.digest
    if loss == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-2] + b"??")
    ended = []

    class Looking(Trainer):
        async def run(self, job, progress=None):
            ended.append(digest_of(Path(job["mirror_path"]).read_bytes()))
            return await super().run(job, progress)

    await live(after, Looking())
    assert ended == [second.mirror.result.digest]
    whole = [(second.mirror.result.digest, 0)]
    assert after.fetched == (whole if loss == "gone" else files(second) + whole)
    assert ("mirror fetched whole" in caplog.text) == (loss == "rotten")


# --- homes --------------------------------------------------------------------------------------


def die_at(number, *, after=False):
    """Kills the agent where round `number` goes into the journal, before or after it."""

    def prepare(agent):
        add = agent.journal.add

        def dying(report, *rest):
            if report.assignment_id != f"run.{number}.ash":
                return add(report, *rest)
            if after:
                add(report, *rest)
            raise KilledError

        agent.journal.add = dying

    return prepare


async def test_each_round_begins_with_the_home_that_the_last_one_left(live, state):
    trainer = await live(Coordinator(assign(0), assign(1), assign(2)))
    assert trainer.homes == [b"", b"<0>", b"<0><1>"]
    assert names(state / "home") == [digest_of(b"<0><1><2>")]
    assert names(state / "work") == []


async def test_a_round_cut_off_before_the_journal_is_done_again_from_the_same_home(live, state):
    first = Coordinator(assign(0), assign(1))
    killed = await live(first, prepare=die_at(1))
    assert len(first.pushed) == 1
    assert names(state / "work") == ["run.1.ash.home", "run.1.ash.update"]
    second = Coordinator(assign(1), assign(2))
    trainer = await live(second)
    assert trainer.homes == [killed.homes[1], b"<0><1>"] == [b"<0>", b"<0><1>"]
    assert second.pushed == [b"update 1 of <0>", b"update 2 of <0><1>"]


async def test_a_round_that_is_in_the_journal_has_its_home_and_is_only_sent(live):
    await live(Coordinator(assign(0), assign(1)), prepare=die_at(1, after=True))
    second = Coordinator(assign(2))
    trainer = await live(second)
    assert trainer.homes == [b"<0><1>"]
    assert second.pushed == [b"update 1 of <0>", b"update 2 of <0><1>"]


async def test_what_a_dead_life_left_in_work_is_not_taken_for_a_result(live, state):
    await live(Coordinator(assign(0)), prepare=die_at(0))
    assert "run.0.ash.home" in names(state / "work")
    (state / "home" / digest_of(b"moved, and then the power went")).write_bytes(b"orphan")
    trainer = await live(Coordinator(assign(0), assign(1)), Trainer(keeps=False))
    assert trainer.homes == [b"", b""] and names(state / "home") == []


@pytest.mark.parametrize("reason", [Reason.TOO_LATE, Reason.BAD_UPDATE])
async def test_an_update_that_is_refused_leaves_the_home_it_came_with(live, reason):
    coordinator = Coordinator(assign(0), assign(1))
    coordinator.refuse = reason
    trainer = await live(coordinator)
    assert coordinator.pushed == [] and trainer.homes == [b"", b"<0>"]


async def test_a_round_that_failed_leaves_the_home_as_it_was(live):
    trainer = Trainer()
    await live(Coordinator(assign(0), assign(1)), trainer, prepare=die_at(1))
    trainer.fails = TrainerError("out_of_memory", "no room")
    coordinator = Coordinator(assign(1))
    await live(coordinator, trainer)
    assert [r.outcome for r in coordinator.reports] == ["out_of_memory"]
    trainer.fails = None
    await live(Coordinator(assign(2)), trainer)
    assert trainer.homes[-1] == b"<0>"


async def test_a_home_that_is_gone_is_none_with_a_warning(live, state, caplog):
    await live(Coordinator(assign(0)))
    (state / "home" / digest_of(b"<0>")).unlink()
    with caplog.at_level(logging.WARNING):
        trainer = await live(Coordinator(assign(1)))
    assert trainer.homes == [b""]
    assert "what was kept of run run is damaged or gone" in caplog.text


# --- what the device says it is -----------------------------------------------------------------


@pytest.mark.parametrize(("ditto", "tokens_per_s"), [(0.0, 1000.0), (0.1, 500.0)])
async def test_an_adapter_of_its_own_halves_the_rate_that_a_device_tells(live, ditto, tokens_per_s):
    coordinator = Coordinator(ProfileRequest("fp32", 16, 1, 2))
    await live(coordinator, personal={"ditto": ditto}, prepare=without_probing)
    measured = coordinator.profiles[-1].compute
    assert (measured.tokens_per_s, measured.forward_tokens_per_s) == (tokens_per_s, 3000.0)


def without_probing(agent):
    """The link is not measured: it takes seconds and says nothing here."""

    async def probe(metered):
        return LinkProfile(1e6, 1e6, 0.01, metered)

    agent.link.probe = probe
    agent.profiler.learn = lambda transfer: None  # loopback is not that link
    agent.link.on_transfer = lambda transfer: None


async def test_the_status_names_the_round_while_it_is_worked_on(live, state):
    seen = []

    class Watching(Trainer):
        async def run(self, job, progress=None):
            progress({"event": "progress", "step": 1, "loss": 2.5})
            seen.append(json.loads((state / "status.json").read_text()))
            return await super().run(job, progress)

    await live(Coordinator(dataclasses.replace(assign(3), rank=1)), Watching())
    assert {k: seen[0][k] for k in ("phase", "round", "k", "step", "loss")} == {
        "phase": "training", "round": 3, "k": 1, "step": 1, "loss": 2.5,
    }  # fmt: skip
    assert json.loads((state / "status.json").read_text())["phase"] == "finished"


# --- within its means ---------------------------------------------------------------------------

PROFILE = ProfileRequest("fp32", 16, 1, 2)


async def test_a_round_can_be_resumed_and_held_up(live, state):
    class Dying(Trainer):
        async def run(self, job, progress=None):
            self.jobs.append(job)
            assert json.loads(Path(job["control_path"]).read_text()) == {}
            Path(job["checkpoint_path"]).write_bytes(b"half of it")
            raise KilledError

    first = await live(Coordinator(assign(1)), Dying())
    kept = Path(first.jobs[0]["checkpoint_path"])
    assert kept == state / "work" / "run.1.ash.checkpoint" and kept.exists()

    class Resuming(Trainer):
        async def run(self, job, progress=None):
            self.found = Path(job["checkpoint_path"]).read_bytes()
            return await super().run(job, progress)

    (state / "work" / "run.0.ash.checkpoint").write_bytes(b"of another")
    second = await live(Coordinator(assign(1)), Resuming())
    assert second.found == b"half of it" and names(state / "work") == []


async def test_heartbeats_and_report_tell_heat_energy_and_waiting(live, monkeypatch):
    monkeypatch.setattr("edge_agent.agent.HEARTBEAT_S", 0.05)
    monkeypatch.setattr("edge_agent.watch.EVERY_S", 0.01)

    class Slow(Trainer):
        async def run(self, job, progress=None):
            progress({"event": "progress", "step": 1, "loss": 2.0, "tokens_per_s": 50.0,
                      "memory_bytes": 7})  # fmt: skip
            progress({"event": "paused", "why": "warm"})
            await asyncio.sleep(0.3)
            return await super().run(job, progress)

    def warm(agent):
        agent.activity = Calm(temperature_c=66.0, watts=10.0)

    coordinator = Coordinator(assign())
    await live(coordinator, Slow(), prepare=warm)
    last = coordinator.progress[-1]
    assert (last.step, last.steps, last.tokens_per_s, last.memory_bytes) == (1, 2, 50.0, 7)
    assert (last.temperature_c, last.paused) == (66.0, "warm") and last.joules > 0
    (report,) = coordinator.reports
    assert report.temperature_c == 66.0 and 1.0 < report.joules < 60.0


async def test_outside_its_hours_a_device_asks_for_nothing(live, state, monkeypatch):
    monkeypatch.setattr("edge_agent.agent.AWAY_S", 0.01)
    coordinator = Coordinator(assign())
    seen = []

    def by_day(agent):
        moments = [Readings(on_battery=True)] * 3 + [Readings(on_battery=False)]

        def read(waiting):
            if len(moments) > 1:
                seen.append((len(coordinator.profiles), (state / "status.json").read_text()))
                return moments.pop(0)
            return moments[0]

        agent.activity.read = read

    monkeypatch.setitem(CALM_S, Cause.BATTERY, 0)
    await live(coordinator, prepare=by_day)
    assert [profiles for profiles, _ in seen] == [0, 0, 0] and len(coordinator.reports) == 1
    assert "goes on when plugged in" in seen[-1][1]


async def test_an_assignment_beyond_the_days_budget_is_declined_with_the_figures(live):
    coordinator = Coordinator(assign(slice=(ref(UP), ref(DOWN), ref(SIDE))))

    def nearly_spent(agent):
        agent.budget.spend(10**6 - 200_000)

    await live(coordinator, prepare=nearly_spent, network={"daily_mb": 1})
    (report,) = coordinator.reports
    assert report.outcome == "crashed" and coordinator.fetched == []
    assert "needs 0.5 MB and today's data budget has 0.2 MB left" in report.message


async def test_a_budget_that_is_used_up_is_told_once_and_keeps_the_device_away(live, monkeypatch):
    monkeypatch.setattr("edge_agent.agent.AWAY_S", 0.01)
    coordinator = Coordinator(PROFILE, assign(), assign())
    looks = []

    def spending(agent):
        without_probing(agent)
        send = agent._send

        async def sending(entry):
            await send(entry)
            agent.budget.spend(10**7)

        read = agent.activity.read

        def reading(waiting):
            looks.append(agent.budget.left_bytes)
            if looks.count(0) > 3:
                agent.budget.daily_bytes = 10**9  # as if midnight had come
            return read(waiting)

        agent._send, agent.activity.read = sending, reading

    await live(coordinator, prepare=spending, network={"daily_mb": 10})
    budgets = [p.link.budget_bytes for p in coordinator.profiles if p.link is not None]
    assert budgets[:2] == [pytest.approx(10**7, rel=0.01), 0] and looks.count(0) > 3
    assert coordinator.profiles[-1].compute is not None, "a profile is always whole"


async def test_a_link_that_changed_is_told_again(live, state):
    coordinator = Coordinator(PROFILE, assign(0), assign(1))

    def slower(agent):
        without_probing(agent)
        send = agent._send

        async def sending(entry):
            await send(entry)
            for _ in range(10):
                type(agent.profiler).learn(agent.profiler, Transfer("up", 10**5, 8.0))

        agent._send = sending

    await live(coordinator, prepare=slower)
    told = [p.link for p in coordinator.profiles if p.link is not None]
    assert [round(link.up_bps, -4) for link in told] == [1e6, 0.11e6, 0.1e6][: len(told)]
    assert told[0].variation == 0 and 0 < told[1].variation < 1 and told[1].down_bps == 1e6
    again = Coordinator(assign(2))
    await live(again, prepare=without_probing)
    assert [p.compute for p in again.profiles] == [None], "the coordinator still has it"
    kept = json.loads((state / "profile.json").read_text())
    assert kept["estimate"]["up_bps"] == pytest.approx(0.11e6, rel=0.2)


@pytest.mark.parametrize(("metered", "told"), [("yes", True), ("no", False)])
async def test_a_metered_link_is_told(live, metered, told):
    coordinator = Coordinator(PROFILE)
    await live(coordinator, prepare=without_probing, network={"metered": metered})
    assert coordinator.profiles[-1].link.metered is told


@pytest.mark.parametrize("text", ["{", "{}", '{"route": "", "measured": {}, "estimate": {}}'])
async def test_a_damaged_memory_of_measurements_costs_nothing(live, state, text):
    state.mkdir()
    (state / "profile.json").write_text(text)
    coordinator = Coordinator(assign())
    await live(coordinator)
    assert len(coordinator.reports) == 1


async def test_a_new_state_folder_is_private(live, state):
    await live(Coordinator())
    assert state.stat().st_mode & 0o777 == 0o700


async def test_what_moves_is_timed_and_charged(live):
    heard, links = [], []

    def listening(agent):
        links.append(agent)
        agent.link.on_transfer = heard.append

    await live(Coordinator(assign(slice=(ref(UP), ref(DOWN)))), prepare=listening)
    (agent,) = links
    assert [t.direction for t in heard] == ["down"], "one chunk alone cannot be timed"
    assert heard[0].size_bytes == len(DOWN) - 100_000 and heard[0].duration_s > 0
    payload = len(UP) + len(DOWN)
    assert payload < agent.link.moved_bytes < 1.1 * payload + 10_000
    assert agent.budget.left_bytes is None


async def test_a_push_is_timed_between_its_acknowledgements(live):
    class Large(Trainer):
        async def run(self, job, progress=None):
            result = await super().run(job, progress)
            Path(job["update_path"]).write_bytes(bytes(range(256)) * 2000)
            return result

    heard = []
    coordinator = Coordinator(assign())
    await live(coordinator, Large(),
               prepare=lambda agent: setattr(agent.link, "on_transfer", heard.append))  # fmt: skip
    (transfer,) = heard
    assert transfer.direction == "up" and 0 < transfer.size_bytes < 512_000
    assert sum(map(len, coordinator.pushed)) == 512_000


async def test_a_report_tells_how_long_there_was_no_work_and_what_a_break_cost(live):
    class Breaking(Coordinator):
        async def NextTask(self, request, context):
            if self.tasks and not request.working_on:
                await asyncio.sleep(0.3)
            return await super().NextTask(request, context)

        async def Fetch(self, request, context):
            first = not self.fetched
            async for chunk in super().Fetch(request, context):
                if first and chunk.offset:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
                yield chunk

    def sent_twice(agent):
        real = agent.link.fetch

        async def fetch(blob, folder):
            agent.link.resent_bytes += 7
            return await real(blob, folder)

        agent.link.fetch = fetch

    coordinator = Breaking(assign(slice=(ref(SIDE),)), assign(1, slice=(ref(SIDE),)))
    await live(coordinator, prepare=sent_twice)
    first, second = coordinator.reports
    assert 0.25 < first.wait_s < 5 and 0.25 < second.wait_s < 5
    assert first.resumes == 1 and first.resent_bytes >= 7
    assert second.resumes == 0 and second.resent_bytes == 7, "of its own round alone"


async def test_time_away_is_no_wait(live, monkeypatch):
    from edge_agent import agent as module

    monkeypatch.setattr(module, "AWAY_S", 0.5)
    monkeypatch.setitem(CALM_S, Cause.BATTERY, 0)

    class Unplugged:
        looks = 0

        def read(self, waiting):
            self.looks += 1
            return Readings(on_battery=self.looks == 1)

    coordinator = Coordinator(assign())
    await live(coordinator, prepare=lambda agent: setattr(agent, "activity", Unplugged()))
    (report,) = coordinator.reports
    assert report.wait_s < 0.4
