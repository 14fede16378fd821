"""A fleet that trains a sequence classifier: real processes, labelled files, a folder for PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.store.records import Records
from protos.contract import Evaluation
from tests.e2e.conftest import PATIENCE_S, logs
from tests.tiny_base import write_encoder
from trials.fleet import DeviceSetup, LocalFleet

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

LABELS = ["entailment", "not_entailment"]
ROUNDS = 3


def write_rows(path: Path, word: str, count: int) -> str:
    rows = ["index\tsentence1\tsentence2\tlabel"]
    for i in range(count):
        second = "aaaa bbbb" if i % 2 else "zzzz yyyy"
        rows.append(f'{i}\tthe "{word} {i}\t{second} {i}\t{LABELS[i % 2]}')
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def test_a_fleet_learns_to_classify_and_stock_peft_loads_what_it_learnt(
    tmp_path: Path, coordinator_says: Callable[..., str]
) -> None:
    base = write_encoder(tmp_path / "base")
    held_out = write_rows(tmp_path / "dev.tsv", "other", 24)
    devices = [
        DeviceSetup(name, [], agent={"data": {
            "labelled": [write_rows(tmp_path / f"{name}.tsv", name, 80)],
            "labelled_held_out": [held_out],
        }})
        for name in ("desk", "field")
    ]  # fmt: skip
    sections = {
        "run": {"name": "labels", "seed": 3, "rounds": ROUNDS},
        "model": {"base": str(base), "task": "sequence-classification", "labels": LABELS},
        "adapter": {"rank": 8, "alpha": 16.0},
        "training": {"precision": "fp32", "sequence_tokens": 48, "micro_batch": 8,
                     "local_steps": 12, "learning_rate": 1e-2, "checkpointing": False},
        "round": {"min_devices": 2, "gather_s": 0.2, "quorum": 1.0, "round_s": 20},
        "evaluation": {"every_rounds": ROUNDS, "sequences": 24},
    }  # fmt: skip
    with LocalFleet(tmp_path / "fleet", sections, devices) as fleet:
        fleet.start()
        records = Records(fleet.state / "coordinator.sqlite")
        try:
            fleet.await_finish(records, PATIENCE_S)
            run, given = records.run("labels"), list(records.assignments("labels"))
        finally:
            records.close()
        said = logs(fleet)
        assert "Traceback" not in said, said
    assert run is not None and run.spec.classification is not None
    assert run.spec.classification.labels == tuple(LABELS)
    assert {t.name for t in run.spec.dense} == {"classifier.bias", "classifier.weight"}
    measured: dict[tuple[str, int], Evaluation] = {}
    for a in given:
        found = None if a.report is None else a.report.evaluation("global", "received")
        if found is not None:
            measured[a.assignment.device_id, a.assignment.round] = found
    for device in ("desk", "field"):
        first, last = (measured[device, round_] for round_ in (0, ROUNDS))
        assert first.tokens == last.tokens == 24, "one prediction for each held-out example"
        assert last.loss < first.loss / 2 and last.token_accuracy > 0.9
        assert last.macro_f1 is not None and last.macro_f1 > 0.9
    out = tmp_path / "adapter"
    coordinator_says("export", "labels", "--state", str(fleet.state), "--out", str(out))
    _loads(out, base, LABELS)


def _loads(folder: Path, base: Path, labels: list[str]) -> None:
    """In PEFT as anybody has it: it tells the two kinds of pairs apart."""
    import torch
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    model = AutoPeftModelForSequenceClassification.from_pretrained(str(folder), num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(base)
    given = tokenizer(['the "new 1'] * 2, ["zzzz yyyy 5", "aaaa bbbb 6"], return_tensors="pt")
    with torch.no_grad():
        said = model.eval()(**given).logits.argmax(-1).tolist()
    assert [labels[i] for i in said] == ["entailment", "not_entailment"]
