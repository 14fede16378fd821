"""What a device keeps between rounds: personal parts, moments, residuals, Ditto's adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_agent.training.batches import whole_rows
from edge_agent.training.connectors import DataSelection
from edge_agent.training.home import load_home
from edge_agent.training.moments import read_moments, restore_moments
from edge_agent.training.optimizers import make_optimizer
from edge_agent.training.slice import attached, read_parts, write_parts
from edge_agent.training.steps import train_step, train_steps
from edge_agent.training.workbench import Workbench
from protos.contract import (
    AdapterSpec,
    Assignment,
    Payload,
)
from protos.layout import Parts
from protos.sketch import slice_rows
from tests.edge_agent.training.rounds import (
    ALL,
    HEAD,
    NORM,
    Device,
    K,
    assert_same,
    loss_of,
    make_adapter,
    make_assignment,
    moved,
    norm_of,
    only,
    parts_of,
    plus,
    run,
)

# --- what stays at home -------------------------------------------------------------------------

PERSONAL_UP = {"personal": ("up",), "update": Payload(K, "float32", ("down",))}


def test_a_personal_part_is_never_sent_and_is_there_in_the_next_round(
    device: Device, spec: AdapterSpec
) -> None:
    down = only(make_adapter(spec, K), "down")
    one, sent = device.round(spec, make_assignment(**PERSONAL_UP), down)
    assert parts_of(sent) == ("down",)
    home = load_home(device.home, spec)
    assert all(parts["up"].any() for parts in home.slice.values())
    two, _ = device.round(spec, make_assignment(round=2, **PERSONAL_UP), plus(down, sent))
    want = pytest.approx(loss_of(one, "slice", "trained"), rel=1e-6)
    assert loss_of(two, "slice", "received") == want


def test_a_personal_part_is_part_of_the_global_model_here(
    device: Device, spec: AdapterSpec
) -> None:
    r = spec.rank
    facts = {"rank": r, "personal": ("up",), "update": Payload(r, "float32", ("down",))}
    down = only(make_adapter(spec, r), "down")
    one, sent = device.round(spec, make_assignment(**facts), down)
    task = make_assignment(local_steps=0, evaluates_global=True, **facts)
    two, _ = device.round(spec, task, whole=(plus(down, sent),))
    want = pytest.approx(loss_of(one, "slice", "trained"), rel=1e-6)
    assert loss_of(two, "global", "received") == want


def test_sending_a_personal_part_is_refused(
    device: Device, bench: Workbench, spec: AdapterSpec
) -> None:
    job = device.job(spec, make_assignment(personal=("up",)), make_adapter(spec, K))
    event = run(job, bench)[-1]
    assert event["outcome"] == "crashed" and "stays at home" in event["message"]
    assert not device.update.exists()


def test_a_personal_part_of_other_rows_starts_anew(device: Device, spec: AdapterSpec) -> None:
    down = only(make_adapter(spec, K), "down")
    device.round(spec, make_assignment(**PERSONAL_UP), down)
    facts = {"rank": 3, "personal": ("up",), "update": Payload(3, "float32", ("down",))}
    wider = only(make_adapter(spec, 3), "down")
    report, _ = device.round(spec, make_assignment(**facts), wider)
    base_alone, _ = device.round(spec, make_assignment(local_steps=0, evaluates_global=True))
    assert loss_of(report, "slice", "received") == loss_of(base_alone, "global", "received")


# --- what the optimiser remembers ---------------------------------------------------------------


def uninterrupted(
    device: Device, bench: Workbench, spec: AdapterSpec, task: Assignment, rounds: int
) -> dict[str, Parts]:
    """What one optimiser makes of the same batches in one go."""
    base = bench.base(device.base_folder, task.precision, spec)
    data = DataSelection((str(device.code_folder),))
    rows = bench.rows(
        device.base_folder, base, data, task.sequence_tokens, task.held_out_share
    ).train
    with attached(base.model, spec, task.rank, alpha=task.alpha, trained=task.trained) as model:
        write_parts(model, make_adapter(spec, task.rank))
        optimizer = make_optimizer(task.optimizer, model, task.learning_rate)
        for round_ in range(rounds):
            train_steps(model, optimizer, rows, replace(task, seed=round_), lambda _: None)
        return read_parts(model)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("keeps_state", [True, False])
def test_two_rounds_with_kept_moments_are_one_training(
    device: Device, bench: Workbench, spec: AdapterSpec, keeps_state: bool, optimizer: str
) -> None:
    task = make_assignment(local_steps=5, keeps_state=keeps_state, optimizer=optimizer)
    adapter = make_adapter(spec, K)
    for round_ in range(2):
        _, sent = device.round(spec, replace(task, seed=round_), adapter)
        adapter = plus(adapter, sent)
    assert device.home.exists() == keeps_state
    want = uninterrupted(device, bench, spec, task, 2)
    apart = moved(adapter, want)
    if keeps_state:
        assert apart < 1e-5
    else:
        assert apart > 1e-2, "a fresh optimiser takes other steps"


def test_eight_bit_moments_go_home_and_come_back(
    bench: Workbench, base_folder: Path, spec: AdapterSpec
) -> None:
    """Of the output head, which is large enough to be held in 8 bits, and of small parts."""
    base, whole = bench.base(base_folder, "fp32", spec), replace(spec, dense=(HEAD,))
    rows = whole_rows(np.random.default_rng(0).integers(0, 250, (2, 24), dtype=np.int64))
    with attached(base.model, whole, 2, alpha=16.0, trained=("up", "down", "dense")) as model:
        write_parts(model, make_adapter(whole, 2, parts=("up", "down", "dense")))

        def make() -> torch.optim.Optimizer:
            return make_optimizer("adamw8bit", model, 1e-2)

        optimizer = make()
        for _ in range(3):
            train_step(model.train(), optimizer, [rows])
        kept, weights = read_moments(model, optimizer), read_parts(model)
        assert kept.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert float(kept["step"][HEAD.name]["dense"]) == 3
        held = {p: optimizer.state[p] for p in optimizer.state}
        assert {s["state1"].dtype for s in held.values()} == {torch.uint8, torch.float32}
        again = make()
        restore_moments(model, again, kept)
        for weight, state in held.items():
            assert again.state[weight].keys() == state.keys()
            assert again.state[weight]["step"] == state["step"]
        back = read_moments(model, again)
        for kind, found in kept.items():
            for name, parts in found.items():
                for part, values in parts.items():
                    apart = np.abs(back[kind][name][part] - values)
                    assert apart.max() <= 0.01 * np.abs(values).max(), (kind, name, part)
        train_step(model, optimizer, [rows])
        want = read_parts(model)
        write_parts(model, weights)
        train_step(model, again, [rows])
        assert moved(read_parts(model), want) < 0.01 * moved(weights, want)

        wide = make_optimizer("adamw", model, 1e-2)
        restore_moments(model, wide, kept)
        assert_same(read_moments(model, wide)["exp_avg"], kept["exp_avg"])


def test_moments_of_other_rows_are_not_used(device: Device, spec: AdapterSpec) -> None:
    task = make_assignment(
        rank=4, rows="independent", keeps_state=True, update=Payload(4, "float32")
    )

    def same_rows(later: Assignment) -> bool:
        """Whether any module has the rows that it had in the first round."""
        return any(
            np.array_equal(*(slice_rows(spec, t, m.name) for t in (task, later)))
            for m in spec.modules
        )

    later = next(t for t in (replace(task, round=n) for n in range(2, 99)) if not same_rows(t))
    adapter = make_adapter(spec, 4)
    device.round(spec, task, adapter)
    _, sent = device.round(spec, later, adapter)
    device.home.unlink()
    _, anew = device.round(spec, later, adapter)
    assert_same(sent, anew)
    _, on = device.round(spec, later, adapter)
    assert moved(on, anew) > 1e-3, "the same rows go on"


def test_moments_of_a_part_that_rests_are_there_when_its_turn_comes(
    device: Device, spec: AdapterSpec
) -> None:
    """RoLoRA's factors take turns."""
    adapter = make_adapter(spec, K)
    for part in ("up", "down"):
        task = make_assignment(
            trained=(part,), update=Payload(K, "float32", (part,)), keeps_state=True
        )
        _, sent = device.round(spec, task, adapter)
        adapter = plus(adapter, sent)
    home = load_home(device.home, spec)
    for name, parts in home.moments["exp_avg"].items():
        assert parts.keys() == {"up", "down"}, name
    assert {float(p) for x in home.moments["step"].values() for p in x.values()} == {4.0}


