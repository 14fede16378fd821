"""Rounds in one process are a fleet's rounds: real files, real merges, the same bits each time."""

from dataclasses import asdict

import numpy as np
import pytest

from coordinator.config import RunConfig
from coordinator.methods import METHODS, MethodOptions, make
from edge_agent.training.connectors import DataSelection
from tests.tiny_base import write_base
from trials.simulated_bench import SharedBench
from trials.simulated_types import (
    Sending,
    SimulatedDevice,
    SimulationError,
    TierAdapters,
    fleet_loss,
)
from trials.simulation import Simulation
from trials.study.design import RunFacts
from trials.study.playing import Player, skew_of
from trials.study.statistics import permutation_p, slope

NAMES = ("ants", "bees", "cats")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"), hidden=32, intermediate=48)


@pytest.fixture(scope="module")
def devices(tmp_path_factory):
    root, found = tmp_path_factory.mktemp("code"), []
    for name in NAMES:
        (root / name).mkdir()
        for i in range(24):
            lines = "".join(f"{name}_{i}_{j} = {name}({i} + {j})\n" for j in range(8))
            (root / name / f"{i}.py").write_text(lines)
        found.append(SimulatedDevice(name, DataSelection((str(root / name),))))
    return found


@pytest.fixture(scope="module")
def bench():
    return SharedBench()


def sections(method="fslora", **more):
    whole = make(method, MethodOptions(rank=4))
    delta = {"delta": False} if whole.density == 1 and whole.files(0) else {}
    return {
        "run": {"name": "test", "seed": 5},
        "model": {"base": "tiny", "targets": ["q_proj", "v_proj"]},
        "adapter": {"rank": 4, "alpha": 8},
        "method": {"name": method},
        "training": {"precision": "fp32", "sequence_tokens": 32, "micro_batch": 2,
                     "local_steps": 1, "learning_rate": 0.01},
        "wire": {"update": "float32", "slice": "float32", "global_adapter": "float32", **delta},
        "evaluation": {"sequences": 3, "held_out_share": 0.3},
        **more,
    }  # fmt: skip


@pytest.fixture
def begin(base, devices, bench, tmp_path):
    def of(method="fslora", sendings=None, devices_=None, tiers=None, **more):
        config = RunConfig.model_validate(sections(method, **more))
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        return Simulation(config, base, devices_ or devices, bench, folder, sendings or {}, tiers)

    return of


def test_a_run_gives_the_same_bits_twice_and_other_bits_under_another_seed(begin):
    def losses(**more):
        run = begin(**more)
        run.round()
        run.round(["ants", "cats"])
        return {name: m.nats for name, m in run.measure().items()}

    again = losses()
    assert again == losses()
    assert again != losses(run={"name": "test", "seed": 6})


@pytest.mark.parametrize("method", METHODS)
def test_every_method_plays_two_rounds_and_is_measured_on_every_device(begin, method):
    ranks = {"ants": Sending(rank=4), "bees": Sending(rank=2), "cats": Sending(rank=2)}
    run = begin(method, sendings=ranks if METHODS[method].heterogeneous else {})
    before = fleet_loss(run.measure())
    for _ in range(2):
        played = run.round()
        assert set(played.devices) == set(NAMES)
        assert all(d.up_bytes > 0 for d in played.devices.values())
    found = run.measure()
    assert [len(found[name].nats) for name in NAMES] == [3, 3, 3]
    assert fleet_loss(found) != before


def test_bytes_follow_rows_bits_and_density_of_each_device(begin):
    run = begin("fedit", {"ants": Sending(), "bees": Sending("int8"), "cats": Sending(density=0.1)})
    sent = {name: d.up_bytes for name, d in run.round().devices.items()}
    assert sent["ants"] > 3 * sent["bees"] and sent["ants"] > 5 * sent["cats"]
    rows = begin("fslora", {"ants": Sending(rank=4), "bees": Sending(rank=2)}).round().devices
    assert rows["ants"].up_bytes == pytest.approx(2 * rows["bees"].up_bytes, rel=0.1)
    assert rows["ants"].task.rank == 4 and rows["bees"].task.rank == 2


def test_fewer_training_sequences_leave_the_held_out_ones_alone(begin, devices):
    few = [SimulatedDevice(d.name, d.data, 2) for d in devices]
    whole, small = begin(), begin(devices_=few)
    assert [len(small.rows(d).train) for d in few] == [2, 2, 2]
    np.testing.assert_array_equal(small.rows(few[0]).held_out.tokens,
                                  whole.rows(devices[0]).held_out.tokens)  # fmt: skip
    played = small.round().devices
    assert played["ants"].report.train_examples == 2


def test_weights_are_those_of_the_rule(begin, devices):
    sizes = [SimulatedDevice(d.name, d.data, n) for d, n in zip(devices, (1, 2, 4), strict=True)]
    by = {name: d.weight for name, d in begin(devices_=sizes).round().devices.items()}
    assert by == {"ants": 1, "bees": 2, "cats": 4}
    even = begin(devices_=sizes, fairness={"weights": "uniform"}).round().devices
    assert {d.weight for d in even.values()} == {1}
    fair = begin(devices_=sizes, fairness={"weights": "q-ffl", "q": 2.0}).round().devices
    assert fair["ants"].weight != fair["bees"].weight / 2  # by loss too


