"""What goes out for a round is what the method declares, packed once, and dropped when over."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from coordinator.config import RunConfig
from coordinator.issuing import Issuer, ReplayError, recorded_plans
from coordinator.lowrank import Bundle
from coordinator.methods import METHODS, ModuleState
from coordinator.planner import RoundPlan
from coordinator.rounds import PlanRound
from coordinator.serve import build_spec
from coordinator.state import StateReader, StateWriter
from coordinator.store.blobs import BlobStore
from coordinator.store.records import Records
from profiles.cost import LINK_EFFICIENCY
from profiles.device import ComputeProfile, DeviceProfile
from profiles.link import LinkProfile
from protos.contract import LocalReport, Objective, Payload, Pruning
from protos.layout import packed_bytes
from protos.mirror import slice_of, whole_of
from protos.sketch import slice_rows
from protos.unpacking import unpack

RANK, ALPHA = 8, 16.0
DEVICES = ("a", "b", "c")
every_method = pytest.mark.parametrize("name", METHODS)
mixed = pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.heterogeneous])


class Desk:
    """An issuer over a state folder whose model is in the middle of a run."""

    def __init__(self, folder, base, name, *, version=1, side=0, recorded=None, **sections):
        plain = {
            "run": {"name": "run", "seed": 7, "rounds": 9},
            "model": {"base": str(base)},
            "adapter": {"rank": RANK, "alpha": ALPHA},
            "method": {"name": name},
            "training": {"sequence_tokens": 64, "local_steps": 4},
            "wire": {"slice": "float32", "global_adapter": "float32"},
            "evaluation": {"sequences": 2},
        }
        for section, keys in sections.items():
            plain[section] = {**plain.get(section, {}), **keys}
        self.config = RunConfig.model_validate(plain)
        self.spec, shape = build_spec(self.config, base)
        self.method = self.config.make_method()
        folder.mkdir()
        self.records = Records(folder / "db.sqlite")
        self.blobs = BlobStore(folder / "blobs")
        self.records.add_run(self.spec, {}, self.written(0, 0), 0.0)
        if version:
            self.records.publish_round("run", version - 1, self.written(version, side), [], {}, 1.0)
        self.version = version
        self.issuer = Issuer(
            self.config, self.spec, shape, self.records, self.blobs,
            method=self.method, recorded=recorded,
        )  # fmt: skip

    def written(self, version, side):
        """A model of random values, as blobs by role."""
        rng = np.random.default_rng([version, side])
        parts = self.method.parts(version)
        writer = StateWriter(self.spec, parts, lambda role: self.blobs.draft())

        def drawn(*shape):
            return rng.normal(size=shape).astype(np.float32)

        for m in self.spec.modules:
            up, down = drawn(RANK, m.out_features), drawn(RANK, m.in_features)
            beside = Bundle(drawn(side, m.out_features), drawn(side, m.in_features), 1.0)
            core = drawn(RANK, RANK) if "core" in parts else None
            scale = self.spec.scale(RANK)
            state = ModuleState(Bundle(up, down, scale), beside if side else None, core)
            writer.write(m.name, state)
        for t in self.spec.dense:
            writer.write_dense(t.name, (drawn(t.out_features, t.in_features), {}))
        return {r: self.blobs.adopt(f.path, f.payload) for r, f in writer.finish().items()}

    def profile(self, **changes):
        compute = ComputeProfile(self.spec.base_digest, "nf4", 2000.0, 6000.0, 3 * 10**8,
                                 4 * 10**8, 2, 64, 4)  # fmt: skip
        plain = DeviceProfile("board", "cpu", 4, 8 * 10**9, 8 * 10**9, 10**11, "1",
                              compute=compute, link=LinkProfile(1e8, 1e8, 0.01))  # fmt: skip
        return dataclasses.replace(plain, **changes)

    def plan(self, *, round_=None, evaluate_only=False, devices=DEVICES):
        asked = PlanRound(self.version if round_ is None else round_, devices, evaluate_only)
        return asked, self.issuer.plan(asked, {d: self.profile() for d in devices})

    def issue(self, ranks=None, mirrors=None, **asked):
        """Assignments by device; `ranks` overrules the planner's k."""
        asked, plan = self.plan(**asked)
        if ranks:
            own = [dataclasses.replace(p, rank=ranks[p.device_id], sketch_offset=2 * i)
                   for i, p in enumerate(plan.devices)]  # fmt: skip
            plan = RoundPlan(plan.round_s, tuple(own))
        return {a.device_id: a for a, _ in self.issuer.issue(asked, plan, mirrors)}

    def read(self, *blobs):
        """What these blobs hold together."""
        found = {}
        for blob in blobs:
            data = self.blobs.path(blob.digest).read_bytes()
            for name, parts in unpack(data, self.spec, blob.payload).items():
                found.setdefault(name, {}).update(parts)
        return found

    def state(self, name):
        return self.issuer.model().module(name)