# --- error feedback -----------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["float32", "int8"])
def test_what_was_sent_and_what_is_left_add_up_to_what_was_trained(
    device: Device, spec: AdapterSpec, encoding: Any
) -> None:
    """Over rounds whose rows differ: sum of C(delta + e) plus the last e is the sum of deltas."""
    sums = {
        what: {
            m.name: {
                "up": np.zeros((spec.rank, m.out_features), np.float64),
                "down": np.zeros((spec.rank, m.in_features), np.float64),
            }
            for m in spec.modules
        }
        for what in ("trained", "sent")
    }
    adapter = make_adapter(spec, spec.rank)
    for round_ in range(4):
        task = make_assignment(rows="independent", round=round_, seed=round_, rank=3)
        rows = {m.name: slice_rows(spec, task, m.name) for m in spec.modules}
        cut: dict[str, Parts] = {
            n: {p: v[rows[n]] for p, v in parts.items()} for n, parts in adapter.items()
        }
        _, trained = device.round(spec, replace(task, update=Payload(3, "float32")), cut)
        thin = Payload(3, encoding, ("up", "down"), density=0.2)
        _, sent = device.round(spec, replace(task, update=thin, error_feedback=True), cut)
        kept = sum(np.count_nonzero(v) for x in sent.values() for v in x.values())
        assert kept <= np.ceil(0.2 * 3 * spec.parameters_per_rank)
        for what, delta in (("trained", trained), ("sent", sent)):
            for name, parts in delta.items():
                for part, values in parts.items():
                    sums[what][name][part][rows[name]] += values
    left = load_home(device.home, spec).residual
    assert norm_of(left) > 0.05
    for name, parts in left.items():
        for part, values in parts.items():
            want = sums["trained"][name][part]
            np.testing.assert_allclose(sums["sent"][name][part] + values, want, atol=1e-5)


