"""What an undisturbed run of real processes leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.lowrank import Bundle
from edge_agent.adapters import newest_adapter
from protos.contract import AdapterSpec, Payload
from protos.layout import packed_bytes
from tests.e2e.conftest import RANK, ROUNDS, RUN, Outcome, Yard

pytestmark = pytest.mark.e2e

DEVICES = ("desk", "field", "lab")


def spec_of(outcome: Outcome) -> AdapterSpec:
    return outcome.model(0)[0].spec


def adapter_of(outcome: Outcome, version: int) -> dict[str, Bundle]:
    run, model = outcome.model(version)
    return {m.name: model.module(m.name).product for m in run.spec.modules}


@pytest.fixture(scope="module")
def report(first_run: Outcome, coordinator_says: Callable[..., str]) -> dict[str, Any]:
    said = coordinator_says("report", RUN, "--json", "--state", str(first_run.state))
    plain: dict[str, Any] = json.loads(said)
    return plain


def test_the_fleet_mean_loss_of_the_whole_adapter_falls_on_every_device(
    report: dict[str, Any],
) -> None:
    before, after = report["fairness_before"], report["fairness_after"]
    assert before["devices"] == after["devices"] == len(DEVICES)
    assert after["mean"] < 0.95 * before["mean"]
    for row in report["devices"]:
        assert row["loss_last"] < row["loss_first"], row["device_id"]


def test_the_ledger_holds_every_device_and_round(
    first_run: Outcome, report: dict[str, Any]
) -> None:
    assert report["finished"] and report["rounds_merged"] == ROUNDS
    assert [r["device_id"] for r in report["devices"]] == list(DEVICES)
    for row in report["devices"]:
        assert row["rounds_joined"] == ROUNDS and row["seconds"] > 0 and row["reason"]
    assert sum(row["share"] for row in report["devices"]) == pytest.approx(1)
    held = {(a.assignment.round, a.assignment.device_id): a for a in first_run.assignments}
    assert set(held) == {(r, d) for r in range(ROUNDS + 1) for d in DEVICES}
    for (round_, _), a in held.items():
        assert a.state == "arrived" and a.report is not None and a.report.outcome == "done"
        assert a.merged_in == (round_ if round_ < ROUNDS else None)
    assert [r.evaluate_only for r in first_run.rounds] == [False] * ROUNDS + [True]


def test_losses_of_slices_and_of_the_whole_adapter_are_never_mixed_up(
    first_run: Outcome, report: dict[str, Any]
) -> None:
    whole, part = [("global", "received")], [("slice", "received"), ("slice", "trained")]
    measured = {0: whole + part, ROUNDS: whole}
    of_whole: dict[str, list[float]] = {}
    for a in first_run.assignments:
        assert a.report is not None
        kinds = [(e.subject, e.stage) for e in a.report.evaluations]
        assert kinds == measured.get(a.assignment.round, part), a.assignment.assignment_id
        seen = a.report.evaluation("global", "received")
        of_whole.setdefault(a.assignment.device_id, []).extend([seen.loss] if seen else [])
    for row in report["devices"]:
        assert [row["loss_first"], row["loss_last"]] == of_whole[row["device_id"]]
    for point in report["curve"]:
        assert (point["subject"], point["stage"]) in whole + part


def test_a_device_trains_and_sends_exactly_its_k_of_r(first_run: Outcome) -> None:
    spec = spec_of(first_run)
    seen = set()
    for a in (a for a in first_run.assignments if a.assignment.trains):
        k, report = a.assignment.rank, a.report
        assert report is not None and a.update_digest is not None
        assert report.trained_parameters == k * spec.parameters_per_rank
        assert report.trained_parameters * spec.rank == k * (spec.rank * spec.parameters_per_rank)
        assert a.assignment.update == Payload(k, "int8")
        sent = packed_bytes(spec, a.assignment.update)
        assert a.update_bytes == report.pushed_bytes == sent
        seen.add((a.assignment.device_id, k))
    assert ("field", RANK // 2) in seen, "the slow link was to halve the sketch"
    assert any(k == RANK for _, k in seen), "a fast device was to train the whole rank"


def test_devices_and_runs_are_told_as_json(
    first_run: Outcome, report: dict[str, Any], coordinator_says: Callable[..., str]
) -> None:
    state = ("--json", "--state", str(first_run.state))
    devices = json.loads(coordinator_says("devices", *state))
    assert [d["device_id"] for d in devices] == list(DEVICES)
    for d in devices:
        assert d["profile"]["compute"]["tokens_per_s"] > 0
    (field,) = (d for d in devices if d["device_id"] == "field")
    assert 0.5e6 < field["profile"]["link"]["up_bps"] < 2.5e6, "measured through the slow relay"
    (run,) = json.loads(coordinator_says("runs", *state))
    assert (run["run_id"], run["rank"], run["finished"]) == (RUN, RANK, True)
    rounds = json.loads(coordinator_says("runs", RUN, *state))
    assert rounds == report["rounds"] and len(rounds) == ROUNDS + 1


def test_tables_for_people_are_printed_too(
    first_run: Outcome, coordinator_says: Callable[..., str]
) -> None:
    state = ("--state", str(first_run.state))
    for command in (["devices"], ["report", RUN]):
        said = coordinator_says(*command, *state)
        assert all(name in said for name in DEVICES), said
    assert RUN in coordinator_says("runs", *state)
    assert "(evaluation)" in coordinator_says("runs", RUN, *state)


@pytest.mark.parametrize("version", [1, ROUNDS], ids=["after round 1", "at the end"])
def test_stock_peft_gives_the_coordinators_own_logits(
    version: int,
    yard: Yard,
    first_run: Outcome,
    coordinator_says: Callable[..., str],
    tmp_path: Path,
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "adapter"
    chosen = [] if version == ROUNDS else ["--round", str(version)]
    where = ("--state", str(first_run.state), "--out", str(folder))
    assert coordinator_says("export", RUN, *chosen, *where).strip() == str(folder)

    def load(dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(yard.base, dtype=dtype)

    ids = torch.tensor([list(b"def weigh_1(values):\n    total = 1\n")])
    with torch.no_grad():
        plain = load(torch.float32)
        base_logits = plain(input_ids=ids).logits
        for name, b in adapter_of(first_run, version).items():
            product = np.float32(b.scale) * (b.up.T @ b.down)
            plain.get_submodule(name).weight += torch.from_numpy(product)
        want = plain(input_ids=ids).logits
        got = PeftModel.from_pretrained(load(torch.float32), folder)(input_ids=ids).logits
        half = PeftModel.from_pretrained(load(torch.bfloat16), folder)(input_ids=ids).logits
    assert (want - base_logits).abs().max() > 0.5, "the adapter must matter for this test"
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    # bfloat16 keeps 8 bits: 2^-8 of the largest logit, a few times over through the layers.
    assert (half.float() - want).abs().max() < 8 * 2**-8 * want.abs().max()


def test_every_device_holds_the_model_that_the_run_ended_with(first_run: Outcome) -> None:
    """For `sketchfleet-agent serve` and `export`, as near as it travelled."""
    ended = adapter_of(first_run, ROUNDS)
    for device in DEVICES:
        found = newest_adapter(first_run.folder / device / "state")
        assert found is not None and (found.whose, found.adapter.round) == ("fleet", ROUNDS)
        for name, (up, down) in found.adapter.factors.items():
            want = ended[name].dense()
            got = found.adapter.scale * up.T.astype(np.float64) @ down
            assert np.linalg.norm(got - want) < 0.1 * np.linalg.norm(want), (device, name)