@pytest.fixture
def desk(tmp_path, harness):
    made = []

    def of(name, **options):
        base = harness.write_base(tmp_path / "base")
        made.append(Desk(tmp_path / f"state-{len(made)}", base, name, **options))
        return made[-1]

    yield of
    for one in made:
        one.records.close()


SIDED = ("flora", "fedex-lora")
KS = {"a": 8, "b": 5, "c": 3}


def ranks_of(name):
    return KS if METHODS[name].heterogeneous else dict.fromkeys(DEVICES, RANK)


# --- slices -------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_slice_is_what_the_method_cuts_at_the_scale_that_is_told(desk, name, version, rslora):
    on = desk(name, version=version, adapter={"rslora": rslora})
    for device, a in on.issue(ranks_of(name)).items():
        scale = on.method.device_scale(on.spec, a.rank)
        assert a.alpha / on.spec.divisor(a.rank) == pytest.approx(scale, rel=1e-12)
        assert [blob.payload.parts for blob in a.slice] == list(on.method.files(version))
        assert {blob.payload.rank for blob in a.slice} <= {ranks_of(name)[device]}
        got = on.read(*a.slice)
        for module in on.spec.modules if a.slice else ():
            rows = slice_rows(on.spec, a, module.name)
            want = on.method.cut(on.state(module.name), rows, scale)
            for part, values in got[module.name].items():
                if a.update.density == 1:
                    np.testing.assert_array_equal(values, want.values(part))
                else:
                    kept = values != 0
                    np.testing.assert_array_equal(values[kept], want.values(part)[kept])


@mixed
def test_every_device_starts_from_the_same_product_of_its_rows(desk, name):
    """Whatever the scale on the device: s_i up_i' down_i is what the scaling promises of it."""
    on = desk(name, version=0)
    for a in on.issue(KS).values():
        if not a.slice:
            continue
        got = on.read(*a.slice)
        for module in on.spec.modules:
            rows = slice_rows(on.spec, a, module.name)
            scale = a.alpha / a.rank
            handed = Bundle(got[module.name]["up"], got[module.name]["down"], scale).dense()
            own = on.state(module.name).adapter.take(rows).dense()
            factor = RANK / a.rank if on.method.scaling == "sketch" else 1.0
            np.testing.assert_allclose(handed, factor * own, atol=1e-4)


def test_flasc_hands_out_the_largest_values_of_all_modules_together(desk):
    on = desk("flasc", method={"density": 0.1})
    a = on.issue()["a"]
    (blob,) = a.slice
    assert blob.payload.density == a.update.density == 0.1
    handed = on.read(blob)
    whole = {m.name: on.state(m.name).adapter for m in on.spec.modules}
    pairs = [(handed[n][part], getattr(whole[n], part)) for n in whole for part in ("up", "down")]
    kept = np.concatenate([got[got != 0].ravel() for got, _ in pairs])
    every = np.sort(np.abs(np.concatenate([want.ravel() for _, want in pairs])))[::-1]
    assert len(kept) == int(np.ceil(0.1 * len(every)))
    np.testing.assert_array_equal(np.sort(np.abs(kept))[::-1], every[: len(kept)])


def test_devices_of_the_same_rows_share_one_file(desk):
    on = desk("rbla")
    given = on.issue({"a": 5, "b": 5, "c": 3})
    assert given["a"].slice == given["b"].slice != given["c"].slice
    on = desk("fslora")
    given = on.issue({"a": 5, "b": 5, "c": 8})
    assert given["a"].slice != given["b"].slice, "blocks at other offsets are other rows"


def test_a_slice_of_all_rows_is_the_whole_adapter_to_evaluate(desk):
    on = desk("fslora")
    given = on.issue(KS, round_=5)
    assert all(a.evaluates_global for a in given.values())
    assert given["a"].slice == given["a"].global_adapter == given["c"].global_adapter
    assert len(given["a"].blobs) == 1
    other = desk("fslora", wire={"slice": "bfloat16"}).issue(KS, round_=5)["a"]
    assert other.slice != other.global_adapter, "other encodings are other files"


