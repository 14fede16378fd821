import json
import os
import subprocess
import sys
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_agent.training import profiling, trainer
from edge_agent.training.backbone import Backbone
from edge_agent.training.jobs import run_job
from edge_agent.training.memory import OutOfMemoryError, is_out_of_memory
from edge_agent.training.workbench import Workbench
from profiles.device import ComputeProfile
from protos.contract import (
    AdapterSpec,
    Assignment,
    BlobRef,
    LocalReport,
    ProfileRequest,
    from_plain,
    to_plain,
)
from protos.packing import Factors, pack, unpack

ROOT = Path(__file__).parents[3]
K = 2


def make_assignment(**changes: Any) -> Assignment:
    facts: dict[str, Any] = {
        "assignment_id": "a1",
        "run_id": "run",
        "round": 1,
        "device_id": "d1",
        "method": "fslora",
        "rank": K,
        "sketch_offset": 0,
        "precision": "fp32",
        "sequence_tokens": 48,
        "micro_batch": 2,
        "accumulation": 2,
        "checkpointing": False,
        "local_steps": 4,
        "learning_rate": 5e-3,
        "optimizer": "adamw",
        "update_encoding": "float32",
        "evaluation_sequences": 8,
        "held_out_share": 0.25,
        "seed": 7,
        "deadline_s": 60.0,
        "reason": "",
        "slice": BlobRef("00" * 32, 1, "float32"),
    }
    return Assignment(**(facts | changes))


def make_slice(spec: AdapterSpec, k: int) -> dict[str, Factors]:
    """As in round 0: up is zero, down is drawn."""
    draw = np.random.default_rng(3)
    return {
        m.name: Factors(
            up=np.zeros((k, m.out_features), np.float32),
            down=draw.normal(size=(k, m.in_features)).astype(np.float32) * 0.1,
        )
        for m in spec.modules
    }


@pytest.fixture
def make_job(tmp_path: Path, base_folder: Path, code_folder: Path, spec: AdapterSpec):
    def make(assignment: Assignment, update: str = "update.bin", **changes: Any) -> dict[str, Any]:
        (tmp_path / "slice.bin").write_bytes(pack(spec, K, make_slice(spec, K), encoding="float32"))
        job = {
            "job": "train",
            "base_folder": str(base_folder),
            "spec": to_plain(spec),
            "assignment": to_plain(assignment),
            "slice_path": str(tmp_path / "slice.bin"),
            "global_path": None,
            "update_path": str(tmp_path / update),
            "data": {
                "include": [str(code_folder)],
                "exclude": [],
                "languages": [],
                "max_files": None,
            },
            "memory_cap_bytes": None,
        }
        return job | changes

    return make


def run(job: dict[str, Any], bench: Workbench) -> list[dict[str, Any]]:
    """Events of one job, as they would cross the pipe."""
    events: list[dict[str, Any]] = []
    try:
        run_job(json.loads(json.dumps(job)), bench, lambda e: events.append(dict(e)))
    except Exception as error:  # noqa: BLE001
        events.append(trainer.describe(error))
    return events


def report_of(events: list[dict[str, Any]]) -> LocalReport:
    assert events[-1]["event"] == "result", events[-1]
    return from_plain(LocalReport, events[-1]["report"])


def test_a_round_trains_the_slice_and_reports_it(
    make_job, bench: Workbench, spec: AdapterSpec, tmp_path: Path
) -> None:
    task = make_assignment()
    events = run(make_job(task), bench)
    report = report_of(events)
    assert [e["step"] for e in events[:-1]] == [1, 2, 3, 4]
    assert report.outcome == "done"
    assert report.trained_parameters == K * spec.parameters_per_rank
    assert report.train_tokens == 4 * 2 * 2 * 48
    assert report.train_examples > 8
    assert report.main_language == "python"
    assert report.peak_bytes > 1e8
    received, trained = (report.evaluation("slice", s) for s in ("received", "trained"))
    assert received is not None and trained is not None
    assert trained.loss < received.loss, "a few steps on repetitive code must help"
    assert received.tokens == 8 * 47

    delta = unpack((tmp_path / "update.bin").read_bytes(), spec, K, assignment_digest=task.digest)
    assert all(np.abs(f.up).max() > 0 for f in delta.values()), "up starts at zero and moves"
    assert not list(tmp_path.glob("*.tmp")), "an update is there whole or not at all"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_same_job_twice_gives_the_same_bytes(
    make_job, bench: Workbench, tmp_path: Path, checkpointing: bool
) -> None:
    task = make_assignment(checkpointing=checkpointing, update_encoding="int8")
    report_of(run(make_job(task, "one.bin"), bench))
    report_of(run(make_job(make_assignment(seed=8), "between.bin"), bench))
    report_of(run(make_job(task, "two.bin"), bench))
    one, between, two = ((tmp_path / f"{n}.bin").read_bytes() for n in ("one", "between", "two"))
    assert one == two
    assert one != between