def test_without_feedback_what_is_left_out_is_lost(device: Device, spec: AdapterSpec) -> None:
    thin = Payload(K, "float32", ("up", "down"), density=0.2)
    _, sent = device.round(spec, make_assignment(update=thin), make_adapter(spec, K))
    kept = sum(np.count_nonzero(v) for x in sent.values() for v in x.values())
    assert kept == np.ceil(0.2 * K * spec.parameters_per_rank)
    assert not device.home.exists()


def test_residuals_of_cores_and_whole_tensors_come_back_too(
    device: Device, spec: AdapterSpec
) -> None:
    whole = replace(spec, dense=(NORM,))
    thin = Payload(3, "int8", ("core", "dense"), density=0.2)
    task = make_assignment(
        rank=3, rows="independent", trained=("core", "dense"), update=thin, error_feedback=True,
    )  # fmt: skip
    adapter = make_adapter(whole, 3, parts=ALL)
    for round_ in range(2):
        now = replace(task, round=round_, seed=round_)
        known = load_home(device.home, whole).residual if device.home.exists() else {}
        loose = replace(
            now, error_feedback=False, update=replace(thin, encoding="float32", density=1.0)
        )
        _, delta = device.round(whole, loose, adapter, home_out=None)
        _, sent = device.round(whole, now, adapter)
        left = load_home(device.home, whole).residual
        for name, parts in delta.items():
            for part, values in parts.items():
                rows = slice_rows(whole, now, name) if part == "core" else None
                place: Any = ... if rows is None else np.ix_(rows, rows)
                shape = values.shape if rows is None else (whole.rank, whole.rank)
                before, after = (
                    e.get(name, {}).get(part, np.zeros(shape))[place] for e in (known, left)
                )
                np.testing.assert_allclose(sent[name][part] + after, values + before, atol=1e-5)