def test_independent_sketches_are_a_devices_own(desk):
    on = desk("fed-plora", method={"sketches": "independent"})
    given = on.issue(dict.fromkeys(DEVICES, 4))
    assert {a.rows for a in given.values()} == {"independent"}
    rows = [tuple(slice_rows(on.spec, a, on.spec.modules[0].name)) for a in given.values()]
    assert len(set(rows)) > 1
    assert len({a.slice for a in given.values()}) == 3


# --- what stands beside the base ----------------------------------------------------------------


@pytest.mark.parametrize("name", SIDED)
def test_the_branch_goes_to_everybody_once(desk, name):
    on = desk(name, side=11)
    given = on.issue(round_=5)
    sides = {(a.side, a.global_side) for a in given.values()}
    ((side, global_side),) = sides
    assert side == global_side and side.payload == Payload(11, "float32")
    for module, parts in on.read(side).items():
        branch = on.state(module).side
        np.testing.assert_array_equal(parts["up"], branch.up)
        np.testing.assert_array_equal(parts["down"], branch.down)


@pytest.mark.parametrize("name", SIDED)
def test_without_a_branch_none_is_named(desk, name):
    a = desk(name, version=0).issue()["a"]
    assert a.side is None and a.global_side is None


def test_slice_and_frozen_rows_together_are_the_whole_adapter(desk):
    on = desk("fed-plora")
    given = on.issue(KS, round_=5)
    assert given["a"].side is None, "with all rows nothing is frozen"
    for a in (given["b"], given["c"]):
        assert a.side.payload.rank == RANK - a.rank
        got, beside = on.read(*a.slice), on.read(a.side)
        for name, state in ((m.name, on.state(m.name)) for m in on.spec.modules):
            trains = Bundle(got[name]["up"], got[name]["down"], a.alpha / a.rank)
            frozen = Bundle(beside[name]["up"], beside[name]["down"], 1.0)
            np.testing.assert_allclose(
                trains.dense() + frozen.dense(), state.adapter.dense(), atol=1e-5
            )
        assert a.global_side is None, "the whole adapter has no rows beside it"


def test_dense_tensors_travel_in_a_file_of_their_own_and_whole(desk):
    on = desk("fslora", model={"modules_to_save": ["model.norm", "lm_head"]})
    given = on.issue(KS, round_=5)
    (dense,) = {a.slice[-1] for a in given.values()}
    for a in given.values():
        assert [b.payload.parts for b in a.slice] == [("up", "down"), ("dense",)]
        assert a.trained == a.update.parts == ("up", "down", "dense")
        assert a.global_adapter[-1] == dense, "fetched once, whatever k is"
    for name, parts in on.read(dense).items():
        np.testing.assert_array_equal(parts["dense"], on.issuer.model().dense(name)[0])


# --- what devices are told ----------------------------------------------------------------------


@every_method
def test_a_device_is_told_what_to_train_to_keep_and_to_send(desk, name):
    for version in (0, 1, 2):
        on = desk(name, version=version)
        method = on.method
        a = on.issue()["a"]
        assert (a.trained, a.personal) == (method.trained(version), method.personal)
        assert a.update == Payload(a.rank, "int8", method.sent(version), method.density)
        assert (a.rows, a.fresh, a.pruning) == (method.rows, method.fresh, method.pruning)
        assert (a.keeps_state, a.error_feedback, a.objective) == (False, False, None)
        assert a.round == version and a.trains and a.method == name


def test_what_fairness_and_memory_ask_for_is_told(desk):
    on = desk(
        "fedit", training={"keep_optimizer": True}, wire={"error_feedback": True},
        fairness={"loss": "propfair", "propfair_ceiling": 9.0, "propfair_margin": 0.5},
    )  # fmt: skip
    a = on.issue()["a"]
    assert a.keeps_state and a.error_feedback
    assert a.objective == Objective(9.0, 0.5)
    tail = desk("hetlora", method={"prune_keep": 0.5, "prune_penalty": 0.1}).issue()["a"]
    assert tail.pruning == Pruning(0.5, 0.1)