def test_the_update_is_trained_minus_received(
    make_job, bench: Workbench, spec: AdapterSpec, tmp_path: Path
) -> None:
    """Adding the delta to what was received gives the loss that was reported as trained."""
    task = make_assignment(optimizer="sgd", learning_rate=0.5)
    report = report_of(run(make_job(task), bench))
    delta = unpack((tmp_path / "update.bin").read_bytes(), spec, K, assignment_digest=task.digest)
    moved = {
        n: Factors(up=f.up + delta[n].up, down=f.down + delta[n].down)
        for n, f in make_slice(spec, K).items()
    }
    job = make_job(replace(task, local_steps=1), "again.bin")
    (tmp_path / "slice.bin").write_bytes(pack(spec, K, moved, encoding="float32"))
    again = report_of(run(job, bench))
    trained, received = report.evaluation("slice", "trained"), again.evaluation("slice", "received")
    assert trained is not None and received is not None
    assert received.loss == pytest.approx(trained.loss, rel=1e-5)


def test_a_whole_adapter_is_evaluated_without_training(
    make_job, bench: Workbench, spec: AdapterSpec, tmp_path: Path
) -> None:
    whole = make_slice(spec, spec.rank)
    (tmp_path / "whole.bin").write_bytes(pack(spec, spec.rank, whole, encoding="int8"))
    task = make_assignment(slice=None, global_adapter=BlobRef("00" * 32, 1, "int8"))
    job = make_job(task, global_path=str(tmp_path / "whole.bin"), slice_path=None, update_path=None)
    report = report_of(run(job, bench))
    assert [(e.subject, e.stage) for e in report.evaluations] == [("global", "received")]
    assert report.trained_parameters == 0
    assert not (tmp_path / "update.bin").exists()


def test_checkpointing_is_switched_without_deprecated_calls(
    bench: Workbench, base_folder: Path, spec: AdapterSpec
) -> None:
    base = bench.base(base_folder, "fp32", spec)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for wanted in (True, True, False, False):
            base.checkpointing(wanted)
            on = [m.gradient_checkpointing for m in base.model.modules()
                  if hasattr(m, "gradient_checkpointing")]  # fmt: skip
            assert any(on) == wanted


def test_checkpointing_uses_the_old_names_where_there_are_no_others() -> None:
    calls: list[str] = []

    class Old:
        is_gradient_checkpointing = False

        def __getattr__(self, name: str) -> Any:
            if name.startswith(("activation", "is_activation")):
                raise AttributeError(name)
            return lambda *_: calls.append(name)

    old = Backbone(Old(), None, torch.float32, torch.device("cpu"))
    old.checkpointing(False)
    old.checkpointing(True)
    assert calls == ["gradient_checkpointing_enable", "enable_input_require_grads"]


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
def test_every_precision_trains_and_evaluates_more_than_once(
    make_job, base_folder: Path, precision: str
) -> None:
    own = Workbench(torch.device("cpu"))
    task = make_assignment(precision=precision, local_steps=2, checkpointing=True)
    first = report_of(run(make_job(task, "one.bin"), own))
    second = report_of(run(make_job(task, "two.bin"), own))
    assert first.evaluations == second.evaluations, "evaluating must not change the base"


def test_a_warm_trainer_reloads_neither_base_nor_rows(
    make_job, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_job(make_assignment()), bench)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded again")

    monkeypatch.setattr("edge_agent.training.workbench.load_base", refuse)
    monkeypatch.setattr("edge_agent.training.workbench.scan", refuse)
    report_of(run(make_job(make_assignment(round=2, seed=9)), bench))


