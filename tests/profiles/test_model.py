"""Model shapes count what the published models have; weights are found where they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from profiles.model import ModelError, ModelShape, ModuleShape, base_tensor, dense_tensors

# name: (config, parameters in millions, linear parameters in millions, c all-linear, c of q and v)
PUBLISHED = {
    "smollm2-135m": (("llama", 576, 30, 9, 3, 1536, 49152, True), 134.5, 106.2, 305_280, 57_600),
    "smollm2-360m": (("llama", 960, 32, 15, 5, 2560, 49152, True), 361.8, 314.6, 542_720, 102_400),
    "qwen-0.5b": (("qwen2", 896, 24, 14, 2, 4864, 151936, True), 494.0, 357.8, 549_888, 67_584),
    "deepseek-1.3b": (
        ("llama", 2048, 24, 16, 16, 5504, 32256, False), 1346.5, 1214.3, 936_960, 196_608,
    ),
    "qwen-1.5b": (
        ("qwen2", 1536, 28, 12, 2, 8960, 151936, True), 1543.7, 1310.2, 1_154_048, 136_192,
    ),
    "starcoder2-3b": (
        ("starcoder2", 3072, 30, 24, 2, 12288, 49152, True), 3030.4, 2878.3, 1_489_920, 284_160,
    ),
    "qwen-3b": (
        ("qwen2", 2048, 36, 16, 2, 11008, 151936, True), 3085.9, 2774.5, 1_870_848, 230_400,
    ),
    "codellama-7b": (
        ("llama", 4096, 32, 32, 32, 11008, 32016, False), 6738.5, 6476.0, 2_498_560, 524_288,
    ),
    "qwen-7b": (
        ("qwen2", 3584, 28, 28, 4, 18944, 152064, False), 7615.6, 6525.3, 2_523_136, 315_392,
    ),
}  # fmt: skip


def config(values: tuple[object, ...]) -> dict[str, object]:
    keys = (
        "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "intermediate_size", "vocab_size", "tie_word_embeddings",
    )  # fmt: skip
    return dict(zip(keys, values, strict=True))


@pytest.mark.parametrize("name", PUBLISHED)
def test_shape_counts_the_published_parameters(name: str) -> None:
    values, total, linear, c_all, c_qv = PUBLISHED[name]
    shape = ModelShape.from_config(config(values))
    assert shape.linear_parameters / 1e6 == pytest.approx(linear, abs=0.06)
    # Biases (Qwen's q, k, v; StarCoder2's everywhere) are not counted: below 0.1 %.
    counted = (shape.linear_parameters + shape.other_parameters) / 1e6
    assert counted == pytest.approx(total, rel=1e-3)
    assert sum(m.in_features + m.out_features for m in shape.modules(())) == c_all
    qv = shape.modules(("q_proj", "v_proj"))
    assert sum(m.in_features + m.out_features for m in qv) == c_qv


def test_modules_come_layer_by_layer_whatever_the_order_of_targets() -> None:
    shape = ModelShape.from_config(config(PUBLISHED["qwen-0.5b"][0]))
    assert shape.modules(("v_proj", "q_proj")) == shape.modules(("q_proj", "v_proj"))
    names = [m.name for m in shape.modules(("q_proj", "v_proj"))]
    assert names[:3] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj",
    ]


def test_unknown_targets_and_architectures_are_named() -> None:
    shape = ModelShape.from_config(config(PUBLISHED["starcoder2-3b"][0]))
    with pytest.raises(ModelError, match="gate_proj do not exist in a starcoder2"):
        shape.modules(("gate_proj",))
    with pytest.raises(ModelError, match="'t5' is not supported"):
        ModelShape.from_config({"model_type": "t5"})
    with pytest.raises(ModelError, match="lacks a usable 'num_attention_heads'"):
        ModelShape.from_config({"model_type": "llama"})


# --- tensors of a base --------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base in two files, as large ones are; its output head is tied."""
    first = {
        "model.norm.weight": np.arange(4, dtype=np.float32),
        "model.layers.0.q_proj.weight": np.arange(8, dtype=np.float16).reshape(4, 2) / 8,
        "model.layers.0.q_proj.bias": np.arange(4, dtype=np.float32),
    }
    save_file(first, tmp_path / "model-1.safetensors", metadata={"format": "pt"})
    second = {
        "model.embed_tokens.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "model.conv.weight": np.zeros((2, 2, 2), np.float32),
        "model.codes.weight": np.zeros((2, 2), np.int8),
    }
    save_file(second, tmp_path / "model-2.safetensors")
    return tmp_path


def test_a_named_module_stands_for_all_its_weights(base: Path) -> None:
    names = ("model.embed_tokens", "model.norm", "model.layers.0.q_proj")
    assert dense_tensors(base, names) == (
        ModuleShape("model.embed_tokens.weight", 3, 4),
        ModuleShape("model.norm.weight", 1, 4),
        ModuleShape("model.layers.0.q_proj.bias", 1, 4),
        ModuleShape("model.layers.0.q_proj.weight", 4, 2),
    )
    assert dense_tensors(base, ()) == ()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("lm_head", "names 'lm_head', which has no weights of its own .* tied to the embeddings"),
        ("model.nor", "names 'model.nor', which has no weights"),
        ("model.norm.weight", "names 'model.norm.weight', which has no weights"),
        ("model.conv", r"model\.conv\.weight has shape \[2, 2, 2\]; only vectors and matrices"),
    ],
)
def test_modules_that_cannot_be_trained_whole_are_named(
    base: Path, name: str, sentence: str
) -> None:
    with pytest.raises(ModelError, match=sentence):
        dense_tensors(base, (name,))


def test_a_weight_is_read_in_float32_and_its_own_shape(base: Path) -> None:
    norm = base_tensor(base, "model.norm.weight")
    assert norm.dtype == np.float32 and norm.tolist() == [0, 1, 2, 3]
    half = base_tensor(base, "model.layers.0.q_proj.weight")
    assert half.dtype == np.float32 and half.tolist() == [[0, 0.125], [0.25, 0.375],
                                                          [0.5, 0.625], [0.75, 0.875]]  # fmt: skip
    assert base_tensor(base, "model.embed_tokens.weight").shape == (3, 4)


def test_bfloat16_weights_are_read_exactly(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    weights = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_torch({"x.weight": weights}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(base_tensor(tmp_path, "x.weight"), weights.float().numpy())


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("model.codes.weight", r"model\.codes\.weight is I8; only F32, F16 and BF16"),
        ("model.gone.weight", "holds no tensor model.gone.weight; is it the run's base"),
    ],
)
def test_a_weight_that_cannot_be_read_is_named(base: Path, name: str, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        base_tensor(base, name)


@pytest.mark.parametrize(
    "data", [b"", b"no tensors", b"\x02" + bytes(7) + b"[]", (2**60).to_bytes(8, "little") + b"{}"],
    ids=["empty", "text", "a list", "a huge header"],
)  # fmt: skip
def test_a_file_that_holds_no_tensors_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    calls: list[Any] = [lambda: dense_tensors(tmp_path, ("x",)), lambda: base_tensor(tmp_path, "x")]
    for call in calls:
        with pytest.raises(ModelError, match=r"model\.safetensors is no safetensors file"):
            call()
