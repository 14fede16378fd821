"""Every method through the whole loop: planned, issued, trained, merged, replayed, restarted."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator.cli import main as command_line
from coordinator.issuing import recorded_plans
from coordinator.merge import Merger, StoredUpdate
from coordinator.methods import METHODS, MethodOptions, RowMethod, make
from coordinator.report import build_report, error_table
from coordinator.serve import load_recorded
from coordinator.state import StateFile
from coordinator.weights import AFL, Voice, WeightOptions
from profiles.model import base_tensor
from protos.contract import Payload
from protos.layout import expected_bytes, packed_bytes

ROUNDS = 3
WHOLE = ("model.norm", "lm_head")  # tensors that are trained whole beside every adapter
every_method = pytest.mark.parametrize("name", METHODS)

# Three ks (or densities) within a round of 10 s: one device computes slowly, one sends slowly.
UNEQUAL = {
    "ash": {},
    "birch": {"tokens_per_s": 170.0},
    "cedar": {"up_bps": 2200.0, "down_bps": 1e6},
}


def method_of(name):
    return make(name, MethodOptions(rank=8))


def varies(name):
    return METHODS[name].heterogeneous or method_of(name).density < 1


def setting(name):
    """Everything that a run remembers between rounds at once: weights, moments, dense tensors."""
    sections = {
        "method": {"name": name},
        "model": {"modules_to_save": WHOLE},
        "fairness": {"weights": "afl", "step": 0.05},
        "run": {"rounds": ROUNDS},
    }
    if issubclass(METHODS[name], RowMethod):
        sections["server_optimizer"] = {"name": "momentum", "learning_rate": 0.8}
    return {**sections, "profiles": UNEQUAL if varies(name) else {}}


@dataclass
class Finished:
    """What an undisturbed run left."""

    digests: list
    recorded: dict
    given: list
    rounds: list
    spec: object
    report: object
    readers: list
    state: object


@pytest.fixture(scope="session")
def first_run(harness, tmp_path_factory):
    """An undisturbed run of each method, finished when it is first asked for."""
    known = {}

    async def of(name):
        if name not in known:
            folder = tmp_path_factory.mktemp(f"first-{name}")
            async with harness.fleet(folder, **setting(name)) as fleet:
                await fleet.finish()
                run = fleet.coordinator
                given = run.records.assignments("run")
                (folder / "plans.json").write_text(json.dumps(recorded_plans(given)))
                readers = [run.reader(v) for v in range(ROUNDS + 1)]
                known[name] = Finished(
                    run.digests(), load_recorded(folder / "plans.json"), given,
                    run.records.all_rounds("run"), run.engine.spec,
                    build_report(run.records, "run"), readers, run.config.server.state,
                )  # fmt: skip
        return known[name]

    return of


# --- one run ------------------------------------------------------------------------------------


@every_method
async def test_a_run_finishes_and_every_update_counts(first_run, name):
    run = await first_run(name)
    assert len(run.given) == 3 * (ROUNDS + 1) and len(run.rounds) == ROUNDS + 1
    for record in run.given:
        a = record.assignment
        assert record.complete and record.state == "arrived"
        assert record.merged_in == (a.round if a.trains else None)
    assert len(set(run.digests)) == ROUNDS + 1, "every round was to change the model"
    assert all(not r.detail.get("dropped") for r in run.rounds)
    shares = {(a.assignment.rank, a.assignment.update.density) for a in run.given
              if a.assignment.trains}  # fmt: skip
    assert (len(shares) > 1) == varies(name), "unequal devices were to get unequal parts"
    for row in run.report.rows:
        values = 8 * run.spec.parameters_per_rank + 32 * 8 + 8  # adapter, lm_head, model.norm
        assert row.dense_bytes == ROUNDS * 4 * values and row.compression > 1
        assert row.rounds_joined == ROUNDS and row.loss_first is not None
        assert row.loss_last is not None


@every_method
async def test_a_device_sends_the_bytes_of_what_its_method_declares(first_run, name):
    run, method = await first_run(name), method_of(name)
    for record in (r for r in run.given if r.assignment.trains):
        a = record.assignment
        parts = (*method.sent(a.round), "dense")
        assert a.update == Payload(a.rank, "int8", parts, a.update.density)
        assert record.update_bytes <= packed_bytes(run.spec, a.update)
        if a.update.density == 1:
            assert record.update_bytes == packed_bytes(run.spec, a.update)
        planned = record.predicted["predicted"]["up_bytes"]
        assert planned == expected_bytes(run.spec, a.update)
        assert abs(planned - record.update_bytes) <= (0 if a.update.density == 1 else 0.2 * planned)
        assert a.trained == (*method.trained(a.round), "dense")
        assert not set(a.personal) & set(a.update.parts), "what is personal was to stay at home"


@every_method
async def test_a_device_fetches_the_bytes_that_were_planned(first_run, name):
    run, method = await first_run(name), method_of(name)
    for record in (r for r in run.given if r.assignment.trains):
        a = record.assignment
        files = (*method.files(a.round), ("dense",))
        assert [b.payload.parts for b in a.slice] == list(files)
        for blob in (*a.slice, *a.global_adapter):
            assert blob.size_bytes <= packed_bytes(run.spec, blob.payload)
            if blob.payload.density == 1:
                assert blob.size_bytes == packed_bytes(run.spec, blob.payload)
        # No file twice; what a device still holds from the round before need not be planned for.
        before = next((r.assignment for r in run.given if r.assignment.device_id == a.device_id
                       and r.assignment.round == a.round - 1), None)  # fmt: skip
        held = set(before.blobs) if before else set()
        fetched = sum(expected_bytes(run.spec, blob.payload) for blob in a.blobs)
        fresh = sum(expected_bytes(run.spec, b.payload) for b in a.blobs if b not in held)
        assert fresh <= record.predicted["predicted"]["down_bytes"] <= fetched
        if not held & set(a.blobs):
            assert record.predicted["predicted"]["down_bytes"] == fetched


@every_method
async def test_the_aggregation_error_is_told_by_module_and_overall(first_run, name):
    run = await first_run(name)
    modules = {m.name for m in run.spec.modules}
    for record in run.rounds[:ROUNDS]:
        error, errors = (record.detail[k] for k in ("aggregation_error", "aggregation_errors"))
        if not METHODS[name].has_global:
            assert error is None and errors == {}
            continue
        assert set(errors) == modules and record.detail["aggregation_error_exact"] is True
        assert all(math.isfinite(e) and e >= 0 for e in errors.values())
        assert min(errors.values()) <= error <= max(errors.values()) + 1e-12
    kinds = {row[0] for row in error_table(run.report)}
    assert kinds == ({m.rpartition(".")[2] for m in modules} if METHODS[name].has_global else set())


@every_method
async def test_weights_and_moments_are_remembered_from_round_to_round(first_run, name):
    run = await first_run(name)
    memory = {}
    for number, record in enumerate(run.rounds[:ROUNDS]):
        given = [a for a in run.given if a.assignment.round == number]
        voices = [
            Voice(a.assignment.device_id, a.report.train_examples,
                  a.report.evaluation("slice", "received").loss)
            for a in given
        ]  # fmt: skip
        before = memory
        weights, memory = AFL(WeightOptions(step=0.05)).weigh(voices, before)
        assert record.detail["weight_memory"] == memory != before
        assert list(record.detail["weights"].values()) == weights
    roles = {role for role, _ in run.digests[-1]}
    assert ("moment.first" in roles) == issubclass(METHODS[name], RowMethod)


@every_method
async def test_tensors_trained_whole_move_with_every_method(first_run, name):
    run = await first_run(name)
    assert [t.name for t in run.spec.dense] == ["model.norm.weight", "lm_head.weight"]
    for tensor in run.spec.dense:
        values = [reader.dense(tensor.name)[0] for reader in run.readers]
        assert not values[0].any()
        assert all((one != other).any() for one, other in itertools.pairwise(values))


@every_method
async def test_what_no_device_sends_stays_as_it_began(first_run, name):
    """FFA's down, FedSA's up: parts that a method never sends are those of version 0."""
    run, method = await first_run(name), method_of(name)
    for module, version in itertools.product(run.spec.modules, range(ROUNDS)):
        before, after = (run.readers[v].module(module.name) for v in (version, version + 1))
        sent = set(method.sent(version))
        if isinstance(method, RowMethod):
            for part in {"up", "down"} - sent:
                moments = run.readers[version].module(module.name).moments.get(part, {})
                if not any(values.any() for values in moments.values()):
                    assert before.values(part).tobytes() == after.values(part).tobytes()
        elif sent == {"core"}:
            assert before.adapter.up.tobytes() == after.adapter.up.tobytes()
            assert before.adapter.down.tobytes() == after.adapter.down.tobytes()


@every_method
async def test_a_run_is_told_and_exported_by_the_commands(first_run, name, tmp_path, capsys):
    run = await first_run(name)
    state = ["--state", str(run.state)]
    for command in (["runs"], ["runs", "run"], ["report", "run"], ["devices"]):
        assert command_line([*command, *state]) == 0
        assert capsys.readouterr().out.strip()
    code = command_line(["export", "run", *state, "--round", "2", "--out", str(tmp_path / "peft")])
    said = capsys.readouterr()
    if METHODS[name].has_global:
        assert code == 0 and said.out.strip() == str(tmp_path / "peft")
        tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
        for module in run.spec.modules:
            model = run.readers[2].module(module.name)
            want = model.product.dense() + (0 if model.side is None else model.side.dense())
            key = f"base_model.model.{module.name}.lora"
            rank = len(tensors[f"{key}_A.weight"])
            got = run.spec.scale(rank) * tensors[f"{key}_B.weight"] @ tensors[f"{key}_A.weight"]
            np.testing.assert_allclose(got, want, atol=1e-6)
        for tensor in run.spec.dense:
            base = base_tensor(Path(run.spec.base), tensor.name)
            moved = tensors[f"base_model.model.{tensor.name}"] - base
            want = run.readers[2].dense(tensor.name)[0].reshape(base.shape)
            np.testing.assert_allclose(moved, want, atol=1e-6)
    else:
        assert code == 1 and "keeps up on the devices" in said.err


# --- the same again -----------------------------------------------------------------------------


@every_method
async def test_replayed_in_another_order_every_version_has_the_same_bits(
    harness, tmp_path, first_run, name
):
    run = await first_run(name)
    # Other measurements would plan otherwise: the recorded plans decide.
    others = {**setting(name), "profiles": {"ash": {"up_bps": 7000.0, "down_bps": 1e6}}}
    async with harness.fleet(tmp_path, recorded=run.recorded, **others) as fleet:
        for order in (("cedar", "ash", "birch"), ("birch", "cedar", "ash"), harness.NAMES[::-1]):
            await fleet.round(order)
        last = fleet.coordinator
        await last.until(lambda: last.digests()[-1] is not None, "the last merge")
        assert last.digests() == run.digests


@every_method
async def test_a_coordinator_killed_between_rounds_changes_nothing(
    harness, tmp_path, first_run, name, impatient
):
    run = await first_run(name)
    async with harness.fleet(tmp_path, **setting(name)) as fleet:
        for _ in range(ROUNDS - 1):
            await fleet.round()
        await fleet.restart()  # with moments, memories and homes of two rounds
        await fleet.finish()
        assert fleet.coordinator.digests() == run.digests
        given = fleet.coordinator.records.assignments("run")
        assert [a.assignment for a in given] == [a.assignment for a in run.given]
        assert [r.detail.get("weight_memory") for r in run.rounds] == [
            r.detail.get("weight_memory") for r in fleet.coordinator.records.all_rounds("run")
        ]


@pytest.mark.parametrize("before", [True, False], ids=["before-publishing", "after-publishing"])
@pytest.mark.parametrize("name", ["fslora", "hetlora", "flora", "fed-sb"])
async def test_a_coordinator_that_dies_around_a_merge_merges_the_same(
    harness, tmp_path, first_run, name, impatient, before
):
    """Weights and moments move once, whether the merge was published or is done again."""
    run = await first_run(name)
    async with harness.fleet(tmp_path, **setting(name)) as fleet:
        await fleet.round()
        taken = await fleet.take()
        fleet.coordinator.cut_power("publish_round", before=before)
        for device in harness.NAMES:
            await fleet[device].deliver(*taken[device])
        await fleet.coordinator.died()
        await fleet.coordinator.start()
        await fleet.finish()
        assert fleet.coordinator.digests() == run.digests
        assert [r.detail.get("weight_memory") for r in run.rounds] == [
            r.detail.get("weight_memory") for r in fleet.coordinator.records.all_rounds("run")
        ]


# --- parts that rest ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rests"),
    [
        ("ffa-lora", {1: ("down",), 2: ("down",), 3: ("down",)}),
        ("rolora", {1: ("down",), 2: ("up",), 3: ("down",)}),
        ("fed-sb", {2: ("up", "down"), 3: ("up", "down")}),
    ],
)
async def test_a_factor_that_rests_is_the_same_file_and_is_not_fetched_again(
    harness, tmp_path, name, rests
):
    async with harness.fleet(tmp_path, method={"name": name}, profiles={},
                             run={"rounds": 4}) as fleet:  # fmt: skip
        ash, held, before = fleet["ash"], set(), {}
        for round_ in range(4):
            taken = await fleet.take()
            _, a = taken["ash"]
            blobs = {b.payload.parts: b for b in a.slice}
            fetched = ash.link.fetched_bytes
            for device in fleet.devices:
                await fleet[device].deliver(*taken[device])
            new = {b for b in a.blobs if b.digest not in held}
            assert ash.link.fetched_bytes - fetched == sum(b.size_bytes for b in new)
            if round_ in rests:
                assert blobs[rests[round_]].digest == before[rests[round_]].digest
                assert rests[round_] not in {b.payload.parts for b in new}
            held |= {b.digest for b in a.blobs}
            before = blobs


async def test_what_is_personal_never_reaches_the_coordinator(harness, tmp_path):
    async with harness.fleet(tmp_path, method={"name": "fedsa-lora"}, profiles={}) as fleet:
        done = await fleet.finish()
        run, spec = fleet.coordinator, fleet.coordinator.engine.spec
        for a in (a for given in done.values() for a in given if a.trains):
            assert a.personal == ("up",) and a.update.parts == ("down",)
            assert [blob.payload.parts for blob in a.slice] == [("down",)]
        for module in spec.modules:
            assert not run.reader(3).module(module.name).adapter.up.any()
        homes = [fleet[n].homes[2][spec.modules[0].name][1]["up"] for n in harness.NAMES]
        assert not any(np.array_equal(*pair) for pair in itertools.combinations(homes, 2))
        losses = {row.device_id: row.loss_last for row in build_report(run.records, "run").rows}
        assert len(set(losses.values())) == 3, "each device was to evaluate its own model"


# --- what methods let devices decide ------------------------------------------------------------


async def test_a_device_that_pruned_itself_is_given_no_more_than_it_kept(harness, tmp_path):
    async with harness.fleet(tmp_path, method={"name": "hetlora", "prune_keep": 0.7},
                             profiles={}, run={"rounds": 6}) as fleet:  # fmt: skip
        done = await fleet.finish()
        records = fleet.coordinator.records
        pruned = 0
        for given in done.values():
            most = harness.RANK
            for a in (a for a in given if a.trains):
                assert a.pruning is not None and a.pruning.keep == 0.7
                assert a.rank == most
                kept = records.assignment(a.assignment_id).report.kept_rank
                assert kept in (0, max(1, math.floor(0.7 * a.rank)))
                most = kept or most
                pruned += kept > 0
        assert pruned > 3, "devices were to prune themselves in this test"


async def test_rows_beyond_the_energy_are_not_handed_out(harness, tmp_path):
    async with harness.fleet(tmp_path, method={"name": "florist", "energy": 0.5},
                             profiles={}) as fleet:  # fmt: skip
        done = await fleet.finish()
        run = fleet.coordinator
        for a in (a for given in done.values() for a in given if a.trains):
            assert a.rank == run.reader(a.round).useful_rank()
        assert {a.rank for a in done["ash"] if a.round in (1, 2)} < set(range(1, harness.RANK))


# --- late updates -------------------------------------------------------------------------------

LATE = {"round": {"quorum": 0.6}, "run": {"rounds": 4}}
AFTER_DEADLINE_S = 13.0  # a round of 10 s and its grace


async def opened(fleet, number):
    """Until that round is open."""
    run = fleet.coordinator
    await run.until(lambda: (run.state.round, run.state.phase) == (number, "open"),
                    f"round {number}")  # fmt: skip


async def late_from(fleet, clock, name="cedar", round_=0):
    """A round that closes without this device, which then sends what it trained."""
    taken = await fleet.take()
    spec, a = taken.pop(name)
    update = await fleet[name].train(spec, a)
    for other, task in taken.items():
        await fleet[other].deliver(*task)
    clock.now += AFTER_DEADLINE_S
    await opened(fleet, round_ + 1)
    _, outcome = await fleet[name].push(a, update)
    await fleet[name].report(spec, a)
    assert outcome == "late"


@every_method
async def test_a_late_update_counts_as_its_method_can_count_it(harness, tmp_path, name):
    """On today's rows where rows last, else with the model it was cut from; Fed-SB cannot use an
    update from before its bases were fixed, and says so.
    """
    clock = harness.Clock()
    async with harness.fleet(tmp_path, clock=clock, method={"name": name}, profiles={},
                             **LATE) as fleet:  # fmt: skip
        run = fleet.coordinator
        await late_from(fleet, clock)
        await fleet.round()
        await opened(fleet, 2)
        record = run.records.all_rounds("run")[1]
        assert record.detail["late"] == [["cedar", 0]]
        if name == "fed-sb":
            assert "before the bases were fixed" in record.detail["dropped"]["run.0.cedar"]
            assert run.assignment(0, "cedar").merged_in is None
            counted = []
        else:
            assert run.assignment(0, "cedar").merged_in == 1
            counted = [("cedar", 0, 1 / math.sqrt(2))]
        counted += [(device, 1, 1.0) for device in harness.NAMES]

        def stored(device, round_, discount):
            found = run.assignment(round_, device)
            a, report = found.assignment, found.report
            thinned = tuple(StateFile(run.blobs.path(b.digest), b.payload) for b in a.slice
                            if b.payload.density < 1)  # fmt: skip
            return StoredUpdate(device, a, run.blobs.path(found.update_digest),
                                report.train_examples * discount, report.kept_rank,
                                thinned)  # fmt: skip

        merger = Merger(run.engine.spec, method_of(name), run.config.make_server_optimizer(),
                        run.reader, lambda role: tmp_path / role,
                        run.config.make_robust())  # fmt: skip
        merged = merger.merge(1, 2, run.reader(1), [stored(*one) for one in counted])
        for role, file in merged.files.items():
            held = run.blobs.path(run.model(2)[role].digest).read_bytes()
            assert held == file.path.read_bytes(), role
        assert set(merged.files) == set(run.model(2))
        assert record.detail["aggregation_error"] == merged.error
        assert record.detail["aggregation_errors"] == merged.errors


async def test_what_could_not_be_merged_is_not_tried_again_after_a_restart(
    harness, tmp_path, impatient
):
    clock = harness.Clock()
    patient = {"round": {"quorum": 0.6, "late_rounds": 3}, "run": {"rounds": 4}}
    async with harness.fleet(tmp_path, clock=clock, method={"name": "fed-sb"}, profiles={},
                             **patient) as fleet:  # fmt: skip
        run = fleet.coordinator
        await late_from(fleet, clock)
        await fleet.round()
        await opened(fleet, 2)
        assert run.state.late == ()
        await fleet.restart()
        assert run.state.late == (), "a restart was to change nothing"
        await fleet.round()
        await opened(fleet, 3)
        assert run.records.all_rounds("run")[2].detail["late"] == []