def test_too_little_code_is_no_data(
    make_job, bench: Workbench, tmp_path: Path, code_folder: Path
) -> None:
    one = tmp_path / "one"
    one.mkdir()
    (one / "a.py").write_text("x = 1\n")
    job = make_job(make_assignment())
    for include in ([str(one)], [str(tmp_path / "absent")]):
        event = run(job | {"data": {"include": include}}, bench)[-1]
        assert (event["event"], event["outcome"]) == ("error", "no_data")
        assert event["message"]


def test_another_base_is_a_mismatch(make_job, bench: Workbench, spec: AdapterSpec) -> None:
    other = replace(spec, base_digest="00" * 32)
    event = run(make_job(make_assignment()) | {"spec": to_plain(other)}, bench)[-1]
    assert event["outcome"] == "base_mismatch"
    assert "000000000000" in event["message"]


def test_the_owners_cap_ends_the_job_with_numbers_and_the_next_one_runs(
    make_job, bench: Workbench, tmp_path: Path
) -> None:
    event = run(make_job(make_assignment(), memory_cap_bytes=50_000_000), bench)[-1]
    assert event["outcome"] == "out_of_memory"
    assert "0.05 GB" in event["message"]
    assert not (tmp_path / "update.bin").exists()
    report_of(run(make_job(make_assignment()), bench))


def test_a_diverged_round_is_told_as_such(make_job, bench: Workbench) -> None:
    task = make_assignment(optimizer="sgd", learning_rate=1e30, local_steps=6)
    event = run(make_job(task), bench)[-1]
    assert event["outcome"] == "crashed"
    assert "loss" in event["message"]


