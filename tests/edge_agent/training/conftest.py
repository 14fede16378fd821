"""A tiny random Llama with a byte-level tokenizer, and a folder of synthetic code."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from edge_agent.training.workbench import Workbench
from profiles.model import base_digest, read_shape
from protos.contract import AdapterSpec

torch.set_num_threads(1)


def write_base(folder: Path) -> Path:
    """2 layers, hidden 64, one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<|end|>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(vocabulary) + 7,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.1,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def spec(base_folder: Path) -> AdapterSpec:
    return AdapterSpec(
        run_id="run",
        base="tiny",
        base_revision="",
        base_digest=base_digest(base_folder),
        rank=8,
        alpha=16.0,
        use_rslora=False,
        seed=1,
        modules=read_shape(base_folder).modules(()),
    )


@pytest.fixture(scope="session")
def bench() -> Workbench:
    """One warm workbench: tests that need another precision come back to fp32 by a reload."""
    return Workbench(torch.device("cpu"))


@pytest.fixture(scope="session")
def code_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    for i in range(40):
        body = "\n".join(f"    total += values[{j}] * {i}" for j in range(12))
        text = f"def weigh_{i}(values):\n    total = {i}\n{body}\n    return total\n"
        (folder / f"weigh_{i}.py").write_text(text)
    (folder / "notes.json").write_text(json.dumps({"not": "code"}))
    return folder
