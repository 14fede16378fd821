"""Encoders: their layers as transformers names them, their parameters, and what they keep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from profiles.cost import forward_flops_per_token, train_flops_per_token
from profiles.memory import Machine, activation_bytes, peak_memory_bytes
from profiles.model import ModelError, ModelShape, ModuleShape, base_tensor, dense_tensors
from profiles.work import LocalWork

# name: (config, parameters in millions without a pooler)
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "bert-base": ({"model_type": "bert", "hidden_size": 768, "num_hidden_layers": 12,
                   "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 30522,
                   "max_position_embeddings": 512}, 108.9),
    "codebert": ({"model_type": "roberta", "hidden_size": 768, "num_hidden_layers": 12,
                  "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 50265,
                  "max_position_embeddings": 514}, 124.1),
    "minilm-l6": ({"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6,
                   "num_attention_heads": 12, "intermediate_size": 1536, "vocab_size": 30522,
                   "max_position_embeddings": 512}, 22.565),
}  # fmt: skip
MINILM = ModelShape.from_config(PUBLISHED["minilm-l6"][0])


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_count_the_published_parameters(name: str) -> None:
    config, millions = PUBLISHED[name]
    shape = ModelShape.from_config(config)
    counted = (shape.linear_parameters + shape.other_parameters) / 1e6
    assert counted == pytest.approx(millions, rel=2e-3)
    assert shape.encodes and not shape.gated


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_modules_and_head_are_those_of_transformers(kind: str) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(
        kind, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        vocab_size=50, max_position_embeddings=40, num_labels=3,
    )  # fmt: skip
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    shape = ModelShape.from_config(config.to_dict())
    for module in shape.modules(()):
        layer = model.get_submodule(module.name)
        assert (layer.out_features, layer.in_features) == (module.out_features, module.in_features)
    linears = [n for n, m in model.named_modules()
               if "encoder.layer" in n and hasattr(m, "in_features")]  # fmt: skip
    assert sorted(linears) == sorted(m.name for m in shape.modules(()))
    name, tensors = shape.head(3)
    own = {n: tuple(p.shape) for n, p in model.named_parameters() if n.startswith(f"{name}.")}
    want = {t.name: (t.out_features, t.in_features) for t in tensors}
    assert own == {n: s if not n.endswith("bias") else (s[1],) for n, s in want.items()}


@pytest.mark.parametrize(
    ("targets", "count"),
    [(("query",), 1), (("dense",), 3), (("intermediate.dense", "value"), 2), ((), 6)],
)
def test_a_target_names_what_ends_with_it(targets: tuple[str, ...], count: int) -> None:
    assert len(MINILM.modules(targets)) == 6 * count


def test_a_target_that_ends_in_the_middle_of_a_name_is_refused() -> None:
    with pytest.raises(ModelError, match="uery do not exist in a bert model"):
        MINILM.modules(("uery",))


def _kept_bytes(shape: ModelShape, layers: int, targets: tuple[str, ...]) -> int:
    """What autograd saves of one pass over 2 rows of 48 tokens, bytes."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    config = transformers.AutoConfig.for_model(
        shape.model_type, hidden_size=shape.hidden, num_hidden_layers=layers,
        num_attention_heads=shape.heads, intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    base: Any = transformers.AutoModelForSequenceClassification.from_config(config)
    base.requires_grad_(False)
    wanted = [m.name for m in replace(shape, layers=layers).modules(targets)]
    model = get_peft_model(base, LoraConfig(r=8, target_modules=wanted, lora_dropout=0.0)).train()
    fixed = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    alive = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)  # else its address might be given to another
        if storage.data_ptr() not in fixed:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = torch.randint(shape.vocabulary, (2, 48))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.get_base_model().bert(input_ids=rows, attention_mask=torch.ones_like(rows))
    return sum(found.values())


@pytest.mark.parametrize("targets", [(), ("query", "value"), ("dense",)], ids=["all", "qv", "mlp"])
def test_what_autograd_keeps_of_a_layer_is_counted_within_a_tenth(targets: tuple[str, ...]) -> None:
    shape = ModelShape("bert", 128, 2, 4, 4, 32, 320, 64, True, positions=512)
    kept = _kept_bytes(shape, 2, targets) - _kept_bytes(shape, 1, targets)
    counted = activation_bytes(shape, 8, targets, compute_bytes=4) * 96
    assert counted == pytest.approx(kept, rel=0.1)


WORK = LocalWork(
    precision="fp32", rank=8, parameters_per_rank=13_824, global_rank=8, sequence_tokens=128,
    micro_batch=8, accumulation=1, local_steps=10, checkpointing=False, evaluation_sequences=4,
    evaluates_global=True, slice_bytes=0, update_bytes=0, global_bytes=0,
)  # fmt: skip


def test_labels_in_place_of_a_vocabulary_cost_less_memory_and_time() -> None:
    classifier = replace(MINILM, labels=2)
    cpu = Machine(4, on_card=False, shares_host=True)
    for cost in (
        lambda shape: peak_memory_bytes(shape, WORK, baseline_bytes=0, machine=cpu),
        lambda shape: train_flops_per_token(shape, WORK),
        lambda shape: forward_flops_per_token(shape, WORK),
    ):
        assert 0 < cost(classifier) < cost(MINILM)
    # 2 FLOPs forward for each weight of the layers, and attention over 128 tokens to both sides.
    least = 2 * MINILM.linear_parameters + 4 * 128 * 384 * 6
    assert least < forward_flops_per_token(classifier, WORK) < 1.1 * least


def test_weights_are_found_in_a_folder_of_the_encoder_alone(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    save_file({"pooler.dense.weight": values}, tmp_path / "model.safetensors")
    (found,) = dense_tensors(tmp_path, ("bert.pooler.dense",))
    assert found == ModuleShape("bert.pooler.dense.weight", 3, 4)
    np.testing.assert_array_equal(base_tensor(tmp_path, found.name), values)
    with pytest.raises(ModelError, match="holds no tensor"):
        base_tensor(tmp_path, "model.pooler.dense.weight")