def test_failures_that_mean_memory_are_known() -> None:
    for error in (
        OutOfMemoryError("x"),
        MemoryError(),
        torch.OutOfMemoryError("x"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ):
        assert is_out_of_memory(error), error
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_an_unexpected_failure_does_not_quote_its_text() -> None:
    try:
        raise KeyError("def secret_code(): ...")
    except KeyError as error:
        event = trainer.describe(error)
    assert event["outcome"] == "crashed"
    assert "secret_code" not in json.dumps(event)
    assert "KeyError" in event["message"]


@pytest.fixture
def profile_job(base_folder: Path, spec: AdapterSpec):
    def make(tokens: int = 32, micro_batch: int = 2, **changes: Any) -> dict[str, Any]:
        request = ProfileRequest("fp32", sequence_tokens=tokens, micro_batch=micro_batch, rank=4)
        job = {"job": "profile", "base_folder": str(base_folder), "spec": to_plain(spec)}
        return job | {"request": to_plain(request)} | changes

    return make


def short_of_memory(monkeypatch: pytest.MonkeyPatch, most_tokens: int) -> list[tuple[int, int]]:
    """Training steps of more tokens than that run out of memory; the shapes that were tried."""
    tried: list[tuple[int, int]] = []
    step = profiling.train_step

    def limited(model: Any, optimizer: Any, batches: torch.Tensor) -> float:
        shape = (batches.shape[1], batches.shape[2])
        if shape not in tried:
            tried.append(shape)
        if shape[0] * shape[1] > most_tokens:
            raise torch.OutOfMemoryError("no room for secret_weights")
        return step(model, optimizer, batches)

    monkeypatch.setattr(profiling, "train_step", limited)
    return tried


def test_a_profile_that_runs_out_of_memory_is_measured_smaller(
    profile_job, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = short_of_memory(monkeypatch, most_tokens=32)
    result = run(profile_job(tokens=100, micro_batch=5), bench)[-1]
    assert tried == [(5, 100), (2, 100), (1, 100), (1, 50), (1, 25)]
    profile = from_plain(ComputeProfile, result["compute"])
    assert (profile.micro_batch, profile.sequence_tokens) == (1, 25), "what was measured is told"
    assert profile.tokens_per_s > 0


def test_a_failed_attempt_is_gone_before_the_next_one(
    profile_job, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error would keep the frames, and with them the tensors, of the step that failed."""
    left: list[weakref.ref[Any]] = []
    step = profiling.train_step

    def failing_once(model: Any, optimizer: Any, batches: torch.Tensor) -> float:
        if not left:
            held = torch.zeros(10)
            left.append(weakref.ref(held))
            raise torch.OutOfMemoryError("x")
        assert left[0]() is None, "the tensors of the failed step are still held"
        return step(model, optimizer, batches)

    monkeypatch.setattr(profiling, "train_step", failing_once)
    assert run(profile_job(), bench)[-1]["event"] == "result"


def test_a_device_that_cannot_train_one_short_sequence_is_out_of_memory(
    profile_job, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = short_of_memory(monkeypatch, most_tokens=15)
    event = run(profile_job(tokens=40, micro_batch=2), bench)[-1]
    assert tried == [(2, 40), (1, 40), (1, 20), (1, 16)]
    assert event["outcome"] == "out_of_memory"
    assert "16 tokens" in event["message"] and "secret_weights" not in event["message"]


def test_a_profile_keeps_to_the_owners_cap(profile_job, bench: Workbench) -> None:
    event = run(profile_job(memory_cap_bytes=50_000_000), bench)[-1]
    assert event["outcome"] == "out_of_memory"
    assert "0.05 GB" in event["message"] and "16 tokens" in event["message"]
    assert run(profile_job(memory_cap_bytes=10**12), bench)[-1]["event"] == "result"


def test_a_profile_over_the_owners_cap_is_measured_smaller(
    profile_job, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    step = profiling.train_step

    def noted(model: Any, optimizer: Any, batches: torch.Tensor) -> float:
        held.append(batches.numel())
        return step(model, optimizer, batches)

    monkeypatch.setattr(profiling, "train_step", noted)
    monkeypatch.setattr("edge_agent.training.memory.resident_bytes", lambda: 10**6 * held[-1])
    monkeypatch.setattr("edge_agent.training.memory.MemoryWatch.peak_bytes", 1)
    result = run(profile_job(tokens=64, micro_batch=2, memory_cap_bytes=40 * 10**6), bench)[-1]
    profile = from_plain(ComputeProfile, result["compute"])
    assert (profile.micro_batch, profile.sequence_tokens) == (1, 32)


def test_a_warm_trainer_measures_the_same_training_as_a_fresh_one(
    make_job, profile_job, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []
    step = profiling.train_step

    def noted(*arguments: Any) -> float:
        losses.append(step(*arguments))
        return losses[-1]

    monkeypatch.setattr(profiling, "train_step", noted)
    first = run(profile_job(), bench)[-1]
    told, losses[:] = list(losses), []
    report_of(run(make_job(make_assignment(checkpointing=True)), bench))
    second = run(profile_job(), bench)[-1]
    assert losses == told, "the adapter is drawn alike whatever the trainer did before"
    measured = ("tokens_per_s", "forward_tokens_per_s", "peak_bytes")
    for result in (first, second):
        for name in measured:
            del result["compute"][name]
    assert first == second


def test_a_profile_measures_real_steps(profile_job, bench: Workbench) -> None:
    result = run(profile_job(), bench)[-1]
    profile = from_plain(ComputeProfile, result["compute"])
    assert result["gpu"] is None
    assert profile.forward_tokens_per_s > profile.tokens_per_s > 0
    assert profile.peak_bytes >= profile.baseline_bytes > 0
    assert (profile.rank, profile.sequence_tokens, profile.micro_batch) == (4, 32, 2)


def test_the_real_process_speaks_json_lines_and_outlives_failures(
    make_job, tmp_path: Path, code_folder: Path
) -> None:
    good = make_job(make_assignment(local_steps=1))
    jobs = [
        "no json",
        json.dumps({"job": "dance"}),
        json.dumps(good | {"base_folder": str(tmp_path)}),
        json.dumps(good),
        json.dumps({"job": "stop"}),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "edge_agent.training.trainer", "--threads", "1"],
        input="\n".join(jobs) + "\n",
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [e["event"] for e in events] == ["error", "error", "error", "progress", "result"]
    assert report_of(events).outcome == "done"
    assert (tmp_path / "update.bin").stat().st_size > 0
    told = done.stderr + done.stdout
    assert "weigh_" not in told
    assert str(code_folder) not in told