@every_method
def test_to_evaluate_only_the_whole_adapter_is_fetched(desk, name):
    on = desk(name, version=2, side=3 if name in SIDED else 0)
    for a in on.issue(evaluate_only=True).values():
        assert not a.trains and a.evaluates_global
        assert a.slice == () and a.side is None
        assert [b.payload for b in a.global_adapter] == [
            Payload(RANK, "float32", parts) for parts in on.method.files(2)
        ]
        assert (a.global_side is not None) == (name in SIDED)
        assert a.objective is None


def test_seeds_differ_by_device_and_round_and_stay_the_same_otherwise(desk):
    on, again = desk("fedit"), desk("fedit")
    first, later = on.issue(), on.issue(round_=2)
    seeds = [a.seed for a in (*first.values(), *later.values())]
    assert len(set(seeds)) == len(seeds)
    assert {d: a.seed for d, a in again.issue().items()} == {d: a.seed for d, a in first.items()}


# --- plans --------------------------------------------------------------------------------------


@every_method
def test_what_varies_between_devices_is_what_the_method_allows(desk, name):
    on = desk(name, round={"round_s": 10.0})
    whole = packed_bytes(on.spec, Payload(RANK, "int8", on.method.sent(1), on.method.density))
    # Nine tenths of the whole in nine of the ten seconds, on a link that hardly varies.
    nine_tenths = LinkProfile(0.9 * 8 * whole / 9 / LINK_EFFICIENCY, 1e8, 0.0, variation=0.01)
    profiles = {"fast": on.profile(), "slow": on.profile(link=nine_tenths)}
    plan = on.issuer.plan(PlanRound(1, tuple(profiles), False), profiles)
    got = {p.device_id: (p.rank, p.density) for p in plan.devices}
    assert got["fast"] == (RANK, on.method.density)
    if on.method.heterogeneous:
        assert got["slow"][0] < RANK and got["slow"][1] == 1
    elif on.method.density < 1:
        assert got["slow"][0] == RANK and got["slow"][1] < on.method.density
    else:
        assert "slow is too slow: rank 8 and" in plan.left_out["slow"]


def test_a_fleet_that_cannot_take_part_gives_a_plan_that_says_why(desk):
    on = desk("fedit", round={"round_s": 0.01})
    _, plan = on.plan()
    assert plan.devices == () and set(plan.left_out) == set(DEVICES)
    assert all("too slow" in why for why in plan.left_out.values())


def test_the_newest_report_says_how_many_rows_are_left(desk):
    on = desk("hetlora")
    for round_, kept in ((1, {"a": 6, "b": 7}), (2, {"a": 5, "b": 0})):
        given = on.issue(round_=round_)
        on.records.open_round("run", round_, False, 0.0, 1.0, [(a, {}) for a in given.values()])
        for device, rows in kept.items():
            report = LocalReport(f"run.{round_}.{device}", "done", train_examples=1, kept_rank=rows)
            on.records.put_report(report)
    _, plan = on.plan(round_=3)
    assert {p.device_id: p.rank for p in plan.devices} == {"a": 5, "b": 7, "c": RANK}


def test_only_methods_that_prune_heed_such_reports(desk):
    on = desk("rbla")
    given = on.issue()
    on.records.open_round("run", 1, False, 0.0, 1.0, [(a, {}) for a in given.values()])
    on.records.put_report(LocalReport("run.1.a", "done", train_examples=1, kept_rank=2))
    _, plan = on.plan(round_=2)
    assert {p.rank for p in plan.devices} == {RANK}


def test_what_devices_reported_is_learnt_from_the_database_alone(desk):
    on = desk("fslora")
    asked, plan = on.plan()
    on.records.open_round("run", 1, False, 0.0, 1.0, on.issuer.issue(asked, plan))
    on.records.put_report(LocalReport("run.1.a", "out_of_memory"))
    by_name = {p.device_id: p for p in plan.devices}
    b = by_name["b"]
    on.records.put_report(
        LocalReport(
            "run.1.b", "done", train_examples=1, train_s=3 * b.predicted.train_s,
            evaluate_s=3 * b.predicted.evaluate_s, peak_bytes=int(1.5 * b.uncorrected_peak_bytes),
        )
    )  # fmt: skip
    _, after = on.plan(round_=2)
    later = {p.device_id: p for p in after.devices}
    assert "80% of its memory since it ran out once" in later["a"].reason
    assert later["b"].time_factor == pytest.approx(3.0)
    assert later["b"].uncorrected_peak_bytes == pytest.approx(b.uncorrected_peak_bytes, rel=0.1)
    assert later["b"].predicted_peak_bytes > 1.4 * b.predicted_peak_bytes
    assert "50% of the steps since it failed or was not heard of once" in later["c"].reason
    assert on.plan(round_=2)[1] == after


