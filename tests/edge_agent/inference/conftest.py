"""A tiny random Qwen2 (grouped queries, tied embeddings, biases) as a graph, and PEFT adapters."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from edge_agent.inference import Engine
from edge_agent.inference_adapter import read_peft, write_adapter
from edge_agent.training.backbone import load_base
from edge_agent.training.export import export_base
from profiles.model import base_digest
from tests.tiny_base import write_base

torch.set_num_threads(1)

ENDS = (0, 257, 258, 259)  # the separator and the marks
MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


def write_qwen(folder: Path) -> Path:
    """2 layers, context 160; one token per byte and the marks to fill in the middle."""
    from tokenizers import Tokenizer
    from transformers import Qwen2Config, Qwen2ForCausalLM

    write_base(folder, hidden=32, intermediate=48)  # for its tokenizer
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(list(MARKS))
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=264, max_position_embeddings=160,
        tie_word_embeddings=True, initializer_range=0.3,
        eos_token_id=0, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    torch.nn.init.normal_(model.model.layers[1].self_attn.q_proj.bias)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    return write_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory, base_folder):
    """The float32 export; tracing takes seconds, so that all workers share one."""
    if os.environ.get("PYTEST_XDIST_WORKER") is None:
        shared = tmp_path_factory.mktemp("exported")
    else:
        shared = tmp_path_factory.getbasetemp().parent
    out = shared / "exported-qwen"
    with (shared / "exporting").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            export_base(str(base_folder), out, "float32")
    return out


@pytest.fixture(scope="session")
def backbone(base_folder):
    return load_base(base_folder, "fp32", torch.device("cpu"))


@pytest.fixture
def engine(exported):
    made = Engine.open(exported, threads=1)
    yield made
    made.close()


class Adapters:
    """Random PEFT adapters of the base, as folders and as files of ONNX Runtime."""

    def __init__(self, folder, base_folder, backbone):
        self._folder, self._backbone = folder, backbone
        self._digest = base_digest(base_folder)

    def peft(self, seed, *, rank=4, targets=("q_proj", "v_proj", "down_proj"), rslora=False):
        from peft import LoraConfig, get_peft_model

        out = self._folder / f"peft-{seed}-{rank}-{len(targets)}-{rslora}"
        if not out.exists():
            torch.manual_seed(seed)
            model = get_peft_model(
                self._backbone.model,
                LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank,
                           use_rslora=rslora, target_modules=list(targets)),
            )  # fmt: skip
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if ".lora_B." in name:
                        weight.normal_(std=0.3)
            model.save_pretrained(out)
            model.unload()
        return out

    def file(self, seed, **options):
        return write_adapter(read_peft(self.peft(seed, **options)), self._digest, self._folder)

    def model(self, seed, **options):
        """(the torch model with this adapter, what takes it off again)."""
        from peft import PeftModel

        made = PeftModel.from_pretrained(self._backbone.model, str(self.peft(seed, **options)))
        return made.eval()


@pytest.fixture(scope="session")
def adapters(tmp_path_factory, base_folder, backbone):
    return Adapters(tmp_path_factory.mktemp("adapters"), base_folder, backbone)


@pytest.fixture
def torch_greedy(backbone):
    """Token ids that torch's own `generate` adds to a prompt."""

    def greedy(model, ids, count):
        given = torch.tensor([ids])
        with torch.no_grad():
            out = model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=count,
                do_sample=False, pad_token_id=0, eos_token_id=list(ENDS),
            )  # fmt: skip
        return out[0, len(ids) :].tolist()

    return greedy


def tokens_of(pieces):
    return [piece.token for piece in pieces if piece.token is not None]


def text_of(pieces):
    return "".join(piece.text for piece in pieces)
