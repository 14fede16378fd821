"""Running out of memory is told apart from other failures, and by its remedy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from edge_agent.training import memory, trainer, workbench
from edge_agent.training.memory import is_out_of_memory, what_it_means
from edge_agent.training.workbench import Workbench
from profiles.device import DeviceProfile, GpuProfile
from protos.contract import AdapterSpec
from tests.edge_agent.training.rounds import (
    Device,
    K,
    make_adapter,
    make_assignment,
    report_of,
    run,
)

# Texts as users report them; `docs/devices.md` names the reports.
TEXTS = {
    "NvMapMemAllocInternalTagged: 1075072515 error 12": "reboot",
    "NvMapMemHandleAlloc: error 0 ... NvMapMemAllocInternalTagged error 12": "reboot",
    "CUDA driver error: out of memory": "expandable_segments",
    'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/opt/pytorch/c10/cuda/CUDACachingAllocator.cpp"'
    ":838, please report a bug to PyTorch.": "nothing is broken",
    "CUDA out of memory. Tried to allocate 20.00 MiB": "",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`": "",
    "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you"
    " tried to allocate 80 bytes. Error code 12 (Cannot allocate memory)": "",
}


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_that_means_memory_is_known_with_its_remedy(text: str) -> None:
    error = RuntimeError(text)
    assert is_out_of_memory(error)
    assert TEXTS[text] in what_it_means(error)
    assert bool(what_it_means(error)) == bool(TEXTS[text])
    try:
        raise error
    except RuntimeError as raised:
        event = trainer.describe(raised)
    assert event["outcome"] == "out_of_memory"
    assert (TEXTS[text] or "a smaller task may fit") in event["message"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("no kernel image is available for execution on the device"),
        RuntimeError("INTERNAL ASSERT FAILED at somewhere"),
        ValueError("out of memory"),
    ],
)
def test_other_failures_are_not(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_the_base_is_kept_while_there_is_room(
    device: Device, bench: Workbench, spec: AdapterSpec
) -> None:
    job = device.job(spec, make_assignment(), make_adapter(spec, K))
    run(job, bench)
    kept = bench.base(device.base_folder, "fp32", spec)
    again = report_of(run(job, bench))
    assert bench.base(device.base_folder, "fp32", spec) is kept
    assert again.load_s == 0


def test_loading_is_told(device: Device, spec: AdapterSpec) -> None:
    job = device.job(spec, make_assignment(), make_adapter(spec, K))
    assert report_of(run(job, Workbench(torch.device("cpu")))).load_s > 0


def test_the_base_goes_when_the_machine_is_short_of_memory(
    device: Device, bench: Workbench, spec: AdapterSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = device.job(spec, make_assignment(), make_adapter(spec, K))
    run(job, bench)
    kept = bench.base(device.base_folder, "fp32", spec)
    monkeypatch.setattr(workbench, "is_tight", lambda _: True)
    assert report_of(run(job, bench)).load_s > 0
    monkeypatch.undo()
    assert bench.base(device.base_folder, "fp32", spec) is not kept


def test_the_base_goes_when_the_owners_cap_leaves_no_room_for_it(
    device: Device, bench: Workbench, spec: AdapterSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = bench.base(device.base_folder, "fp32", spec)
    bench.make_room(10**12)
    assert bench.base(device.base_folder, "fp32", spec) is kept
    monkeypatch.setattr(workbench, "used_bytes", lambda _: 3 * 10**9)
    bench.make_room(3 * 10**9)
    assert bench.base(device.base_folder, "fp32", spec) is kept
    bench.make_room(3 * 10**9 - 1)
    assert bench.base(device.base_folder, "fp32", spec) is not kept


def test_a_machine_is_tight_below_the_reserve_that_is_planned_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Host:
        total = 8 * 2**30
        available = 0

    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: Host)
    for available, tight in ((0.6, True), (0.7, False)):
        Host.available = int(available * 2**30)
        assert memory.is_tight(torch.device("cpu")) == tight


@pytest.mark.parametrize("total", [4 * 2**30, 64 * 2**30])
def test_the_reserve_is_the_one_that_is_planned_with(total: int) -> None:
    host = DeviceProfile("b", "c", 4, total, total, 0, "0")
    share = max(memory.HOST_RESERVE_BYTES, int(memory.HOST_RESERVE_SHARE * total))
    assert total - host.trainer_bytes == share
    card = replace(host, gpu=GpuProfile("g", total, total, "8.9", unified_memory=False))
    assert total - card.trainer_bytes == memory.CARD_RESERVE_BYTES


def test_running_out_leaves_the_next_job_unharmed(
    device: Device, bench: Workbench, spec: AdapterSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    job: dict[str, Any] = device.job(spec, make_assignment(), make_adapter(spec, K))

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("NvMapMemAllocInternalTagged: error 12")

    monkeypatch.setattr("edge_agent.training.local_round.train_steps", fails)
    event = run(job, bench)[-1]
    assert event["outcome"] == "out_of_memory" and "reboot" in event["message"]
    monkeypatch.undo()
    assert report_of(run(job, bench)).outcome == "done"