def test_a_device_keeps_what_it_did_while_nothing_clear_changes(desk):
    on = desk("fslora")
    asked, plan = on.plan()
    on.records.open_round("run", 1, False, 0.0, 1.0, on.issuer.issue(asked, plan))
    for p in plan.devices:
        on.records.put_report(
            LocalReport(
                f"run.1.{p.device_id}", "done", train_examples=1,
                train_s=1.15 * p.predicted.train_s, evaluate_s=1.15 * p.predicted.evaluate_s,
            )
        )  # fmt: skip
    _, after = on.plan(round_=2)
    assert [(p.rank, p.local_steps) for p in after.devices] == [
        (p.rank, p.local_steps) for p in plan.devices
    ]


def test_what_the_run_asks_of_training_and_evaluation_is_in_the_assignment(desk):
    training = {"optimizer": "adamw8bit", "fill_in_middle": 0.5}
    on = desk("fslora", training=training, evaluation={"completions": 7}, wire={"update": "auto"})
    a = on.issue()["a"]
    assert (a.optimizer, a.fill_in_middle, a.completions) == ("adamw8bit", 0.5, 7)
    assert a.update.encoding == "bfloat16"


def test_recorded_plans_are_followed_and_only_for_their_rounds(desk):
    on = desk("fslora")
    asked, plan = on.plan()
    given = on.issuer.issue(asked, plan)
    on.records.open_round("run", 1, False, 0.0, 1.0, given)
    entries = recorded_plans(on.records.assignments("run"))
    assert [e["plan"]["device_id"] for e in entries] == list(DEVICES)
    again = desk("fslora", recorded={1: (plan.round_s, plan.devices)})
    _, followed = again.plan()
    assert followed == RoundPlan(plan.round_s, plan.devices)
    _, waiting = again.plan(devices=("a", "b"))
    assert waiting.devices == ()
    assert waiting.left_out["a"] == "waiting for c, which the recorded plans name"
    with pytest.raises(ReplayError, match="hold no round 2; record them from a finished run"):
        again.plan(round_=2)


# --- versions and what is dropped ---------------------------------------------------------------


def test_a_round_that_merged_nothing_leaves_the_version_that_the_next_starts_from(desk):
    """RoLoRA's turns go by version: what was not merged is trained again."""
    on = desk("rolora", version=1)
    on.records.publish_round("run", 1, {}, [], {}, 2.0)
    a = on.issue(round_=2)["a"]
    assert a.round == 2 and a.trained == ("down",) == on.method.trained(1)
    first = StateReader(on.spec, on.issuer.files(0)[1])
    assert on.issuer.files()[0] == on.issuer.files(2)[0] == 1
    name = on.spec.modules[0].name
    assert first.module(name).adapter.up.tobytes() != on.state(name).adapter.up.tobytes()


@pytest.mark.parametrize("changes", [True, False], ids=["a new model", "the same model"])
@pytest.mark.parametrize("name", ["fedit", "ffa-lora"])
def test_what_newer_rounds_still_name_is_kept_when_old_ones_are_forgotten(desk, name, changes):
    """A whole float32 slice is the model's own file, and a factor that rests is named again."""
    on, given = desk(name), {}
    for round_ in (1, 2):
        given[round_] = on.issue(round_=round_)
        on.records.open_round("run", round_, False, 0.0, 1.0,
                              [(a, {}) for a in given[round_].values()])  # fmt: skip
        update = on.blobs.put(b"update of round %d" % round_, Payload(RANK, "int8"))
        on.records.put_update(f"run.{round_}.a", update.digest, update.size_bytes, 1.0)
        files = on.written(round_ + 1, 0) if changes else {}
        on.records.publish_round("run", round_, files, [], {}, 1.0)
    old, new = ({b.digest for a in given[r].values() for b in a.blobs} for r in (1, 2))
    models = on.records.model_digests("run")
    assert bool(old & new) == (not changes) and bool(old & models) == (name == "fedit")
    on.issuer.forget(2)
    assert {d for d in old | new | models if on.blobs.holds(d)} == new | models
    one, two = (on.records.assignment(f"run.{r}.a").update_digest for r in (1, 2))
    assert not on.blobs.holds(one) and on.blobs.holds(two)


