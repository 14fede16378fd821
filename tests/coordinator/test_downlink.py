"""Devices hold what the coordinator thinks they hold, closer to the model and for fewer bytes."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from coordinator.downlink import Downlink, cuts_of
from coordinator.issuing import recorded_plans
from coordinator.lowrank import Bundle
from coordinator.methods import ModuleState
from coordinator.serve import load_recorded
from coordinator.state import StateReader, StateWriter
from coordinator.store.blobs import BlobStore
from edge_agent.mirror import Mirror
from profiles.model import ModuleShape
from protos.contract import AdapterSpec, Assignment, Payload
from protos.layout import packed_bytes
from protos.mirror import slice_of, whole_of
from protos.packing import pack
from protos.sketch import initial_down, slice_rows
from protos.unpacking import unpack

RANK = 8
MODULES = tuple(ModuleShape(f"layer.{i}", 48, 64 + 16 * i) for i in range(3))
SPEC = AdapterSpec("run", "b", "", "d", RANK, 16.0, False, 3, MODULES)
TABLE = ModuleShape("table", 500, 24)


def a_task(round_, k=RANK, **changes):
    facts = {
        "assignment_id": f"run.{round_}.ash", "run_id": "run", "round": round_,
        "device_id": "ash", "method": "fslora", "rank": k, "rows": "stratified",
        "sketch_offset": 0, "alpha": 16.0, "trained": ("up", "down"), "personal": (),
        "keeps_basis": True, "keeps_state": False, "error_feedback": False, "fresh": False,
        "precision": "fp32", "sequence_tokens": 16, "micro_batch": 1, "accumulation": 1,
        "checkpointing": False, "local_steps": 2, "learning_rate": 0.1, "optimizer": "sgd",
        "update": Payload(k, "int8"), "evaluation_sequences": 1, "held_out_share": 0.1,
        "evaluates_global": False, "seed": 1, "deadline_s": 60.0, "reason": "",
    }  # fmt: skip
    return Assignment(**(facts | changes))


def first_model(spec=SPEC):
    """What every run starts from."""
    model = {
        m.name: {
            "up": np.zeros((spec.rank, m.out_features), np.float32),
            "down": initial_down(spec.seed, m.name, spec.rank, m.in_features),
        }
        for m in spec.modules
    }  # fmt: skip
    return model | {t.name: {"dense": np.zeros((t.out_features, t.in_features), np.float32)}
                    for t in spec.dense}  # fmt: skip


def moved(model, rng, size):
    """After a round that changed every value."""
    return {
        name: {part: (v + size * rng.normal(size=v.shape)).astype(np.float32)
               for part, v in parts.items()}
        for name, parts in model.items()
    }  # fmt: skip


class Ends:
    """A coordinator's store and a device's disk, and the bytes between them."""

    def __init__(self, folder, *, slice_="bfloat16", whole="bfloat16", spec=SPEC):
        self.spec, self.slice, self.whole, self.folder = spec, slice_, whole, folder
        folder.mkdir(exist_ok=True)
        self.blobs = BlobStore(folder / "blobs")
        self.downlink = Downlink(spec, self.blobs)
        self.device = Mirror(folder / "device")
        self.held = None  # the coordinator's view of the device
        self.parts = ("up", "down", "dense") if spec.dense else ("up", "down")

    def reader(self, model):
        writer = StateWriter(self.spec, ("up", "down"), lambda role: self.blobs.draft())
        for m in self.spec.modules:
            pair = model[m.name]
            writer.write(m.name, ModuleState(Bundle(pair["up"], pair["down"], 2.0)))
        for t in self.spec.dense:
            writer.write_dense(t.name, (model[t.name]["dense"], {}))
        return StateReader(self.spec, writer.finish())

    def sent(self, model, task):
        """The assignment with its step, not taken yet."""
        cuts = cuts_of(task, self.spec, self.parts, self.slice, self.whole)
        step = self.downlink.step(self.reader(model), task, self.parts, cuts, self.held)
        self.held = step.result
        return dataclasses.replace(task, mirror=step)

    def fetch(self, blobs):
        for blob in blobs:
            (self.folder / blob.digest).write_bytes(self.blobs.path(blob.digest).read_bytes())
        return sum(blob.size_bytes for blob in blobs)

    def deliver(self, model, task):
        """(the assignment, bytes fetched): after it the device holds what was meant."""
        task = self.sent(model, task)
        size = self.fetch(self.device.wanted(task.mirror))
        self.device.take(self.spec, task, self.folder)
        assert self.device.digest == self.held.digest
        return task, size

    def error(self, model, task):
        """||held - model|| / ||model|| over the whole adapter."""
        held = whole_of(self.spec, task, self.device.path)
        return relative(model, held)


def relative(model, other):
    off = sum(float(np.square(v - other[n][p]).sum()) for n, ps in model.items()
              for p, v in ps.items())  # fmt: skip
    return (
        off / sum(float(np.square(v).sum()) for ps in model.values() for v in ps.values())
    ) ** 0.5


@pytest.fixture
def ends(tmp_path):
    made = []

    def of(**options):
        made.append(Ends(tmp_path / f"ends-{len(made)}", **options))
        return made[-1]

    return of


def test_the_adapter_that_a_run_starts_from_costs_nothing(ends):
    on = ends()
    task, size = on.deliver(first_model(), a_task(0, evaluates_global=True))
    assert size == 0 and task.mirror.files == () and on.error(first_model(), task) == 0.0


def sent_whole(want, k, encoding):
    """The same rows as a whole file brings them."""
    payload = Payload(k, encoding)
    return unpack(pack(SPEC, payload, want), SPEC, payload)


@pytest.mark.parametrize(("encoding", "k"), [("bfloat16", RANK), ("int8", 3), ("int4", RANK)])
def test_fifty_rounds_of_differences_are_closer_than_whole_files_and_fewer_bytes(ends, encoding, k):
    on, rng = ends(slice_=encoding, whole=encoding), np.random.default_rng(0)
    model, spent, full = moved(first_model(), rng, 0.05), 0, 0
    ours, theirs = [], []
    for round_ in range(50):
        model = moved(model, rng, 0.004 * 0.8 ** max(0, round_ - 25))  # it settles
        task, size = on.deliver(model, a_task(round_, k))
        spent, full = spent + size, full + packed_bytes(SPEC, Payload(k, encoding))
        rows = {m.name: slice_rows(SPEC, task, m.name) for m in MODULES}
        want = {n: {p: v[rows[n]] for p, v in ps.items()} for n, ps in model.items()}
        ours.append(relative(want, slice_of(SPEC, task, on.device.path)))
        theirs.append(relative(want, sent_whole(want, k, encoding)))
    assert spent < 0.9 * full, f"{spent} bytes where whole files take {full}"
    assert np.mean(ours) < np.mean(theirs)
    if encoding != "bfloat16":
        assert ours[-1] < 0.25 * theirs[-1], "what was lost before has been sent since"


def test_asked_for_two_bits_differences_go_as_signs_with_few_scales_and_still_catch_up(ends):
    on, rng = ends(slice_="int2", whole="int2"), np.random.default_rng(0)
    model, sizes, off = moved(first_model(), rng, 0.05), [], []
    for round_ in range(40):
        model = moved(model, rng, 0.002 if round_ < 20 else 0.0)
        task, size = on.deliver(model, a_task(round_))
        sizes.append(size)
        off.append(on.error(model, task))
        if round_ == 0:  # it lacks the model itself: no coarser than whole rows in four bits
            assert off[0] < 0.2 and all(
                f.blob.payload.encoding != "sign" for f in task.mirror.files
            )
        elif size:
            assert {f.blob.payload.encoding for f in task.mirror.files} == {"sign"}
            assert {f.blob.payload.group for f in task.mirror.files} == {512}
            assert not any(f.blob.payload.compressed for f in task.mirror.files), "no table"
    values = RANK * SPEC.parameters_per_rank
    assert max(sizes[1:]) < 1.35 / 8 * values + 200, "a bit a value, and a scale a row of 48 or so"
    assert max(off[1:20]) < 0.2, "what is lost is sent with the next ones"
    assert off[-1] < 0.1 * off[19]


def test_signs_get_more_scales_where_a_few_would_lose_too_much(ends):
    spec = dataclasses.replace(SPEC, modules=(ModuleShape("wide", 1024, 1024),))
    alike = np.full(1024, 0.02)
    bursts = np.where(np.arange(1024) // 64 % 8 == 0, 0.14, 0.002)  # a group of 64 in each 512
    for changes, group in ((alike, 512), (bursts, 64)):
        on, rng = ends(spec=spec), np.random.default_rng(7)
        task, _ = on.deliver(moved(first_model(spec), rng, 0.2), a_task(0))
        held = whole_of(spec, task, on.device.path)
        on.slice = on.whole = "int4"
        task, _ = on.deliver(moved(held, rng, changes), a_task(1))
        found = {(f.blob.payload.encoding, f.blob.payload.group) for f in task.mirror.files}
        assert found == {("sign", group)}


def test_over_fifty_changing_sketches_what_was_sent_and_what_is_owed_make_the_model(ends):
    on, rng = ends(slice_="int4", whole="int4"), np.random.default_rng(1)
    model, sent = moved(first_model(), rng, 0.05), first_model()
    for round_ in range(50):
        model = moved(model, rng, 0.003)
        task, _ = on.deliver(model, a_task(round_, k=3))
        for file in task.mirror.files:  # the bytes themselves, without the code under test
            data = on.blobs.path(file.blob.digest).read_bytes()
            for name, parts in unpack(data, SPEC, file.blob.payload).items():
                rows = slice_rows(SPEC, task, name)
                for part, values in parts.items():
                    sent[name][part][rows] = values + (sent[name][part][rows] if file.adds else 0)
        held = whole_of(SPEC, task, on.device.path)
        for name, parts in model.items():
            for part, values in parts.items():
                np.testing.assert_array_equal(held[name][part], sent[name][part])
                owed = values - held[name][part]
                np.testing.assert_allclose(sent[name][part] + owed, values, rtol=1e-6, atol=1e-8)
    assert on.error(model, task) < 0.2, "also of rows that were sent rounds ago"


def test_a_part_that_rests_costs_nothing(ends):
    on, rng = ends(), np.random.default_rng(2)
    model = first_model()
    for round_ in range(3):
        for parts in model.values():
            parts["up"] += 0.01 * rng.normal(size=parts["up"].shape).astype(np.float32)
        task, _ = on.deliver(model, a_task(round_))
        assert {f.blob.payload.parts for f in task.mirror.files} == {("up",)}
    again, size = on.deliver(model, a_task(3))
    assert size == 0 and again.mirror.result == again.mirror.base


@pytest.mark.parametrize("encoding", ["bfloat16", "int8", "int4"])
def test_rows_that_mean_something_else_are_sent_anew_and_cost_no_more_than_before(ends, encoding):
    on, rng = ends(slice_=encoding), np.random.default_rng(3)
    for round_ in range(3):
        model = moved(first_model(), rng, 1.0)
        model = {n: {p: v[::-1] for p, v in ps.items()} for n, ps in model.items()}
        task, size = on.deliver(model, a_task(round_))
        assert size <= 1.02 * packed_bytes(SPEC, Payload(RANK, encoding)) + 600, "headers, tables"
        got = slice_of(SPEC, task, on.device.path)
        assert relative(model, got) <= 1.02 * relative(model, sent_whole(model, RANK, encoding))


def test_a_few_rows_of_a_large_table_are_not_overlooked(ends):
    spec = dataclasses.replace(SPEC, dense=(TABLE,))
    on, rng = ends(spec=spec), np.random.default_rng(4)
    model = first_model(spec)
    seen = model[TABLE.name]["dense"]
    for round_ in range(6):
        seen[rng.integers(0, len(seen), 2)] += rng.normal(size=(2, 24)).astype(np.float32)
        task, size = on.deliver(model, a_task(round_))
        assert 0 < size < 0.25 * packed_bytes(spec, Payload(RANK, "bfloat16", ("dense",)))
        off = np.abs(whole_of(spec, task, on.device.path)[TABLE.name]["dense"] - seen)
        assert off.max() < 2**-7 * np.abs(seen).max()


def test_large_modules_do_not_outshout_small_ones(ends):
    on, rng = ends(slice_="int8"), np.random.default_rng(5)
    model = moved(first_model(), rng, 0.05)
    small = MODULES[1].name
    for parts in model.values():
        parts["down"] *= 1000
    model[small]["down"] /= 1e6
    for round_ in range(5):
        model[small]["down"] += (
            0.1 * np.abs(model[small]["down"]).mean() * rng.normal(size=model[small]["down"].shape)
        ).astype(np.float32)
        task, _ = on.deliver(model, a_task(round_))
        got = slice_of(SPEC, task, on.device.path)
        assert relative({small: model[small]}, got) < 0.05


# --- whole runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fslora", "hetlora", "flexlora", "fed-sb"])
async def test_a_run_ends_in_the_same_bits_when_the_coordinator_dies_in_every_round(
    harness, impatient, tmp_path, name
):
    method = {"method": {"name": name}}
    async with harness.fleet(tmp_path / "calm", mirrored=True, **method) as fleet:
        given = await fleet.finish()
        want, plans = fleet.coordinator.digests(), fleet.coordinator.records.assignments("run")
        assert all(a.mirror is not None for tasks in given.values() for a in tasks)
        assert any(a.mirror.base is not None for tasks in given.values() for a in tasks)
    (tmp_path / "plans.json").write_text(json.dumps(recorded_plans(plans)))
    recorded = load_recorded(tmp_path / "plans.json")
    async with harness.fleet(tmp_path / "not", mirrored=True, recorded=recorded, **method) as fleet:
        for _ in range(3):
            taken = await fleet.take()
            for number, device in enumerate(taken):
                await fleet[device].deliver(*taken[device])
                if number == 0:
                    await fleet.restart()
        await fleet.coordinator.until(
            lambda: fleet.coordinator.digests()[-1] is not None, "the last merge"
        )
        assert fleet.coordinator.digests() == want


async def test_who_delivered_is_known_to_hold_its_mirror_before_it_polls_again(harness, tmp_path):
    async with harness.fleet(tmp_path, mirrored=True) as fleet:
        await fleet.round()
        run = fleet.coordinator
        await run.until(lambda: (run.state.round, run.state.phase) == (1, "open"), "round 1")
        for name in fleet.devices:
            before, after = (run.assignment(r, name).assignment.mirror for r in (0, 1))
            assert after.base == before.result
        fleet["birch"].mirror.clear()  # too late to say so
        await fleet.round()
        await run.until(lambda: run.digests()[2] is not None, "the merge of round 1")
        assert {run.assignment(1, name).state for name in fleet.devices} == {"arrived"}