# --- Ditto --------------------------------------------------------------------------------------


def test_dittos_adapter_changes_nothing_that_is_sent(device: Device, spec: AdapterSpec) -> None:
    adapter = make_adapter(spec, K)
    alone, one = device.round(spec, make_assignment(), adapter)
    beside, two = device.round(spec, make_assignment(), adapter, personal_weight=0.1)
    assert_same(two, one)
    assert beside.evaluations[:2] == alone.evaluations
    assert (beside.train_loss, beside.trained_parameters) == (
        alone.train_loss, alone.trained_parameters,
    )  # fmt: skip
    assert beside.train_tokens == 2 * alone.train_tokens
    assert beside.evaluation("personal", "trained") is not None


def test_the_pull_holds_dittos_adapter_near_what_was_received(
    device: Device, spec: AdapterSpec
) -> None:
    received = make_adapter(spec, K)
    task = make_assignment(optimizer="sgd", learning_rate=0.05, local_steps=10)
    away = []
    for weight in (1e-12, 3.0, 10.0):
        device.home.unlink(missing_ok=True)
        report, sent = device.round(spec, task, received, personal_weight=weight)
        away.append(moved(load_home(device.home, spec).personal, received))
        if weight < 1e-9:
            assert away[0] == pytest.approx(norm_of(sent), rel=1e-5), "the same steps"
            want = pytest.approx(loss_of(report, "slice", "trained"), rel=1e-6)
            assert loss_of(report, "personal", "trained") == want
    assert away[0] > 1.1 * away[1] > 1.2 * away[2] > 0, away


def test_dittos_adapter_goes_on_from_home_unless_its_rows_changed(
    device: Device, spec: AdapterSpec
) -> None:
    task = make_assignment(optimizer="sgd", learning_rate=1e-9)  # stays where it starts
    one, two = make_adapter(spec, K, seed=1), make_adapter(spec, K, seed=2)
    device.round(spec, task, one, personal_weight=0.1)
    device.round(spec, task, two, personal_weight=0.1)
    assert_same(load_home(device.home, spec).personal, one, atol=1e-5)
    wider = make_adapter(spec, 3)
    device.round(
        spec, replace(task, rank=3, update=Payload(3, "float32")), wider, personal_weight=0.1
    )
    assert_same(load_home(device.home, spec).personal, wider, atol=1e-5)
    device.round(spec, task, one, personal_weight=0.1)
    device.round(spec, replace(task, keeps_basis=False), two, personal_weight=0.1)
    assert_same(load_home(device.home, spec).personal, two, atol=1e-5)


def test_dittos_adapter_takes_what_is_not_trained_from_the_fleet(
    device: Device, spec: AdapterSpec
) -> None:
    """Fed-SB's bases after a round of ordinary factors: its own core belongs between those."""
    task = make_assignment(optimizer="sgd", learning_rate=1e-9)  # stays where it starts
    ordinary = make_adapter(spec, K, seed=1)
    device.round(spec, task, ordinary, personal_weight=0.1)
    bases = make_adapter(spec, K, seed=2)
    for name, parts in bases.items():
        bases[name] = {**parts, "core": np.full((K, K), 0.01, np.float32)}
    later = replace(task, trained=("core",), update=Payload(K, "float32", ("core",)))
    device.round(spec, later, bases, personal_weight=0.1)
    assert_same(load_home(device.home, spec).personal, bases, atol=1e-5)
