"""A round whose process died goes on where it was, and ends with the same bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from edge_agent.training import local_round, resume, steps
from edge_agent.training.jobs import run_job
from edge_agent.training.workbench import Workbench
from protos.contract import AdapterSpec, Assignment, Objective, Payload, Pruning
from tests.edge_agent.training.rounds import (
    ALL,
    HEAD,
    NORM,
    Device,
    K,
    make_adapter,
    make_assignment,
    only,
    report_of,
    run,
)


class PowerCutError(BaseException):
    """Nothing in the trainer may catch it."""


@pytest.fixture(autouse=True)
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint at every step, however fast and however slow writing is."""
    monkeypatch.setattr(local_round, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(local_round, "CHECKPOINT_SHARE", 0)


def cut_at(job: dict[str, Any], bench: Workbench, progress: int) -> None:
    """The job, until it tells its progress for that time."""
    left = progress

    def emit(event: Any) -> None:
        nonlocal left
        left -= event["event"] == "progress"
        if left == 0:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        run_job(job, bench, emit)


def everything(spec: AdapterSpec, **changes: Any) -> tuple[AdapterSpec, Assignment]:
    """Every part trained, moments kept, a pruning objective: what a checkpoint must not lose."""
    task = make_assignment(
        rank=3, trained=ALL, personal=("up",), keeps_state=True, error_feedback=True,
        update=Payload(3, "int8", ("down", "core", "dense"), density=0.5), local_steps=4,
        objective=Objective(20.0, 0.2), pruning=Pruning(0.7, 1e-3), evaluates_global=True,
    )  # fmt: skip
    return replace(spec, dense=(NORM, HEAD)), replace(task, **changes)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
@pytest.mark.parametrize("cuts", [(1,), (3,), (4,), (5,), (8,), (2, 1, 3)])
def test_a_round_that_was_cut_ends_with_the_same_bytes(
    device: Device, bench: Workbench, spec: AdapterSpec, optimizer: str, cuts: tuple[int, ...]
) -> None:
    """Steps 1 to 4 are the slice's, 5 to 8 those of the device's own adapter."""
    whole, task = everything(spec, optimizer=optimizer)
    adapter = only(make_adapter(whole, 3, parts=ALL), "down", "core", "dense")
    path = device.folder / "round.checkpoint"
    job = device.job(
        whole, task, adapter, personal_weight=0.1, checkpoint_path=str(path),
        whole=(only(make_adapter(whole, 8, parts=ALL), "down", "core", "dense"),),
    )  # fmt: skip
    first = report_of(run(job, bench))
    want = device.update.read_bytes(), (device.folder / "home.new").read_bytes()
    assert not path.exists(), "nothing to resume is left of a round that ended"
    device.update.unlink()

    for progress in cuts:
        cut_at(job, bench, progress)
        assert path.exists() and not device.update.exists()
    report = report_of(run(job, bench))
    assert (device.update.read_bytes(), (device.folder / "home.new").read_bytes()) == want
    assert report.resumed_step == sum(cuts)
    assert first.resumed_step == 0
    assert report.evaluations == first.evaluations
    told = ("train_loss", "train_tokens", "kept_rank", "trained_parameters")
    assert [getattr(report, name) for name in told] == [getattr(first, name) for name in told]
    assert not path.exists()


def test_checkpointed_layers_resume_alike(
    device: Device, bench: Workbench, spec: AdapterSpec
) -> None:
    task = make_assignment(checkpointing=True, precision="nf4", micro_batch=1)
    path = device.folder / "round.checkpoint"
    job = device.job(spec, task, make_adapter(spec, K), checkpoint_path=str(path))
    run(job, bench)
    want = device.update.read_bytes()
    cut_at(job, bench, 2)
    assert report_of(run(job, bench)).resumed_step == 2
    assert device.update.read_bytes() == want


def test_a_checkpoint_is_a_safetensors_file_without_text_of_the_code(
    device: Device, bench: Workbench, spec: AdapterSpec
) -> None:
    path = device.folder / "round.checkpoint"
    job = device.job(
        spec, make_assignment(optimizer="adamw8bit"), make_adapter(spec, K),
        checkpoint_path=str(path),
    )  # fmt: skip
    cut_at(job, bench, 2)
    with safe_open(path, framework="np") as file:
        names = set(file.keys())
        assert {name.split("/")[0] for name in names} == {"weight", "state", "random", "crc32"}
        assert all(np.isfinite(file.get_tensor(n)).all() for n in names if n.startswith("weight"))
    assert b"weigh_" not in path.read_bytes()
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 1e-3}, {"assignment_id": "a2"}, {"seed": 8}, {"round": 2},
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_assignment_is_ignored(
    device: Device, bench: Workbench, spec: AdapterSpec, change: dict[str, Any]
) -> None:
    path = str(device.folder / "round.checkpoint")
    task, adapter = make_assignment(), make_adapter(spec, K)
    cut_at(device.job(spec, task, adapter, checkpoint_path=path), bench, 2)
    other = device.job(spec, replace(task, **change), adapter, checkpoint_path=path)
    assert report_of(run(other, bench)).resumed_step == 0


