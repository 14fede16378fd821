"""What a device minimises beside the plain loss, against the formulas of the papers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_agent.training import steps
from edge_agent.training.batches import whole_rows
from edge_agent.training.local_objective import (
    kept_rows,
    proportionally_fair,
    pull,
    tail_product,
)
from edge_agent.training.optimizers import make_optimizer
from edge_agent.training.slice import attached, parameters, write_parts
from edge_agent.training.steps import train_step
from edge_agent.training.workbench import Workbench
from protos.contract import AdapterSpec, Objective, Pruning
from tests.edge_agent.training.rounds import make_adapter

FAIR = Objective(ceiling=5.0, margin=0.5)
ROWS = [whole_rows(np.arange(48).reshape(2, 24))]


@pytest.fixture
def model(bench: Workbench, base_folder: Path, spec: AdapterSpec):
    return bench.base(base_folder, "fp32", spec).model


def value_and_slope(loss: float, objective: Objective) -> tuple[float, float]:
    x = torch.tensor(loss, dtype=torch.float64, requires_grad=True)
    y = proportionally_fair(x, objective)
    y.backward()
    assert x.grad is not None
    return float(y.detach()), float(x.grad)


@pytest.mark.parametrize("loss", [0.0, 1.0, 3.2, 4.4999])
def test_the_fair_loss_is_the_logarithm_of_what_is_left(loss: float) -> None:
    value, slope = value_and_slope(loss, FAIR)
    assert value == pytest.approx(-math.log(1 - loss / 5.0))
    assert slope == pytest.approx(1 / (5.0 - loss))


@pytest.mark.parametrize("loss", [4.6, 5.0, 50.0])
def test_beyond_the_margin_it_goes_on_along_its_tangent(loss: float) -> None:
    value, slope = value_and_slope(loss, FAIR)
    assert value == pytest.approx(-math.log(0.5 / 5.0) + (loss - 5.0 + 0.5) / 0.5)
    assert slope == pytest.approx(1 / 0.5)


def test_value_and_slope_are_continuous_where_the_two_meet() -> None:
    joint = FAIR.ceiling - FAIR.margin
    below, at, above = (value_and_slope(joint + d, FAIR) for d in (-1e-7, 0.0, 1e-7))
    for one, other in ((below, at), (at, above)):
        assert one == pytest.approx(other, abs=1e-5)
    assert at[1] == pytest.approx(1 / FAIR.margin)


def test_a_fair_step_reports_the_plain_loss_and_scales_the_gradient(
    model, spec: AdapterSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "CLIP_NORM", 1e9)
    losses, grads = [], []
    for objective in (None, Objective(ceiling=9.0, margin=0.1)):
        with attached(model, spec, 2, alpha=16.0) as peft_model:
            write_parts(peft_model, make_adapter(spec, 2))
            optimizer = make_optimizer("sgd", peft_model, 0.0)
            losses.append(train_step(peft_model.train(), optimizer, ROWS, objective))
            trained = [p for p in peft_model.parameters() if p.requires_grad]
            grads.append(torch.cat([p.grad.ravel() for p in trained]))
    assert losses[0] == losses[1]
    torch.testing.assert_close(grads[1], grads[0] / (9.0 - losses[0]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("keep", "rank", "want"),
    [(0.99, 8, 7), (0.5, 8, 4), (1.0, 8, 8), (0.05, 4, 1), (0.29, 100, 29)],
)
def test_the_tail_begins_at_the_floor_and_one_row_stays(keep, rank, want) -> None:
    assert kept_rows(Pruning(keep, 0.1), rank) == want


def test_the_tail_is_measured_by_the_product_of_its_norms(model, spec: AdapterSpec) -> None:
    adapter = make_adapter(spec, 4)
    with attached(model, spec, 4, alpha=16.0) as peft_model:
        write_parts(peft_model, adapter)
        got = float(tail_product(peft_model, 3).detach())
    want = sum(
        np.linalg.norm(parts["up"][3:]) * np.linalg.norm(parts["down"][3:])
        for parts in adapter.values()
    )
    assert got == pytest.approx(want, rel=1e-5)


def test_a_tail_of_zeros_has_a_gradient(model, spec: AdapterSpec) -> None:
    adapter = make_adapter(spec, 4)
    for parts in adapter.values():
        parts["up"][:] = 0
    with attached(model, spec, 4, alpha=16.0) as peft_model:
        write_parts(peft_model, adapter)
        tail_product(peft_model, 2).backward()
        for parts in parameters(peft_model).values():
            for part, weight in parts.items():
                assert weight.grad is not None and torch.isfinite(weight.grad).all(), part
                assert not weight.grad.any()


def test_ditto_steps_by_the_gradient_and_the_pull(
    model, spec: AdapterSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """v <- v - eta (grad f(v) + lambda (v - w)), arXiv 2012.04221."""
    monkeypatch.setattr(steps, "CLIP_NORM", 1e9)
    received, own = make_adapter(spec, 2, seed=1), make_adapter(spec, 2, seed=2)
    eta, weight = 0.05, 0.7

    def trained(term_weight: float) -> dict[str, torch.Tensor]:
        with attached(model, spec, 2, alpha=16.0, trained=("up",)) as peft_model:
            write_parts(peft_model, received)
            term = pull(peft_model, term_weight)
            write_parts(peft_model, own)
            optimizer = make_optimizer("sgd", peft_model, eta)
            train_step(peft_model.train(), optimizer, ROWS, term=term)
            return {n: p["up"].detach().clone() for n, p in parameters(peft_model).items()}

    plain, pulled = trained(0.0), trained(weight)
    for name, parts in received.items():
        away = torch.from_numpy((own[name]["up"] - parts["up"]).T)
        torch.testing.assert_close(pulled[name], plain[name] - eta * weight * away)
