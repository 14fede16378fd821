"""A local round does what its assignment declares, whichever method is behind it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_agent.training.backbone import load_base
from edge_agent.training.batches import whole_rows
from edge_agent.training.optimizers import make_optimizer
from edge_agent.training.slice import attached, read_parts, write_parts
from edge_agent.training.steps import train_steps
from edge_agent.training.workbench import Workbench
from protos.contract import (
    AdapterSpec,
    Assignment,
    Objective,
    Payload,
    Pruning,
    UpdateBudget,
    from_plain,
    to_plain,
)
from protos.layout import Parts
from protos.sketch import initial_down
from protos.unpacking import unpack
from tests.edge_agent.training.rounds import (
    ALL,
    HEAD,
    NORM,
    Device,
    K,
    assert_same,
    at_start,
    loss_of,
    make_adapter,
    make_assignment,
    moved,
    norm_of,
    only,
    parts_of,
    plus,
    report_of,
    run,
)

# --- parts --------------------------------------------------------------------------------------


def test_a_frozen_part_is_bit_for_bit_what_was_received(device: Device, spec: AdapterSpec) -> None:
    task = make_assignment(trained=("up",))
    report, sent = device.round(spec, task, make_adapter(spec, K))
    assert report.trained_parameters == K * sum(m.out_features for m in spec.modules)
    for parts in sent.values():
        assert parts["up"].any() and not parts["down"].any()


def test_only_the_parts_asked_for_are_sent(device: Device, spec: AdapterSpec) -> None:
    task = make_assignment(trained=("up",), update=Payload(K, "float32", ("up",)))
    _, sent = device.round(spec, task, make_adapter(spec, K))
    assert parts_of(sent) == ("up",)


def test_a_byte_budget_is_kept_and_the_report_tells_what_was_chosen(
    device: Device, spec: AdapterSpec
) -> None:
    budget = UpdateBudget(700, ("int8", "int4", "int2", "sign"), sparse=True)
    task = make_assignment(update=Payload(K, "int8"), budget=budget, error_feedback=True)
    report, sent = device.round(spec, task, make_adapter(spec, K))
    assert device.update.stat().st_size <= 700
    assert report.sent is not None and report.sent.encoding in budget.encodings
    assert 0 < report.update_error < 1
    assert {curve.encoding for curve in report.error_curves} == set(budget.encodings)
    moved = [v for parts in sent.values() for v in parts.values()]
    assert any(v.any() for v in moved)
    assert device.home.exists(), "what was left out stays for the next round"


def test_parts_may_come_in_files_of_their_own(device: Device, spec: AdapterSpec) -> None:
    whole = make_adapter(spec, K)
    _, together = device.round(spec, make_assignment(), whole)
    _, apart = device.round(spec, make_assignment(), only(whole, "down"), only(whole, "up"))
    assert_same(apart, together)


def test_a_part_in_two_files_is_refused(
    device: Device, bench: Workbench, spec: AdapterSpec
) -> None:
    whole = make_adapter(spec, K)
    event = run(device.job(spec, make_assignment(), whole, only(whole, "up")), bench)[-1]
    assert event["outcome"] == "base_mismatch" and "two files hold" in event["message"]


def test_a_sparse_slice_is_zeros_elsewhere(
    device: Device, bench: Workbench, spec: AdapterSpec
) -> None:
    whole = make_adapter(spec, K)
    job = device.job(spec, make_assignment(), whole)
    ref, path = device.blob("thin", spec, K, whole, density=0.25)
    task = replace(from_plain(Assignment, job["assignment"]), slice=(ref,))
    thin = unpack(Path(path).read_bytes(), spec, ref.payload)
    assert (
        0
        < sum(np.count_nonzero(v) for x in thin.values() for v in x.values())
        <= (np.ceil(0.25 * K * spec.parameters_per_rank))
    )
    sparse = report_of(run(job | {"assignment": to_plain(task), "slice_paths": [path]}, bench))
    written_out = report_of(run(device.job(spec, make_assignment(), thin), bench))
    assert sparse.evaluations == written_out.evaluations


def test_what_nobody_has_starts_as_zeros(device: Device, spec: AdapterSpec) -> None:
    base_alone, _ = device.round(spec, make_assignment(local_steps=0, evaluates_global=True))
    report, sent = device.round(spec, make_assignment(), only(make_adapter(spec, K), "down"))
    assert loss_of(report, "slice", "received") == loss_of(base_alone, "global", "received")
    assert all(parts["up"].any() for parts in sent.values())


def test_a_fresh_slice_is_the_devices_own_draw_for_the_round(
    device: Device, spec: AdapterSpec
) -> None:
    drawn: dict[str, Parts] = {
        m.name: {
            "up": np.zeros((K, m.out_features), np.float32),
            "down": initial_down(
                spec.seed, m.name, K, m.in_features, round_=5, device_id="d1"
            ),
        }
        for m in spec.modules
    }  # fmt: skip
    _, fresh = device.round(spec, make_assignment(round=5, fresh=True))
    _, given = device.round(spec, make_assignment(round=5), drawn)
    assert_same(fresh, given)
    _, later = device.round(spec, make_assignment(round=6, fresh=True))
    assert moved(later, fresh) > 0


def test_a_core_alone_is_trained_between_frozen_factors(device: Device, spec: AdapterSpec) -> None:
    whole = make_adapter(spec, K, parts=("up", "down", "core"))
    task = make_assignment(trained=("core",), update=Payload(K, "float32", ("core",)))
    report, sent = device.round(spec, task, only(whole, "up", "down"), only(whole, "core"))
    assert report.trained_parameters == K * K * len(spec.modules)
    assert parts_of(sent) == ("core",)
    assert loss_of(report, "slice", "trained") < loss_of(report, "slice", "received")
    # The same product as a stock adapter has the same loss.
    folded: dict[str, Parts] = {
        name: {"up": parts["core"].T @ parts["up"], "down": parts["down"]}
        for name, parts in plus(whole, sent).items()
    }
    stock, _ = device.round(spec, make_assignment(), folded)
    want = pytest.approx(loss_of(report, "slice", "trained"), rel=1e-5)
    assert loss_of(stock, "slice", "received") == want


def test_alpha_is_the_assignments(device: Device, spec: AdapterSpec) -> None:
    whole = make_adapter(spec, K)
    louder: dict[str, Parts] = {
        n: {"up": 2 * p["up"], "down": p["down"]} for n, p in whole.items()
    }  # fmt: skip
    twice, _ = device.round(spec, make_assignment(alpha=32.0), whole)
    once, _ = device.round(spec, make_assignment(alpha=16.0), louder)
    want = pytest.approx(loss_of(once, "slice", "received"), rel=1e-5)
    assert loss_of(twice, "slice", "received") == want


def test_tensors_trained_whole_travel_as_differences(device: Device, spec: AdapterSpec) -> None:
    whole = replace(spec, dense=(NORM, HEAD))
    parts = ("up", "down", "dense")
    task = make_assignment(trained=parts, update=Payload(K, "float32", parts), optimizer="sgd",
                           learning_rate=0.1)  # fmt: skip
    received = make_adapter(whole, K, parts=parts)
    report, sent = device.round(whole, task, only(received, "up", "down"), only(received, "dense"))
    assert all(sent[t.name]["dense"].any() for t in whole.dense)
    dense = sum(t.out_features * t.in_features for t in whole.dense)
    assert report.trained_parameters == K * spec.parameters_per_rank + dense
    again, _ = device.round(whole, task, plus(received, sent))
    want = pytest.approx(loss_of(report, "slice", "trained"), rel=1e-5)
    assert loss_of(again, "slice", "received") == want


def test_an_assignment_that_trains_nothing_is_refused(
    device: Device, bench: Workbench, spec: AdapterSpec
) -> None:
    event = run(device.job(spec, make_assignment(trained=("dense",))), bench)[-1]
    assert event["outcome"] == "crashed" and "trains" in event["message"]


def test_files_that_the_assignment_does_not_name_are_refused(
    device: Device, bench: Workbench, spec: AdapterSpec
) -> None:
    job = device.job(spec, make_assignment(), make_adapter(spec, K))
    for wrong in (
        {"slice_paths": []},
        {"global_paths": job["slice_paths"]},
        {"side_path": job["slice_paths"][0]},
        {"update_path": None},
    ):
        assert run(job | wrong, bench)[-1]["outcome"] == "crashed", wrong


# --- the whole adapter and the branch -----------------------------------------------------------


def test_the_global_model_may_be_the_base_and_a_branch(device: Device, spec: AdapterSpec) -> None:
    task = make_assignment(local_steps=0, evaluates_global=True)
    whole = make_adapter(spec, spec.rank)
    branch: dict[str, Parts] = {
        n: {"up": spec.scale(spec.rank) * p["up"], "down": p["down"]} for n, p in whole.items()
    }
    as_adapter, _ = device.round(spec, task, whole=(only(whole, "up"), only(whole, "down")))
    as_branch, _ = device.round(spec, task, global_side=branch)
    alone, _ = device.round(spec, task)
    losses = [loss_of(r, "global", "received") for r in (as_adapter, as_branch, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[0] - losses[2]) > 1e-3


def test_a_global_core_is_evaluated(device: Device, spec: AdapterSpec) -> None:
    task = make_assignment(local_steps=0, evaluates_global=True)
    whole = make_adapter(spec, spec.rank, parts=("up", "down", "core"))
    folded: dict[str, Parts] = {
        n: {"up": p["core"].T @ p["up"], "down": p["down"]} for n, p in whole.items()
    }
    cored, stock = (device.round(spec, task, whole=(w,))[0] for w in (whole, folded))
    want = pytest.approx(loss_of(stock, "global", "received"), rel=1e-5)
    assert loss_of(cored, "global", "received") == want


def test_training_sees_the_branch_and_the_global_model_its_own(
    device: Device, spec: AdapterSpec
) -> None:
    """Rows that are not trained may stand beside those that are: together they are the whole."""
    whole, k = make_adapter(spec, spec.rank), 3
    scale = spec.scale(spec.rank)
    task = make_assignment(
        rank=k, evaluates_global=True, alpha=scale * k, update=Payload(k, "float32")
    )
    own: dict[str, Parts] = {n: {p: v[:k] for p, v in x.items()} for n, x in whole.items()}
    rest: dict[str, Parts] = {
        n: {"up": scale * x["up"][k:], "down": x["down"][k:]} for n, x in whole.items()
    }
    report, _ = device.round(spec, task, own, side=rest, whole=(whole,))
    want = pytest.approx(loss_of(report, "global", "received"), rel=1e-5)
    assert loss_of(report, "slice", "received") == want


# --- what is minimised --------------------------------------------------------------------------


def test_a_fair_objective_changes_the_steps_and_not_the_loss_that_is_told(
    device: Device, spec: AdapterSpec
) -> None:
    task = make_assignment(local_steps=1, optimizer="sgd", learning_rate=0.05)
    plain, one = device.round(spec, task, make_adapter(spec, K))
    fair, two = device.round(
        spec, replace(task, objective=Objective(ceiling=100.0, margin=0.1)), make_adapter(spec, K)
    )
    assert fair.train_loss == plain.train_loss
    assert norm_of(two) < 0.5 * norm_of(one), "weighted by one in about ninety"


@pytest.mark.parametrize(
    ("penalty", "keep", "kept"), [(50.0, 0.5, 2), (50.0, 1.0, 0), (0.0, 0.5, 0)]
)
def test_a_tail_that_shrank_may_be_dropped(
    device: Device, spec: AdapterSpec, penalty: float, keep: float, kept: int
) -> None:
    adapter = make_adapter(spec, 4)
    if penalty == 0:
        for parts in adapter.values():
            parts["up"][2:] = 0  # nothing is below zero
    task = make_assignment(
        rank=4, update=Payload(4, "float32"), pruning=Pruning(keep, penalty), optimizer="sgd",
        learning_rate=0.02,
    )  # fmt: skip
    report, sent = device.round(spec, task, adapter)
    assert report.kept_rank == kept
    assert all(np.isfinite(v).all() for x in sent.values() for v in x.values())


def test_a_tail_that_starts_as_zeros_trains_on(device: Device, spec: AdapterSpec) -> None:
    task = make_assignment(rank=4, update=Payload(4, "float32"), pruning=Pruning(0.5, 0.01))
    report, sent = device.round(spec, task, at_start(spec, 4))
    assert report.kept_rank == 0
    assert all(parts["up"][2:].any() for parts in sent.values())


# --- together -----------------------------------------------------------------------------------


def everything(spec: AdapterSpec, precision: Any = "fp32") -> tuple[AdapterSpec, Assignment]:
    """Every declaration at once."""
    whole = replace(spec, dense=(NORM, HEAD))
    task = make_assignment(
        rank=3,
        precision=precision,
        trained=ALL,
        personal=("up",),
        update=Payload(3, "int8", ("down", "core", "dense"), density=0.5),
        keeps_state=True,
        error_feedback=True,
        evaluates_global=True,
        checkpointing=True,
        local_steps=2,
        objective=Objective(20.0, 0.2),
        pruning=Pruning(0.7, 1e-3),
    )
    return whole, task


def test_the_same_rounds_give_the_same_bytes_in_update_and_home(
    device: Device, spec: AdapterSpec
) -> None:
    whole, task = everything(spec)
    adapter = only(make_adapter(whole, 3, parts=ALL), "down", "core", "dense")
    found = []
    for _ in range(2):
        device.home.unlink(missing_ok=True)
        for round_ in range(2):
            device.round(
                whole, replace(task, round=round_), adapter, side=make_adapter(whole, 2, seed=9),
                whole=(only(make_adapter(whole, 8, parts=ALL), "down", "core", "dense"),),
                personal_weight=0.1,
            )  # fmt: skip
            found.append((device.update.read_bytes(), device.home.read_bytes()))
    assert found[0] == found[2] and found[1] == found[3]
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]


@pytest.mark.parametrize("precision", ["fp32", "nf4", "int8"])
def test_the_base_is_untouched_after_everything(
    device: Device, bench: Workbench, spec: AdapterSpec, precision: Any
) -> None:
    whole, task = everything(spec, precision)
    base = bench.base(device.base_folder, precision, spec).model
    before = {n: v.clone() for n, v in base.state_dict().items() if hasattr(v, "clone")}
    names = [(n, type(m)) for n, m in base.named_modules()]
    adapter = only(make_adapter(whole, 3, parts=ALL), "down", "core", "dense")
    report, _ = device.round(
        whole, task, adapter, side=make_adapter(whole, 2, seed=9), personal_weight=0.1
    )
    subjects = [(e.subject, e.stage) for e in report.evaluations]
    assert subjects == [
        ("global", "received"), ("slice", "received"), ("slice", "trained"),
        ("personal", "trained"),
    ]  # fmt: skip
    after = bench.base(device.base_folder, precision, spec).model
    assert after is base
    assert [(n, type(m)) for n, m in after.named_modules()] == names
    for name, values in before.items():
        assert torch.equal(after.state_dict()[name], values), name
    assert not any(p.requires_grad for p in after.parameters())


def test_a_base_in_bfloat16_keeps_small_steps_of_whole_tensors(
    base_folder: Path, spec: AdapterSpec
) -> None:
    base = load_base(base_folder, "fp32", torch.device("cpu"))
    base.model.to(torch.bfloat16)
    whole = replace(spec, dense=(NORM,))
    rows = whole_rows(np.random.default_rng(0).integers(0, 250, (8, 24), dtype=np.int64))
    task = make_assignment(learning_rate=1e-4, sequence_tokens=24)
    with attached(base.model, whole, 2, alpha=16.0, trained=("dense",)) as model:
        write_parts(model, make_adapter(whole, 2, parts=("up", "down", "dense")))
        before = read_parts(model)[NORM.name]["dense"]
        optimizer = make_optimizer("adamw", model, task.learning_rate)
        train_steps(model, optimizer, rows, task, lambda *_: None)
        step = np.abs(read_parts(model)[NORM.name]["dense"] - before)
    assert step.max() > 1e-4, "the weight is 1 and its next bfloat16 is 0.8 % away"
