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
from edge_agent.training.memory import OutOfMemoryError, is_out_of_memory
from edge_agent.training.rows import Rows
from edge_agent.training.workbench import Workbench
from profiles.device import ComputeProfile
from protos.contract import (
    AdapterSpec,
    Assignment,
    Payload,
    ProfileRequest,
    from_plain,
    to_plain,
)
from protos.layout import Parts
from protos.unpacking import unpack
from tests.edge_agent.training.rounds import (
    HEAD,
    NORM,
    Device,
    K,
    at_start,
    make_adapter,
    make_assignment,
    plus,
    report_of,
    run,
)

ROOT = Path(__file__).parents[3]


@pytest.fixture
def make_job(device: Device, spec: AdapterSpec):
    """A job on two rows as in round 0: up is zero, down is drawn."""

    def make(assignment: Assignment, update: str = "update.bin", **changes: Any) -> dict[str, Any]:
        changes = {"update_path": str(device.folder / update)} | changes
        return device.job(spec, assignment, at_start(spec, K), **changes)

    return make


def unpacked(job: dict[str, Any], spec: AdapterSpec) -> dict[str, Parts]:
    """The update that a job wrote."""
    task = from_plain(Assignment, job["assignment"])
    packed = Path(job["update_path"]).read_bytes()
    return unpack(packed, spec, task.update, assignment_digest=task.digest)


def test_a_round_trains_the_slice_and_reports_it(
    make_job, bench: Workbench, spec: AdapterSpec, tmp_path: Path
) -> None:
    job = make_job(make_assignment())
    events = run(job, bench)
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
    assert 8 * 20 < received.tokens <= 8 * 47, "padding and what begins a document do not count"

    delta = unpacked(job, spec)
    assert all(np.abs(f["up"]).max() > 0 for f in delta.values()), "up starts at zero and moves"
    assert not list(tmp_path.glob("*.tmp")), "an update is there whole or not at all"
    assert not (tmp_path / "home.new").exists(), "nothing to keep, nothing written"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_same_job_twice_gives_the_same_bytes(
    make_job, bench: Workbench, tmp_path: Path, checkpointing: bool
) -> None:
    task = make_assignment(checkpointing=checkpointing, update=Payload(K, "int8"))
    report_of(run(make_job(task, "one.bin"), bench))
    report_of(run(make_job(make_assignment(seed=8), "between.bin"), bench))
    report_of(run(make_job(task, "two.bin"), bench))
    one, between, two = ((tmp_path / f"{n}.bin").read_bytes() for n in ("one", "between", "two"))
    assert one == two
    assert one != between


def test_the_update_is_trained_minus_received(
    make_job, device: Device, bench: Workbench, spec: AdapterSpec
) -> None:
    """Adding the delta to what was received gives the loss that was reported as trained."""
    task = make_assignment(optimizer="sgd", learning_rate=0.5)
    job = make_job(task)
    report = report_of(run(job, bench))
    moved = plus(at_start(spec, K), unpacked(job, spec))
    again = report_of(run(device.job(spec, replace(task, local_steps=1), moved), bench))
    trained, received = report.evaluation("slice", "trained"), again.evaluation("slice", "received")
    assert trained is not None and received is not None
    assert received.loss == pytest.approx(trained.loss, rel=1e-5)


def test_a_whole_adapter_is_evaluated_without_training(
    device: Device, bench: Workbench, spec: AdapterSpec, tmp_path: Path
) -> None:
    task = make_assignment(local_steps=0, evaluates_global=True)
    job = device.job(spec, task, whole=(make_adapter(spec, spec.rank),), update_path=None)
    report = report_of(run(job, bench))
    assert [(e.subject, e.stage) for e in report.evaluations] == [("global", "received")]
    assert report.trained_parameters == report.train_tokens == 0
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
            assert any(m._forward_hooks for m in base.model.modules()) == wanted


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
    monkeypatch.setattr("edge_agent.training.workbench.collect", refuse)
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

    def limited(model: Any, optimizer: Any, batches: list[Rows], **how: Any) -> float:
        shape = batches[0].tokens.shape
        if shape not in tried:
            tried.append(shape)
        if shape[0] * shape[1] > most_tokens:
            raise torch.OutOfMemoryError("no room for secret_weights")
        return step(model, optimizer, batches, **how)

    monkeypatch.setattr(profiling, "train_step", limited)
    return tried


