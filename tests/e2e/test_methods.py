"""Methods of different build, run by real processes: what travels, stays, and comes out at the end.

Plans are written here, so that devices are unequal however fast this machine is.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.methods import METHODS, MethodOptions, make
from coordinator.planner import DevicePlan
from profiles.cost import Cost
from protos.contract import Payload, to_plain
from protos.layout import packed_bytes
from tests.e2e.conftest import ROOT, RUN, SECTIONS, Outcome, Yard, logs
from tests.tiny_base import write_base
from trials.fleet import LocalFleet

pytestmark = pytest.mark.e2e

RANK, ROUNDS, ROUND_S = 8, 2, 120.0
FEW = 3  # rows of the small device, where a method has unequal devices
BUILDS = {  # one method of each build, with what else is to be tried with it
    "flora": {"model": {"modules_to_save": ["model.norm"]}},  # fresh starts, a branch at the side
    "rolora": {"server_optimizer": {"name": "momentum"}},  # parts take turns
    "fedsa-lora": {"training": {"keep_optimizer": True}},  # one factor stays at home
    "fed-sb": {},  # a core between fixed factors
    "flasc": {"wire": {"error_feedback": True}},  # sparse files both ways
}
ALONE = ("rolora", "flasc")  # what sets these apart shows on one device, in half the time
OTHERS = [name for name in METHODS if name not in BUILDS]


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("small") / "base", hidden=32, intermediate=64)


class Trial:
    """One method over a device or two, finished."""

    def __init__(self, yard: Yard, base: Path, name: str) -> None:
        self.name, self.base = name, base
        self.method = make(name, MethodOptions(rank=RANK))
        self.ranks = {"desk": RANK}
        if name not in ALONE:
            self.ranks["lab"] = FEW if self.method.heterogeneous else RANK
        self.devices = [yard.device(device) for device in self.ranks]
        folder = yard.folder / f"method-{name}"
        with LocalFleet(folder, self.sections(), self.devices) as fleet:
            (folder / "plans.json").write_text(json.dumps(self.plans()))
            fleet.start_coordinator("--replay", str(folder / "plans.json"))
            fleet.await_token()
            for device in self.devices:
                fleet.start_agent(device)
            self.outcome: Outcome = yard.finish(fleet, ROUNDS)
            self.logs = logs(fleet)

    def sections(self) -> dict[str, dict[str, Any]]:
        plain: dict[str, dict[str, Any]] = {
            **SECTIONS,
            "run": {"name": RUN, "seed": 11, "rounds": ROUNDS},
            "model": {"base": str(self.base)},
            "adapter": {"rank": RANK, "alpha": 16.0},
            "method": {"name": self.name},
            "round": {"min_devices": len(self.devices), "gather_s": 0.1, "quorum": 1.0},
            "training": {**SECTIONS["training"], "local_steps": 12, "learning_rate": 1e-2},
        }
        for section, keys in BUILDS.get(self.name, {}).items():
            plain[section] = {**plain.get(section, {}), **keys}
        return plain

    def plans(self) -> list[dict[str, Any]]:
        """Recorded plans of a run that never was."""
        nothing = Cost(0.0, 0.0, 0.0, 0.0, 0, 0)
        return [
            {"round": round_, "round_s": ROUND_S, "plan": to_plain(DevicePlan(
                device_id=device, rank=k, sketch_offset=offset, precision="nf4",
                sequence_tokens=64, micro_batch=4, accumulation=1, checkpointing=False,
                local_steps=12 if round_ < ROUNDS else 0,
                evaluates_global=round_ in (0, ROUNDS), reason="as the test says",
                predicted=nothing, predicted_peak_bytes=0, density=self.method.density,
            ))}
            for round_ in range(ROUNDS + 1)
            for offset, (device, k) in enumerate(sorted(self.ranks.items()))
        ]  # fmt: skip

    def folder(self, device: str) -> Path:
        return self.outcome.folder / device


def load(base: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(
            input_ids=torch.tensor([list(b"def weigh_1(values):\n    total = 1\n")])
        ).logits


def logits_by_peft(base: Path, folder: Path) -> Any:
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(load(base), folder))


def logits_by_hand(trial: Trial) -> Any:
    """Of the base with everything added that the coordinator's last version holds."""
    import torch

    run, reader = trial.outcome.model(ROUNDS)
    model = load(trial.base)
    for module in run.spec.modules:
        state = reader.module(module.name)
        a = state.adapter
        core = np.eye(a.rank) if state.core is None else state.core
        added = a.scale * a.up.T.astype(np.float64) @ core @ a.down
        if state.side is not None:
            added = added + state.side.up.T @ state.side.down
        weight = model.get_submodule(module.name).weight
        weight.data += torch.from_numpy(added.astype(np.float32))
    for tensor in run.spec.dense:
        weight = model.get_parameter(tensor.name)
        weight.data += torch.tensor(reader.dense(tensor.name)[0]).reshape(weight.shape)
    return logits(model)