def test_differences_leave_devices_with_the_model_and_cost_less(begin):
    wire = {"update": "float32", "slice": "bfloat16", "global_adapter": "bfloat16"}
    runs = [begin("fedit", wire={**wire, "delta": delta}) for delta in (True, False)]
    down = [[run.round().down_bytes for _ in range(2)] for run in runs]
    assert down[0][0] == 0 < down[1][0]  # the start is drawn, not sent
    assert down[0][1] <= down[1][1]
    losses = [fleet_loss(run.measure()) for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_tiers_have_an_adapter_each_beside_the_global_one(begin):
    tiers = {"ants": 0, "bees": 1, "cats": 1}

    def losses(others, present=(None,)):
        run = begin("fedit", tiers=None if others is None else TierAdapters(tiers, others))
        for names in present:
            run.round(names)
        return {name: m.nats for name, m in run.measure().items()}, run

    same, plain = losses(1.0)[0], losses(None)[0]
    for name in NAMES:  # others' updates at full weight: the global adapter, to rounding
        np.testing.assert_allclose(same[name], plain[name], rtol=1e-5)
    apart, _ = losses(0.0, [["bees", "cats"]])
    untouched, fresh = losses(0.0, []), losses(None, [["bees", "cats"]])[0]
    assert apart["ants"] == untouched[0]["ants"]  # nobody of its tier took part
    assert apart["bees"] == fresh["bees"]  # and in the other tier everybody did
    losses(0.0, [["bees"], ["ants"], ["bees"]])  # a tier that skips a round
    between, run = losses(0.25)
    assert between["ants"] not in (plain["ants"], losses(0.0)[0]["ants"])
    globally = run.measure(files=run.files)
    assert globally["ants"].nats != between["ants"], "the global adapter is kept beside them"


def test_tiers_are_refused_where_changes_fit_one_adapter_only(begin):
    with pytest.raises(SimulationError, match="adds rows in place"):
        begin("flora", tiers=TierAdapters(dict.fromkeys(NAMES, 0), 0.5))
    with pytest.raises(SimulationError, match="no share"):
        TierAdapters({}, 1.5)


def test_what_a_planner_would_choose_must_be_said(begin):
    with pytest.raises(SimulationError, match="no planner"):
        begin(training={"precision": "auto"})


def test_a_study_plays_fleet_and_local_only_on_the_same_budget(base, devices, tmp_path):
    def facts(kind):
        return RunFacts(
            cell=kind, kind=kind, seed=5, means="bits", method="fedit", assignment="",
            sections=sections("fedit"), sizes={"ants": 4, "bees": 6, "cats": 8},
            sendings={}, tier=dict.fromkeys(NAMES, 0),
            present=[["ants", "bees"], ["ants", "cats"]], measured=[1, 2],
        )  # fmt: skip

    player = Player(tmp_path, base, devices)
    fleet, alone = player.play(facts("dense")), player.play(facts("local"))
    for record in (fleet, alone):
        assert [p.rounds for p in record.points] == [0, 1, 2]
        assert record.joined == {"ants": 2, "bees": 1, "cats": 1}
    assert fleet.points[0].nats == alone.points[0].nats
    assert alone.points[1].nats["cats"] == alone.points[0].nats["cats"]  # not its turn yet
    assert fleet.points[1].nats["cats"] != fleet.points[0].nats["cats"]  # the others' model
    assert fleet.dense_bytes == alone.dense_bytes > 0
    assert player.play(facts("dense")).points[-1].nats == fleet.points[-1].nats


def test_skew_is_zero_among_equals_and_a_bit_for_what_shares_nothing():
    same = np.array([[1, 2], [3, 4]])
    assert skew_of({"a": same, "b": same}) == {"a": 0.0, "b": 0.0}
    assert skew_of({"a": same, "b": same + 10})["a"] == pytest.approx(1.0)


@pytest.mark.slow
def test_a_device_starved_on_purpose_is_found(base, tmp_path):
    """Its updates lose nearly all their values; it ends worse against the dense run, others not."""
    names, code = [*NAMES, "dogs"], tmp_path / "code"
    for name in names:
        (code / name).mkdir(parents=True)
        for i in range(24):
            lines = "".join(f"{name}_{i}_{j} = {name}({i} + {j})\n" for j in range(8))
            (code / name / f"{i}.py").write_text(lines)
    devices = [SimulatedDevice(n, DataSelection((str(code / n),))) for n in names]
    player = Player(tmp_path / "runs", base, devices)
    training = {**sections()["training"], "local_steps": 3, "micro_batch": 4}

    def losses(seed, starved):
        sendings = {starved: asdict(Sending(density=0.001))} if starved else {}
        facts = RunFacts(
            cell="", kind="dense", seed=seed, means="top-k", method="fedit", assignment="",
            sections=sections("fedit", run={"name": "test", "seed": seed}, training=training),
            sizes=dict.fromkeys(names, 16), sendings=sendings, tier=dict.fromkeys(names, 0),
            present=[names] * 2, measured=[2],
        )  # fmt: skip
        last = player.play(facts).points[-1]
        return [sum(last.nats[n]) / sum(last.tokens[n]) for n in names]

    chosen = {1: "cats", 2: "ants", 3: "dogs"}
    x = np.array([[float(n == starved) for n in names] for starved in chosen.values()])
    y = np.array([np.subtract(losses(s, n), losses(s, "")) for s, n in chosen.items()])
    p, _ = permutation_p(lambda drawn: slope(drawn, y), x, 999, 0)
    assert slope(x, y) > 0 and p <= 0.05, y
