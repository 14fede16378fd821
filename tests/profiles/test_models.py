"""Known models count what the published ones have; a model is found however it is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from profiles.model import ModelError, ModelShape
from profiles.models import find_model, load_models, parameters

# By hidden size and layers, all biases of the architecture included: (M parameters, M in linears,
# c of all linears, c of q and v), to the digit that is published.
PUBLISHED = {
    "smollm2-135m": (134.5, 106.2, 305_280, 57_600),
    "smollm2-360m": (361.8, 314.6, 542_720, 102_400),
    "qwen2.5-coder-0.5b": (494.0, 357.8, 549_888, 67_584),
    "deepseek-coder-1.3b": (1346.5, 1214.3, 936_960, 196_608),
    "qwen2.5-coder-1.5b": (1543.7, 1310.2, 1_154_048, 136_192),
    "starcoder2-3b": (3030.4, 2878.3, 1_489_920, 284_160),
    "qwen2.5-coder-3b": (3085.9, 2774.5, 1_870_848, 230_400),
    "codellama-7b": (6738.5, 6476.0, 2_498_560, 524_288),
    "qwen2.5-coder-7b": (7615.6, 6525.3, 2_523_136, 315_392),
}


def biases(shape: ModelShape) -> int:
    """What `parameters` leaves out: Qwen2's q, k and v; StarCoder2's everywhere and its norms."""
    qkv = shape.heads * shape.head_dim + 2 * shape.kv_dim
    if shape.model_type == "qwen2":
        return shape.layers * qkv
    if shape.model_type == "starcoder2":
        each = qkv + shape.hidden + shape.intermediate + shape.hidden
        return shape.layers * (each + 2 * shape.hidden) + shape.hidden
    return 0


def test_there_are_the_nine_models_the_smallest_first() -> None:
    assert list(load_models()) == [
        "smollm2-135m", "smollm2-360m", "qwen2.5-coder-0.5b", "deepseek-coder-1.3b",
        "qwen2.5-coder-1.5b", "starcoder2-3b", "qwen2.5-coder-3b", "codellama-7b",
        "qwen2.5-coder-7b",
    ]  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_the_published_ones(name: str) -> None:
    total, linear, c_all, c_qv = PUBLISHED[name]
    shape = load_models()[name].shape
    assert round((parameters(shape) + biases(shape)) / 1e6, 1) == total
    assert round(shape.linear_parameters / 1e6, 1) == linear
    assert sum(m.in_features + m.out_features for m in shape.modules(())) == c_all
    qv = shape.modules(("q_proj", "v_proj"))
    assert sum(m.in_features + m.out_features for m in qv) == c_qv


def test_a_model_is_found_by_name_hub_name_file_and_folder(tmp_path: Path) -> None:
    known = load_models()["qwen2.5-coder-3b"]
    assert find_model("Qwen2.5-Coder-3B") == ("qwen2.5-coder-3b", known.shape)
    assert find_model("qwen/Qwen2.5-Coder-3B") == ("qwen2.5-coder-3b", known.shape)
    folder = tmp_path / "mine"
    folder.mkdir()
    config = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16,
              "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "other.json").write_text(json.dumps(config))
    shape = ModelShape.from_config(config)
    assert find_model(str(folder)) == ("mine", shape)
    assert find_model(str(folder / "config.json")) == ("mine", shape)
    assert find_model(str(tmp_path / "other.json")) == ("other", shape)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("qwen2.5-coder-4b", "did you mean .*qwen2.5-coder-3b"),
        ("somebody/starcoder2", "did you mean starcoder2-3b"),
        ("zzz", "there are smollm2-135m, .*qwen2.5-coder-7b"),
        ("folder", "config.json cannot be read: No such file"),
        ("list.json", "list.json is no config.json: it holds no JSON object"),
        ("torn.json", "torn.json is no config.json: "),
        ("mamba.json", "mamba.json: model type 'mamba' is not supported"),
        ("bare.json", "bare.json: config.json lacks a usable 'num_attention_heads'"),
    ],
)
def test_a_model_that_cannot_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name, text in {
        "list": "[]", "torn": "{", "mamba": '{"model_type": "mamba"}',
        "bare": '{"model_type": "llama"}',
    }.items():  # fmt: skip
        (tmp_path / f"{name}.json").write_text(text)
    with pytest.raises(ModelError, match=words):
        find_model(wanted)
