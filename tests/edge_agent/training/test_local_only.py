"""The adapter that is never merged: what it starts from, that it goes on, and that it costs the
fleet nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edge_agent.training import local_round
from edge_agent.training.home import load_home
from edge_agent.training.local_only import starting_local, truncated
from edge_agent.training.workbench import Workbench
from protos.contract import AdapterSpec, Payload
from protos.sketch import initial_down
from tests.edge_agent.training.rounds import (
    ALL,
    Device,
    K,
    assert_same,
    make_adapter,
    make_assignment,
    only,
    report_of,
    run,
)
from tests.edge_agent.training.test_resume import cut_at, everything


def product(spec: AdapterSpec, adapter: Any, module: str) -> np.ndarray:
    up, down = adapter[module]["up"].astype(float), adapter[module]["down"].astype(float)
    return spec.alpha / spec.divisor(len(up)) * up.T @ down


def test_it_starts_from_the_runs_initial_adapter(spec: AdapterSpec) -> None:
    start = starting_local(spec, 3, {})
    for m in spec.modules:
        whole = initial_down(spec.seed, m.name, spec.rank, m.in_features)
        assert np.array_equal(start[m.name]["down"], whole[:3])
        assert not start[m.name]["up"].any()


def test_more_rows_change_nothing_and_fewer_keep_the_best_of_it(spec: AdapterSpec) -> None:
    kept = make_adapter(spec, 4)
    name = spec.modules[0].name
    assert starting_local(spec, 4, kept)[name]["up"] is kept[name]["up"]
    wider = starting_local(spec, 6, kept)
    np.testing.assert_allclose(
        product(spec, wider, name), product(spec, kept, name), rtol=1e-4, atol=1e-7
    )
    drawn = initial_down(spec.seed, name, spec.rank, spec.modules[0].in_features)
    assert np.array_equal(wider[name]["down"][4:], drawn[4:6])

    fewer = starting_local(spec, 2, kept)
    u, s, v = np.linalg.svd(product(spec, kept, name))
    want = u[:, :2] * s[:2] @ v[:2]
    np.testing.assert_allclose(product(spec, fewer, name), want, atol=1e-5 * s[0])


def test_truncation_of_nothing_is_nothing() -> None:
    up, down = truncated(np.zeros((4, 7), np.float32), np.ones((4, 5), np.float32), 2)
    assert up.shape == (2, 7) and down.shape == (2, 5)
    assert not (up.T @ down).any() and np.isfinite(up).all() and np.isfinite(down).all()


def test_nothing_that_is_sent_or_kept_otherwise_changes(device: Device, spec: AdapterSpec) -> None:
    adapter, task = make_adapter(spec, K), make_assignment()
    alone, one = device.round(spec, task, adapter)
    beside, two = device.round(spec, replace(task, local_only=True), adapter)
    assert_same(two, one)
    assert beside.evaluations[:2] == alone.evaluations
    assert beside.train_loss == alone.train_loss
    assert beside.train_tokens == 2 * alone.train_tokens, "the same budget once more"
    assert [(e.subject, e.stage) for e in beside.evaluations] == [
        ("slice", "received"), ("slice", "trained"), ("local", "trained"),
    ]  # fmt: skip


def test_it_ends_where_a_slice_from_the_initial_adapter_ends(
    device: Device, spec: AdapterSpec
) -> None:
    """The same steps on the same rows: only what it starts from differs."""
    task = make_assignment(local_only=True, alpha=spec.alpha)
    report, sent = device.round(spec, task, starting_local(spec, K, {}))
    local = load_home(device.home, spec).local
    start = starting_local(spec, K, {})
    assert report.evaluation("local", "trained").loss == pytest.approx(  # type: ignore[union-attr]
        report.evaluation("slice", "trained").loss,
        rel=1e-6,  # type: ignore[union-attr]
    )
    for name, parts in sent.items():
        for part, delta in parts.items():
            np.testing.assert_allclose(local[name][part], start[name][part] + delta, atol=1e-6)


def test_it_goes_on_from_home_whatever_the_fleet_sends(device: Device, spec: AdapterSpec) -> None:
    still = make_assignment(local_only=True, optimizer="sgd", learning_rate=1e-12)
    moving = replace(still, learning_rate=0.05)
    device.round(spec, moving, make_adapter(spec, K, seed=1))
    first = load_home(device.home, spec).local
    assert first[spec.modules[0].name]["up"].any()
    device.round(spec, still, make_adapter(spec, K, seed=2))
    assert_same(load_home(device.home, spec).local, first, atol=1e-6)
    device.round(spec, replace(still, local_only=False), make_adapter(spec, K, seed=3))
    assert_same(load_home(device.home, spec).local, first, atol=1e-6)  # not asked for, not lost
    device.round(spec, replace(still, rank=3, update=Payload(3, "float32")), make_adapter(spec, 3))
    assert {len(parts["up"]) for parts in load_home(device.home, spec).local.values()} == {3}


@pytest.mark.parametrize("cut", [9, 11, 12])
def test_a_round_cut_while_it_trains_ends_with_the_same_bytes(
    device: Device, bench: Workbench, spec: AdapterSpec, cut: int, monkeypatch: Any
) -> None:
    """Steps 1 to 4 are the slice's, 5 to 8 Ditto's, 9 to 12 those of the adapter that stays."""
    monkeypatch.setattr(local_round, "CHECKPOINT_S", 0)
    monkeypatch.setattr(local_round, "CHECKPOINT_SHARE", 0)
    whole, task = everything(spec, local_only=True, evaluates_global=False)
    adapter = only(make_adapter(whole, 3, parts=ALL), "down", "core", "dense")
    path = device.folder / "round.checkpoint"
    job = device.job(whole, task, adapter, personal_weight=0.1, checkpoint_path=str(path))
    first = report_of(run(job, bench))
    want = device.update.read_bytes(), (device.folder / "home.new").read_bytes()
    device.update.unlink()
    cut_at(job, bench, cut)
    report = report_of(run(job, bench))
    assert (device.update.read_bytes(), (device.folder / "home.new").read_bytes()) == want
    assert report.resumed_step == cut
    assert report.evaluations == first.evaluations
