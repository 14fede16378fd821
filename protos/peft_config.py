"""The configuration of a stock PEFT adapter: coordinator and device write their exports alike."""

from __future__ import annotations

from typing import Any

from protos.contract import AdapterSpec


def adapter_config(spec: AdapterSpec, rank: int, base_name: str) -> dict[str, Any]:
    """adapter_config.json of an adapter of `rank` rows on every module of the spec."""
    return {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": _saved(spec) or None,
        "peft_type": "LORA",
        "r": rank,
        "revision": spec.base_revision or None,
        "target_modules": [m.name for m in spec.modules],
        "task_type": "CAUSAL_LM" if spec.classification is None else "SEQ_CLS",
        "use_dora": False,
        "use_rslora": spec.use_rslora,
    }


def _saved(spec: AdapterSpec) -> list[str]:
    """Modules trained whole; a task head as one, which is how PEFT names and loads it."""
    head = "" if spec.classification is None else spec.classification.head
    own = [t.name.rpartition(".")[0] for t in spec.dense]
    return sorted({head if head and f"{m}.".startswith(f"{head}.") else m for m in own})