def test_a_profile_that_runs_out_of_memory_is_measured_smaller(
    profile_job, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = short_of_memory(monkeypatch, most_tokens=32)
    result = run(profile_job(tokens=100, micro_batch=5), bench)[-1]
    # The small size goes first: a quarter of 5 x 100, of 2 x 100, of 1 x 100 and of 1 x 50.
    assert tried == [(1, 100), (1, 50), (1, 25), (1, 16)]
    profile = from_plain(ComputeProfile, result["compute"])
    assert (profile.micro_batch, profile.sequence_tokens) == (1, 25), "what was measured is told"
    assert profile.tokens_per_s > 0


def test_a_failed_attempt_is_gone_before_the_next_one(
    profile_job, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error would keep the frames, and with them the tensors, of the step that failed."""
    left: list[weakref.ref[Any]] = []
    step = profiling.train_step

    def failing_once(*given: Any, **how: Any) -> float:
        if not left:
            held = torch.zeros(10)
            left.append(weakref.ref(held))
            raise torch.OutOfMemoryError("x")
        assert left[0]() is None, "the tensors of the failed step are still held"
        return step(*given, **how)

    monkeypatch.setattr(profiling, "train_step", failing_once)
    assert run(profile_job(), bench)[-1]["event"] == "result"


def test_a_device_that_cannot_train_one_short_sequence_is_out_of_memory(
    profile_job, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = short_of_memory(monkeypatch, most_tokens=15)
    event = run(profile_job(tokens=40, micro_batch=2), bench)[-1]
    assert tried == [(1, 20), (1, 16)]
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

    def noted(model: Any, optimizer: Any, batches: list[Rows], **how: Any) -> float:
        held.append(batches[0].tokens.size)
        return step(model, optimizer, batches, **how)

    monkeypatch.setattr(profiling, "train_step", noted)
    monkeypatch.setattr(
        "edge_agent.training.memory.resident_bytes", lambda: 10**6 * max(held[-1:], default=0)
    )
    monkeypatch.setattr("edge_agent.training.memory.MemoryWatch.peak_bytes", 1)
    result = run(profile_job(tokens=64, micro_batch=2, memory_cap_bytes=40 * 10**6), bench)[-1]
    profile = from_plain(ComputeProfile, result["compute"])
    assert (profile.micro_batch, profile.sequence_tokens) == (1, 32)


def test_a_warm_trainer_measures_the_same_training_as_a_fresh_one(
    make_job, profile_job, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []
    step = profiling.train_step

    def noted(*arguments: Any, **how: Any) -> float:
        losses.append(step(*arguments, **how))
        return losses[-1]

    monkeypatch.setattr(profiling, "train_step", noted)
    first = run(profile_job(), bench)[-1]
    told, losses[:] = list(losses), []
    report_of(run(make_job(make_assignment(checkpointing=True)), bench))
    second = run(profile_job(), bench)[-1]
    assert losses == told, "the adapter is drawn alike whatever the trainer did before"
    measured = ("tokens_per_s", "forward_tokens_per_s", "peak_bytes", "loaded_bytes", "small")
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


def test_a_profile_measures_two_sizes_and_what_the_base_holds(
    profile_job, bench: Workbench
) -> None:
    result = run(profile_job(tokens=64, micro_batch=8), bench)[-1]
    profile = from_plain(ComputeProfile, result["compute"])
    small = profile.small
    assert small is not None
    assert (small.micro_batch, small.sequence_tokens) == (2, 64), "fewer sequences first"
    assert 0 < small.forward_s < small.step_s
    assert profile.baseline_bytes < profile.loaded_bytes <= small.peak_bytes


@pytest.mark.parametrize(
    ("asked", "want"),
    [
        ((8, 512), (2, 512)), ((4, 512), (1, 512)), ((2, 512), (1, 256)), ((1, 512), (1, 128)),
        ((1, 32), (1, 16)), ((3, 512), (1, 512)),
    ],
)  # fmt: skip
def test_the_small_size_has_fewer_sequences_and_then_shorter_ones(
    asked: tuple[int, int], want: tuple[int, int]
) -> None:
    found = profiling.quarter(ProfileRequest("fp32", asked[1], asked[0], 4))
    assert found is not None
    assert (found.micro_batch, found.sequence_tokens) == want


def test_sequences_that_are_as_short_as_may_be_have_no_smaller_size(
    profile_job, bench: Workbench
) -> None:
    result = run(profile_job(tokens=16, micro_batch=1), bench)[-1]
    assert from_plain(ComputeProfile, result["compute"]).small is None


@pytest.mark.parametrize(
    ("takes_s", "warm", "runs"),
    [
        (0.1, True, 4),
        (1.2, True, 4),
        (2.0, True, 2),
        (3.0, True, 1),
        (9.0, True, 1),
        (9.0, False, 2),
    ],
)
def test_measuring_keeps_to_its_budget(
    monkeypatch: pytest.MonkeyPatch, takes_s: float, warm: bool, runs: int
) -> None:
    """A quarter of 20 s for each thing timed; where kernels must load, never the first alone."""
    now = [0.0]
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: now[0])
    done: list[float] = []

    def once() -> None:
        now[0] += takes_s
        done.append(now[0])

    assert profiling._seconds(torch.device("cpu"), once, warm) == pytest.approx(takes_s)
    assert len(done) == runs


def test_a_profile_measures_a_run_with_tensors_trained_whole(
    profile_job, bench: Workbench, spec: AdapterSpec
) -> None:
    whole = replace(spec, dense=(NORM, HEAD))
    result = run(profile_job(spec=to_plain(whole)), bench)[-1]
    assert from_plain(ComputeProfile, result["compute"]).tokens_per_s > 0


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
