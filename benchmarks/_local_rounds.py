"""Random models, and probes and local rounds on them, each in a trainer process of its own.

What `cost_model.py` measures with: the very trainer that agents start, told its jobs as JSON lines.
Knows no predictions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiles.device import ComputeProfile
from profiles.model import ModelShape, base_digest, read_shape
from protos.contract import (
    AdapterSpec,
    Assignment,
    Encoding,
    LocalReport,
    Payload,
    Precision,
    from_plain,
    to_plain,
)

CODE = ("coordinator", "edge_agent", "profiles", "protos", "trials")  # what is trained on
END = "<|end|>"
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Setting:
    """One configuration of a local round."""

    model: str
    precision: Precision
    targets: tuple[str, ...]  # empty: all linears
    rank: int
    sequence_tokens: int
    micro_batch: int
    checkpointing: bool
    optimizer: str = "adamw"

    @property
    def probe(self) -> tuple[str, str, tuple[str, ...]]:
        """What a device's measurement must share with it."""
        return self.model, self.precision, self.targets


def write_model(folder: Path, **dimensions: Any) -> ModelShape:
    """A decoder of random weights with one token per byte; `dimensions` as in `ModelShape`."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END: 0} | {c: i + 1 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    fast.save_pretrained(folder)
    d = dimensions
    config = transformers.AutoConfig.for_model(
        d["model_type"], hidden_size=d["hidden"], num_hidden_layers=d["layers"],
        num_attention_heads=d["heads"], num_key_value_heads=d["kv_heads"],
        intermediate_size=d["intermediate"], vocab_size=d["vocabulary"],
        tie_word_embeddings=d["tied"], max_position_embeddings=4096,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return read_shape(folder)


def make_spec(folder: Path, targets: tuple[str, ...], rank: int) -> AdapterSpec:
    """The adapter of a run of this base."""
    modules = read_shape(folder).modules(targets)
    return AdapterSpec("bench", "bench", "", base_digest(folder), rank, 32.0, False, 1, modules)


def probe(
    folder: Path, spec: AdapterSpec, request: Mapping[str, Any], threads: int
) -> ComputeProfile:
    """What a device measures before its first assignment."""
    found = _ask({"job": "profile", "base_folder": str(folder), "spec": to_plain(spec),
                  "request": dict(request)}, threads)  # fmt: skip
    return from_plain(ComputeProfile, found["compute"])


def local_round(
    folder: Path, spec: AdapterSpec, setting: Setting, work: Path, *, steps: int, threads: int,
    encoding: Encoding = "int8", learning_rate: float = 1e-4, seed: int = 1,
) -> LocalReport:  # fmt: skip
    """A whole local round of this setting on the repository's own code.

    The update lies in `work` as update.bin.
    """
    k = setting.rank
    task = Assignment(
        assignment_id="bench.0.here", run_id="bench", round=0, device_id="here", method="fslora",
        rank=k, rows="prefix", sketch_offset=0, alpha=32.0, trained=("up", "down"), personal=(),
        keeps_basis=True, keeps_state=False, error_feedback=False, fresh=True,
        precision=setting.precision, sequence_tokens=setting.sequence_tokens,
        micro_batch=setting.micro_batch, accumulation=1, checkpointing=setting.checkpointing,
        local_steps=steps, learning_rate=learning_rate, optimizer=setting.optimizer,
        update=Payload(k, encoding), evaluation_sequences=setting.micro_batch, held_out_share=0.1,
        evaluates_global=False, seed=seed, deadline_s=3600.0, reason="",
    )  # fmt: skip
    job = {
        "job": "train", "base_folder": str(folder), "spec": to_plain(spec),
        "assignment": to_plain(task), "update_path": str(work / "update.bin"),
        "data": {"include": [str(ROOT / part) for part in CODE], "max_files": 60},
    }  # fmt: skip
    return from_plain(LocalReport, _ask(job, threads)["report"])


def _ask(job: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """The result of one job of a fresh trainer."""
    command = [sys.executable, "-m", "edge_agent.training.trainer", "--threads", str(threads)]
    env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT,
        env=env,
    ) as trainer:  # fmt: skip
        assert trainer.stdin is not None and trainer.stdout is not None
        trainer.stdin.write(json.dumps(job) + '\n{"job": "stop"}\n')
        trainer.stdin.flush()
        for line in trainer.stdout:
            event = json.loads(line)
            if event["event"] == "error":
                raise SystemExit(f"the trainer failed: {event['message']}")
            if event["event"] == "result":
                return dict(event)
        trainer.wait()
        log.seek(0)
        raise SystemExit(f"the trainer ended without a result:\n{log.read()[-2000:]}")
