"""A run that classifies, from run.toml to its contract, its planner and its first version."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from coordinator.config import ConfigError, RunConfig, load_config
from coordinator.serve import ServeError, build_spec
from profiles.model import ModuleShape
from protos.contract import AdapterSpec, Classification
from protos.head import SPREAD, head_tensors, initial_head, starting_tensor
from protos.peft_config import adapter_config

LABELS = ("entailment", "not_entailment")
LEAST = '[run]\nname = "trial"\n[model]\nbase = "org/base"\n'
CLASSIFIES = LEAST + 'task = "sequence-classification"\nlabels = ["yes", "no"]\n'
BERT = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "vocab_size": 11, "max_position_embeddings": 32}  # fmt: skip


def load(tmp_path: Path, text: str) -> RunConfig:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return load_config(path)


def base(folder: Path, **changes) -> Path:
    (folder / "config.json").write_text(json.dumps(BERT | changes))
    save_file({"pooler.dense.weight": np.zeros((8, 8), np.float32)}, folder / "model.safetensors")
    return folder


def config_of(folder: Path, **model) -> RunConfig:
    return RunConfig.model_validate({
        "run": {"name": "run", "seed": 5},
        "model": {"base": str(folder), "task": "sequence-classification", "labels": LABELS} | model,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LEAST + 'task = "sequence-classification"\n', "needs labels, two or more"),
        (LEAST + 'task = "sequence-classification"\nlabels = ["a", "a"]\n', "each once"),
        (LEAST + 'labels = ["a", "b"]\n', "labels need task = sequence-classification"),
        (CLASSIFIES + "[training]\nfill_in_middle = 0.5\n", "fill_in_middle is for text"),
        (CLASSIFIES + "[evaluation]\ncompletions = 4\n", "completions is for text"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, text, said):
    with pytest.raises(ConfigError, match=said):
        load(tmp_path, text)


def test_the_head_is_trained_whole_and_declared(tmp_path):
    folder = base(tmp_path)
    spec, shape = build_spec(config_of(folder, modules_to_save=("bert.pooler.dense",)), folder)
    assert spec.classification == Classification(LABELS, "classifier")
    assert spec.dense == (
        ModuleShape("classifier.bias", 1, 2),
        ModuleShape("classifier.weight", 2, 8),
        ModuleShape("bert.pooler.dense.weight", 8, 8),
    )
    assert [t.name for t in head_tensors(spec)] == ["classifier.bias", "classifier.weight"]
    assert shape.labels == 2
    facts = adapter_config(spec, 4, "org/base")
    assert facts["task_type"] == "SEQ_CLS"
    assert facts["modules_to_save"] == ["bert.pooler.dense", "classifier"]


def test_an_encoder_predicts_no_next_token(tmp_path):
    folder = base(tmp_path)
    config = RunConfig.model_validate({"run": {"name": "run"}, "model": {"base": str(folder)}})
    with pytest.raises(ServeError, match=r"encoder .*task = sequence-classification"):
        build_spec(config, folder)


def test_the_head_need_not_be_named_and_must_not_be(tmp_path):
    folder = base(tmp_path)
    with pytest.raises(ServeError, match="classifier, the task head, which is trained whole"):
        build_spec(config_of(folder, modules_to_save=("classifier",)), folder)


def test_robertas_head_is_one_module_for_peft(tmp_path):
    folder = base(tmp_path, model_type="roberta")
    spec, _ = build_spec(config_of(folder), folder)
    assert adapter_config(spec, 4, "x")["modules_to_save"] == ["classifier"]
    assert len(spec.dense) == 4


def test_labels_and_their_order_are_part_of_the_identity(tmp_path):
    folder = base(tmp_path)
    digests = {
        build_spec(config_of(folder, labels=labels), folder)[0].digest
        for labels in (LABELS, LABELS[::-1], ("a", "b"))
    }
    assert len(digests) == 3


def test_a_run_that_predicts_text_has_the_identity_it_had_before_there_were_others():
    plain = AdapterSpec("run", "b", "", "0" * 64, 4, 8.0, False, 1, ())
    before = (
        f'{{"alpha":8.0,"base_digest":"{"0" * 64}","dense":[],"modules":[],"rank":4,'
        '"run_id":"run","seed":1,"use_rslora":false}'
    )
    assert plain.digest == hashlib.sha256(before.encode()).digest()


def test_the_first_head_has_berts_spread_and_no_bias_and_follows_the_seed(tmp_path):
    weight = ModuleShape("classifier.weight", 3, 4000)
    drawn = initial_head(1, weight)
    assert drawn.shape == (3, 4000) and drawn.dtype == np.float32
    assert drawn.std() == pytest.approx(SPREAD, rel=0.02) and abs(drawn.mean()) < 1e-3
    np.testing.assert_array_equal(drawn, initial_head(1, weight))
    assert not np.array_equal(drawn, initial_head(2, weight))
    assert not initial_head(1, ModuleShape("classifier.bias", 1, 3)).any()


def test_what_a_difference_is_added_to_is_the_draw_for_a_head_and_else_the_bases_own(tmp_path):
    folder = base(tmp_path)
    spec, _ = build_spec(config_of(folder, modules_to_save=("bert.pooler.dense",)), folder)
    head = starting_tensor(spec, folder, "classifier.weight")
    np.testing.assert_array_equal(head, initial_head(5, ModuleShape("classifier.weight", 2, 8)))
    assert not starting_tensor(spec, folder, "bert.pooler.dense.weight").any()