@pytest.mark.parametrize("damage", ["empty", "half", "one bit", "other text"])
def test_a_damaged_checkpoint_is_ignored_and_told(
    device: Device, bench: Workbench, spec: AdapterSpec, damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path = device.folder / "round.checkpoint"
    job = device.job(spec, make_assignment(), make_adapter(spec, K), checkpoint_path=str(path))
    run(job, bench)
    want = device.update.read_bytes()
    cut_at(job, bench, 2)
    data = bytearray(path.read_bytes())
    match damage:
        case "empty":
            data = bytearray()
        case "half":
            data = data[: len(data) // 2]
        case "one bit":
            data[len(data) // 2] ^= 4
        case "other text":
            data = data.replace(b'\\"step\\"', b'\\"stop\\"') + b"x"
    path.write_bytes(data)
    assert report_of(run(job, bench)).resumed_step == 0
    assert "checkpoint damaged" in caplog.text
    assert device.update.read_bytes() == want


def test_a_checkpoint_of_other_shapes_begins_anew(
    device: Device, bench: Workbench, spec: AdapterSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = device.folder / "round.checkpoint"
    job = device.job(spec, make_assignment(), make_adapter(spec, K), checkpoint_path=str(path))
    cut_at(job, bench, 2)
    read = resume.read_snapshot

    def shorter(*given: Any) -> Any:
        found = read(*given)
        assert found is not None
        return replace(found, training=replace(found.training, weights=found.training.weights[:-1]))

    monkeypatch.setattr(local_round, "read_snapshot", shorter)
    report = report_of(run(job, bench))
    assert report.resumed_step == 0 and len(report.evaluations) == 2


def test_a_full_disk_costs_the_checkpoint_and_not_the_round(
    device: Device, bench: Workbench, spec: AdapterSpec
) -> None:
    path = device.folder / "no such folder" / "round.checkpoint"
    job = device.job(spec, make_assignment(), make_adapter(spec, K), checkpoint_path=str(path))
    assert report_of(run(job, bench)).outcome == "done"


def test_a_round_that_diverged_leaves_nothing_to_resume(
    device: Device, bench: Workbench, spec: AdapterSpec
) -> None:
    path = device.folder / "round.checkpoint"
    task = make_assignment(optimizer="sgd", learning_rate=1e30, local_steps=6)
    job = device.job(spec, task, make_adapter(spec, K), checkpoint_path=str(path))
    assert run(job, bench)[-1]["outcome"] == "crashed"
    assert not path.exists()


def test_writing_takes_a_small_share_of_the_time(
    device: Device, bench: Workbench, spec: AdapterSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_round, "CHECKPOINT_SHARE", 10**6)
    written: list[int] = []
    monkeypatch.setattr(
        local_round, "write_snapshot", lambda *given: written.append(given[2].training.steps.done)
    )
    path = str(device.folder / "round.checkpoint")
    run(device.job(spec, make_assignment(), make_adapter(spec, K), checkpoint_path=path), bench)
    assert written == [0], "after the first, which took a moment, none is due for long"


def test_float16_gradients_are_scaled_and_the_scale_is_kept(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    model = torch.nn.Module()
    model.weight = weight
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = steps.make_scaler(torch.float16, torch.device("cpu"))
    assert scaler is not None and steps.make_scaler(torch.bfloat16, torch.device("cpu")) is None
    scaler.scale(weight.sum()).backward()
    assert weight.grad is not None and weight.grad[0] > 1000
    scaler.step(optimizer)
    scaler.update()
    assert torch.allclose(weight, torch.full((3,), 0.9))
    scaler.load_state_dict(scaler.state_dict() | {"scale": 64.0})
    found = resume.capture(model, optimizer, scaler, steps.StepLog([1.0], [2.0]))
    snapshot = resume.Snapshot("slice", resume.RoundSoFar(), found, {}, {}, {})
    resume.write_snapshot(tmp_path / "c", "k", snapshot)
    again = resume.read_snapshot(tmp_path / "c", "k")
    assert again is not None
    fresh = steps.make_scaler(torch.float16, torch.device("cpu"))
    assert fresh is not None
    weight.data.zero_()
    resume.restore(model, optimizer, fresh, again.training)
    assert fresh.get_scale() == 64.0 and again.training.steps.losses == [1.0]
    assert torch.allclose(weight, torch.full((3,), 0.9))