# --- mirrors ------------------------------------------------------------------------------------

NONE = dict.fromkeys(DEVICES, "")


def cut(on, a, how):
    return how(on.spec, a, on.blobs.path(a.mirror.result.digest))


@every_method
@pytest.mark.parametrize("version", [0, 1, 2])
def test_what_is_cut_from_a_mirror_is_what_would_have_been_sent(desk, name, version):
    on = desk(name, version=version, evaluation={"every_rounds": 1})
    plain, mirrored = on.issue(ranks_of(name)), on.issue(ranks_of(name), NONE)
    for device, a in mirrored.items():
        b = plain[device]
        if a.mirror is None:
            assert name in ("flora", "flasc"), "nothing travels, or some of it on purpose"
            assert a == b
            continue
        assert dataclasses.replace(
            a, mirror=None, slice=b.slice, global_adapter=b.global_adapter
        ) == b, "all else is as it was"  # fmt: skip
        for want, got in ((on.read(*b.slice), cut(on, a, slice_of)),
                          (on.read(*b.global_adapter), cut(on, a, whole_of))):  # fmt: skip
            for module, parts in want.items():
                for part, values in parts.items():
                    np.testing.assert_allclose(got[module][part], values, rtol=1e-6)


def test_no_row_travels_twice_in_a_round_that_measures_the_whole_adapter(desk):
    wire = {"slice": "bfloat16", "global_adapter": "int8"}
    on = desk("fslora", wire=wire, evaluation={"every_rounds": 1})
    sizes = {}
    for mirrors in (None, NONE):
        given = on.issue(KS, mirrors)
        sizes[mirrors is None] = {d: sum(b.size_bytes for b in a.blobs) for d, a in given.items()}
    assert all(sizes[False][d] < sizes[True][d] for d in DEVICES)
    a = given["b"]
    assert [(f.rows, f.blob.payload.rank) for f in a.mirror.files] == 2 * [
        ("slice", 5),
        ("rest", 3),
    ]


def issued(on, round_, mirrors, **options):
    """A round as the database has it."""
    given = on.issue(round_=round_, mirrors=mirrors, **options)
    planned = [(a, {}) for a in given.values()]
    on.records.open_round("run", round_, False, 0.0, 1.0, planned)
    return given


def test_a_device_may_name_the_mirror_of_its_newest_assignment_and_no_other(desk):
    on = desk("fslora", version=1)
    first = issued(on, 1, NONE, ranks=KS)
    held = {d: a.mirror.result.digest for d, a in first.items()}
    assert len(set(held.values())) == 3, "they hold other rows"
    on.records.publish_round("run", 1, on.written(2, 0), [], {}, 2.0)
    second = issued(on, 2, held, ranks=KS)
    assert {d: a.mirror.base.digest for d, a in second.items()} == held
    claims = {"a": held["b"], "b": "f" * 64, "c": "../../etc"}
    third = on.issue(round_=3, mirrors=claims, ranks=KS)
    assert all(a.mirror.base is None for a in third.values())
    missed = on.issue(round_=3, mirrors={**held, "a": second["a"].mirror.result.digest}, ranks=KS)
    assert missed["a"].mirror.base == second["a"].mirror.result
    assert missed["b"].mirror.base is None, "it may still be about to take the last step"


def test_of_mirrors_the_newest_of_each_device_is_kept(desk):
    on = desk("fslora", version=1, wire={"slice": "bfloat16"})
    mirrors, made = NONE, []
    for round_ in range(1, 7):
        given = issued(on, round_, mirrors, ranks=KS)
        on.records.publish_round("run", round_, on.written(round_ + 1, 0), [], {}, 2.0)
        mirrors = {d: a.mirror.result.digest for d, a in given.items()}
        made += mirrors.values()
        on.issuer.forget(round_)
        kept = {digest for digest in made if on.blobs.holds(digest)}
        assert kept == set(mirrors.values())


def test_devices_that_hold_the_same_are_sent_the_same(desk):
    on = desk("fedit", version=1)
    a, b, c = issued(on, 1, {"a": "", "b": ""}).values()
    assert a.mirror == b.mirror and c.mirror is None and c.slice
    off = desk("fedit", version=1, wire={"delta": False})
    assert all(a.mirror is None for a in off.issue(mirrors=NONE).values())
