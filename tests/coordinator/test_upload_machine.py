"""Rounds and uploads under every order of events that Hypothesis finds, against the real engine.

Devices begin, send, send again, send wrongly, commit, report, fall silent and come late; the
coordinator is killed and starts again; time passes. What was promised is kept by the test itself
and compared after every step.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import tempfile
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from coordinator import rounds
from coordinator.engine import Engine
from coordinator.serve import build_spec, open_state
from protos.contract import LocalReport, Reason, RefusalError
from protos.transfer import crc32

NAMES = ("ash", "birch", "cedar")
names = st.sampled_from(NAMES)
kinds = st.sampled_from([0, 0, 0, 1, 2])  # of an update: a good one, another good one, garbage
ways = st.sampled_from(["on", "on", "all", "all", "again", "ahead", "corrupt", "beyond"])
rarely = st.sampled_from([False] * 7 + [True])


def make_machine(harness):
    """The machine over the harness's small base."""

    class Uploads(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.folder = Path(tempfile.mkdtemp())
            base = harness.write_base(harness.BASES / "8", harness.SMALL)
            self.config = harness.make_config(
                base, self.folder / "state", round={"min_devices": 2, "late_rounds": 1},
                run={"rounds": 4}, evaluation={"every_rounds": 100},
            )  # fmt: skip
            self.clock = harness.Clock()
            self.loop = asyncio.new_event_loop()
            self.start()
            self.tasks = {}  # device -> its newest assignment
            self.begun = {}  # (device, digest) -> (assignment id, upload id, bytes)
            self.held = {}  # upload id -> bytes that it should hold
            self.receipts = {}  # assignment id, when its round was opened -> digest
            self.merged = {}  # assignment id -> the round that it was merged in

        def start(self):
            spec, shape = build_spec(self.config, Path(self.config.model.base))
            self.records, self.blobs = open_state(self.config.server.state)
            self.threads = ThreadPoolExecutor(2)
            self.loop.set_default_executor(self.threads)
            self.engine = Engine(self.config, spec, shape, self.records, self.blobs,
                                 clock=self.clock)  # fmt: skip
            self.profile = harness.make_profile(spec.base_digest)

        def stop(self):
            self.settle()
            self.threads.shutdown()
            self.engine._intake._threads.shutdown()
            self.records.close()

        def do(self, awaitable):
            return self.loop.run_until_complete(awaitable)

        def settle(self):
            """Lets plans and merges that are under way come to their end."""

            async def until_idle():
                while self.engine._work:
                    await asyncio.wait(set(self.engine._work))
                    await asyncio.sleep(0)

            self.do(until_idle())
            assert self.engine._failure is None, self.engine._failure

        def feed(self, event):
            async def feeding():
                self.engine._feed(event)

            self.do(feeding())
            self.settle()

        def opened(self, assignment_id):
            number = int(assignment_id.split(".")[1])
            found = self.records.all_rounds(self.engine.spec.run_id)
            return next(r.opened_at for r in found if r.round == number)

        def update(self, name, kind):
            """(assignment, bytes) of an update."""
            a = self.tasks[name]
            zeros = {m.name: {"up": np.zeros((a.rank, m.out_features), np.float32),
                              "down": np.zeros((a.rank, m.in_features), np.float32)}
                     for m in self.engine.spec.modules}  # fmt: skip
            delta = harness.make_delta(zeros, a.seed + kind)
            place = types.SimpleNamespace(folder=self.folder)
            path = harness.Device.write_update(place, self.engine.spec, a, delta)
            data = path.read_bytes()
            return a, bytes(len(data)) if kind == 2 else data

        def refused(self, call, *reasons):
            """The reason that a call was refused for; None if it was not."""
            try:
                return None, call()
            except RefusalError as error:
                assert error.reason in reasons, f"{error.reason}: {error}"
                return error.reason, None

        # --- what happens -----------------------------------------------------------------------

        @rule(name=names)
        def poll(self, name):
            task = self.do(self.engine.next_task(name, self.profile, "", 0.0))
            self.settle()
            if task.kind == "assignment":
                self.tasks[name] = task.assignment

        @precondition(lambda self: self.tasks)
        @rule(name=names, kind=kinds, foreign=rarely)
        def begin(self, name, kind, foreign=False):
            whose = NAMES[NAMES.index(name) - foreign]
            if whose not in self.tasks:
                return
            a, data = self.update(whose, kind)
            digest = hashlib.sha256(data).hexdigest()
            reason, answer = self.refused(
                lambda: self.do(self.engine.begin_push(name, a.assignment_id, digest, len(data))),
                Reason.UNKNOWN_ASSIGNMENT, Reason.TOO_LATE, Reason.EQUIVOCATION,
            )  # fmt: skip
            if name != whose:
                assert reason is Reason.UNKNOWN_ASSIGNMENT, "a device acted as another"
            if answer is None:
                return
            upload_id, durable = answer
            # Its row is awaited at commit only; after a crash without it, the push begins anew.
            self.do(self.engine._intake._growing[upload_id].recorded)
            for other in [u for u, at in self.held.items() if at[0] == a.assignment_id]:
                if other != upload_id:
                    del self.held[other]  # one upload of an assignment at a time
            key = a.assignment_id, self.opened(a.assignment_id)
            known = self.receipts.get(key) == digest or self.blobs.holds(digest)
            expected = len(data) if known else self.held.get(upload_id, ("", 0))[1]
            assert durable == expected, "it resumes at the wrong byte"
            self.begun[name, kind] = (a, upload_id, data)
            self.held[upload_id] = a.assignment_id, durable

        @precondition(lambda self: self.begun)
        @rule(name=names, kind=kinds, way=ways)
        def put(self, name, kind, way):
            if (name, kind) not in self.begun:
                return
            a, upload_id, data = self.begun[name, kind]
            held = self.held.get(upload_id, ("", 0))[1]
            size = max(1, len(data) // 3)
            offset = {"again": max(0, held - size), "ahead": held + 1}.get(way, held)
            piece = data[offset:] if way == "all" else data[offset : offset + size]
            if way == "beyond":
                piece += bytes(len(data) - offset - len(piece) + 1)
            checksum = crc32(piece) ^ (way == "corrupt")
            reason, now = self.refused(
                lambda: self.engine.put_chunk(name, upload_id, offset, piece, checksum),
                Reason.UNKNOWN_UPLOAD, Reason.WRONG_OFFSET, Reason.CORRUPT_CHUNK,
            )  # fmt: skip
            if way == "corrupt":
                assert reason is not None, "a corrupt chunk was taken"
            if now is not None:
                assert now == max(held, offset + len(piece)), "bytes were lost or made up"
                self.held[upload_id] = a.assignment_id, now

        @precondition(lambda self: self.begun)
        @rule(name=names, kind=kinds)
        def commit(self, name, kind):
            if (name, kind) not in self.begun:
                return
            a, upload_id, data = self.begun[name, kind]
            digest = hashlib.sha256(data).hexdigest()
            reason, answer = self.refused(
                lambda: self.do(self.engine.commit_push(name, upload_id)),
                Reason.UNKNOWN_UPLOAD, Reason.DIGEST_MISMATCH, Reason.TOO_LATE, Reason.BAD_UPDATE,
                Reason.EQUIVOCATION, Reason.UNKNOWN_ASSIGNMENT,
            )  # fmt: skip
            self.settle()
            if reason in (Reason.BAD_UPDATE, Reason.DIGEST_MISMATCH, Reason.UNKNOWN_ASSIGNMENT):
                self.held.pop(upload_id, None) if reason is not Reason.DIGEST_MISMATCH else None
            if answer is None:
                return
            assert kind != 2, "garbage was accepted"
            assert answer[0] == f"{a.assignment_id}:{digest}"
            assert self.records.assignment(a.assignment_id).update_digest == digest
            key = a.assignment_id, self.opened(a.assignment_id)
            assert self.receipts.setdefault(key, digest) == digest, "two receipts for it"

        @precondition(lambda self: self.tasks)
        @rule(name=names, foreign=rarely)
        def report(self, name, foreign=False):
            whose = NAMES[NAMES.index(name) - foreign]
            if whose not in self.tasks:
                return
            a = self.tasks[whose]
            done = LocalReport(a.assignment_id, "done", train_examples=5)

            async def reporting():
                self.engine.report(name, done)

            reason, _ = self.refused(lambda: self.do(reporting()), Reason.UNKNOWN_ASSIGNMENT)
            self.settle()
            if name != whose:
                assert reason is Reason.UNKNOWN_ASSIGNMENT, "a device reported for another"

        @rule(name=names, steps=st.integers(2, 6))
        def work(self, name, steps):
            """What an honest device does, up to some step."""
            deeds = [self.poll, self.begin, self.put, self.commit, self.report]
            for deed in deeds[:steps]:
                given = {self.begin: (0,), self.put: (0, "all"), self.commit: (0,)}
                deed(name, *given.get(deed, ()))

        @rule(delivering=st.sets(names, min_size=1))
        def everybody(self, delivering):
            """All poll, so that a round opens; some deliver."""
            for name in NAMES:
                self.poll(name)
            for name in sorted(delivering):
                self.work(name, 5)

        @rule()
        def restart(self):
            self.stop()
            self.start()

        @rule(seconds=st.sampled_from([1.0, 6.0, 20.0]))
        def wait(self, seconds):
            self.clock.now += seconds
            self.feed(rounds.Tick(self.clock()))

        # --- what holds -------------------------------------------------------------------------

        @invariant()
        def receipts_stand_and_are_on_disk(self):
            for (assignment_id, opened), digest in self.receipts.items():
                record = self.records.assignment(assignment_id)
                if self.opened(assignment_id) != opened:
                    assert record is None or record.merged_in is None or opened < self.clock()
                    continue  # nobody delivered; the round began anew
                assert record.update_digest == digest, "a receipt was given and forgotten"
                if record.merged_in is None and record.assignment.round >= self.engine.state.round:
                    stored = self.blobs.path(digest).read_bytes()
                    assert hashlib.sha256(stored).hexdigest() == digest

        @invariant()
        def what_is_merged_has_a_receipt_and_is_merged_once(self):
            run_id = self.engine.spec.run_id
            closed = {r.round: r.detail for r in self.records.all_rounds(run_id)
                      if r.phase == "merged"}  # fmt: skip
            for record in self.records.assignments(run_id):
                assignment_id = record.assignment.assignment_id
                if record.merged_in is None:
                    assert assignment_id not in self.merged, "a merge was forgotten"
                    continue
                before = self.merged.setdefault(assignment_id, record.merged_in)
                assert before == record.merged_in, "an update counted twice"
                assert record.report is not None
                if record.assignment.trains:
                    key = assignment_id, self.opened(assignment_id)
                    assert self.receipts[key] == record.update_digest
                detail, device = closed[record.merged_in], record.assignment.device_id
                on_time = record.assignment.round == record.merged_in
                late = [tuple(pair) for pair in detail["late"]]
                assert on_time == (device in detail["on_time"])
                assert on_time or (device, record.assignment.round) in late

        @invariant()
        def of_an_assignment_at_most_one_upload_takes_room(self):
            there = {upload_id: (self.blobs.root / "uploads" / upload_id).stat().st_size
                     for upload_id in self.blobs.parts()}  # fmt: skip
            owners = [self.records.upload(upload_id) for upload_id in there]
            assert all(size <= owner.size_bytes for owner, size in
                       zip(owners, there.values(), strict=True))  # fmt: skip
            assert len({owner.assignment_id for owner in owners}) == len(owners)

        def teardown(self):
            self.stop()
            self.loop.close()
            shutil.rmtree(self.folder)

    return Uploads


def play(harness, examples, steps):
    """So many runs of so many steps."""
    chosen = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=True,
        suppress_health_check=list(HealthCheck), database=None,
    )  # fmt: skip
    run_state_machine_as_test(make_machine(harness), settings=chosen)


def test_whatever_comes_in_whatever_order_every_receipt_is_kept_and_counts_once(harness):
    play(harness, 6, 25)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_same_for_longer(harness):
    play(harness, 150, 60)