def assert_went_well(trial: Trial) -> None:
    """Everybody did everything, sent what the method declares, and the fleet learned."""
    run, _ = trial.outcome.model(0)
    assert len(trial.outcome.assignments) == len(trial.devices) * (ROUNDS + 1), trial.logs
    losses: dict[str, list[float]] = {}
    for record in trial.outcome.assignments:
        a, report = record.assignment, record.report
        assert report is not None and report.outcome == "done", trial.logs
        if a.trains:
            parts = trial.method.sent(a.round) + (("dense",) if run.spec.dense else ())
            assert a.rank == trial.ranks[a.device_id]
            assert a.update == Payload(a.rank, "int8", parts, trial.method.density)
            assert record.update_bytes == report.pushed_bytes
            most = packed_bytes(run.spec, a.update)
            whole_update = a.update.density == 1
            assert record.update_bytes == most if whole_update else record.update_bytes <= most
            assert record.merged_in == a.round
        whole = report.evaluation("global", "received")
        assert (whole is not None) == a.evaluates_global
        losses.setdefault(a.device_id, []).extend([whole.loss] if whole else [])
    assert len(set(trial.outcome.digests)) == ROUNDS + 1, "a round changed nothing"
    for device, (before, after) in losses.items():
        assert after < before, f"{trial.name} on {device}: {losses}"
    for record in trial.outcome.rounds[:ROUNDS]:
        told = record.detail["aggregation_error"]
        assert (told is not None) == trial.method.has_global and not record.detail["dropped"]


def assert_exports(trial: Trial, tmp_path: Path, coordinator_says: Callable[..., str]) -> None:
    """Stock PEFT loads the export and computes what the coordinator's version is."""
    import torch

    out = tmp_path / "adapter"
    coordinator_says("export", RUN, "--state", str(trial.outcome.state), "--out", str(out))
    want = logits_by_hand(trial)
    assert (want - logits(load(trial.base))).abs().max() > 0.1, "nothing was learned"
    torch.testing.assert_close(logits_by_peft(trial.base, out), want, rtol=1e-4, atol=1e-4)


def assert_exports_at_home(trial: Trial, tmp_path: Path) -> None:
    """Where factors stay at home, the coordinator says so and each device has a model to export."""

    def ends(module: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", module, *words], cwd=ROOT, text=True,
                              capture_output=True, timeout=120, check=False)  # fmt: skip

    out = tmp_path / "adapter"
    said = ends("coordinator.cli", "export", RUN, "--state", str(trial.outcome.state),
                "--out", str(out))  # fmt: skip
    assert said.returncode == 1 and not out.exists()
    assert "keeps up on the devices" in said.stderr and "`sketchfleet-agent export`" in said.stderr
    found = []
    for device in trial.ranks:
        out = tmp_path / device
        config = trial.folder(device) / "agent.toml"
        said = ends("edge_agent.cli", "export", "--config", str(config), "--run", RUN,
                    "--out", str(out))  # fmt: skip
        assert said.returncode == 0, said.stderr
        found.append(logits_by_peft(trial.base, out))
    assert (found[0] - found[1]).abs().max() > 0.01, "two devices have the same model"


def try_method(
    yard: Yard, base: Path, name: str, tmp_path: Path, coordinator_says: Callable[..., str]
) -> Trial:
    trial = Trial(yard, base, name)
    assert_went_well(trial)
    if trial.method.has_global:
        assert_exports(trial, tmp_path, coordinator_says)
    else:
        assert_exports_at_home(trial, tmp_path)
    return trial


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ALONE else n for n in BUILDS]
)
def test_a_method_of_each_build_trains_and_exports(
    name: str,
    yard: Yard,
    small_base: Path,
    tmp_path: Path,
    coordinator_says: Callable[..., str],
) -> None:
    trial = try_method(yard, small_base, name, tmp_path, coordinator_says)
    given = {(a.assignment.round, a.assignment.device_id): a.assignment
             for a in trial.outcome.assignments}  # fmt: skip
    first, second = given[0, "desk"], given[1, "desk"]
    reports = {(a.assignment.round, a.assignment.device_id): a.report
               for a in trial.outcome.assignments}  # fmt: skip
    fetched = reports[1, "desk"]
    assert fetched is not None
    roles = {role for role, _ in trial.outcome.digests[-1]}
    match name:
        case "flora":
            assert first.side is None and second.side is not None
            assert second.mirror is not None and second.fresh
            assert second.mirror.result.payload.parts == ("dense",)
            assert second.side.payload.rank == RANK + FEW and roles == {"adapter", "side"}
        case "rolora":
            assert (first.trained, second.trained) == (("up",), ("down",))
            assert second.mirror is not None
            (up,) = second.mirror.files  # down rested in round 0
            assert up.blob.payload.parts == ("up",)
            assert fetched.fetched_bytes == up.blob.size_bytes
            assert roles == {"adapter", "moment.first"}
        case "fedsa-lora":
            assert first.personal == ("up",) and second.keeps_state
            assert first.update.parts == ("down",)
        case "fed-sb":
            assert (first.update.parts, second.update.parts) == (("up", "down"), ("core",))
            last = given[ROUNDS, "desk"].mirror
            assert last is not None
            assert {f.blob.payload.parts for f in last.files} == {("core",)}, "bases rest"
        case "flasc":
            assert second.slice[0].payload.density == second.update.density == 0.25


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_method_trains_and_exports(
    name: str,
    yard: Yard,
    small_base: Path,
    tmp_path: Path,
    coordinator_says: Callable[..., str],
) -> None:
    try_method(yard, small_base, name, tmp_path, coordinator_says)
