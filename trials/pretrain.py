"""Trains the nano code model that the repository ships, from code every installation already has.

    python -m trials.pretrain --out trials/nano_code

Reads the Python standard library and the permissively licensed packages named in `PACKAGES`,
trains a byte-level BPE tokenizer and a small Llama-type decoder on them, and writes a standard
Hugging Face folder with its model card. Seeded; the learning rate is constant and then falls
linearly to zero over the last quarter (warm-up, stable, decay: arXiv 2405.18392), so a run that
was stopped resumes from its snapshot with any larger or smaller `--tokens`.

What the demo fine-tunes on is left out on purpose: tests, type stubs, headers, SymPy, NetworkX.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from edge_agent.training.corpus import scan
from edge_agent.training.documents import Corpus, Document
from trials.model_card import bits_per_byte, write_card
from trials.stream import tokenise

# Distribution name -> import folder, and how many files at most: the larger ones repeat themselves.
PACKAGES: dict[str, tuple[str, int]] = {
    "torch": ("torch", 1200),
    "transformers": ("transformers", 700),
    "peft": ("peft", 400),
    "accelerate": ("accelerate", 400),
    "bitsandbytes": ("bitsandbytes", 400),
    "huggingface_hub": ("huggingface_hub", 400),
    "numpy": ("numpy", 400),
    "matplotlib": ("matplotlib", 400),
    "fonttools": ("fontTools", 400),
    "mpmath": ("mpmath", 400),
    "rich": ("rich", 400),
    "pygments": ("pygments", 400),
    "pydantic": ("pydantic", 400),
    "psutil": ("psutil", 400),
    "fsspec": ("fsspec", 400),
    "setuptools": ("setuptools", 400),
    "pip": ("pip", 400),
    "jinja2": ("jinja2", 400),
    "click": ("click", 400),
    "pytest": ("_pytest", 400),
    "cryptography": ("cryptography", 400),
    "grpcio": ("grpc", 400),
}
PERMISSIVE = ("MIT", "BSD", "Apache", "PSF", "Python Software Foundation", "ISC")
EXCLUDE = (
    "*/tests/*", "*/test/*", "*/testing/*", "*/test_*.py", "*_test.py", "*/conftest.py",
    "*/site-packages/*/_vendor/*", "*/idlelib/*", "*/lib2to3/*", "*/turtledemo/*",
    "*/encodings/*", "*/__pycache__/*", "*_pb2*.py",
)  # fmt: skip

PATTERN = r"[\r\n][\r\n \t]*|[ _]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}_]+|_+|[ \t]+"
CONTEXT = 256
VOCABULARY = 4096
SEPARATOR = "<|endoftext|>"
SEED = 20261121


def licence_of(distribution: str) -> str:
    """The licence a distribution declares; raises `SystemExit` when it is not permissive."""
    meta: Any = importlib.metadata.metadata(distribution)
    declared = (
        meta.get("License-Expression")
        or " ".join(c for c in meta.get_all("Classifier") or [] if c.startswith("License"))
        or meta.get("License")
        or ""
    )
    if not any(word in declared for word in PERMISSIVE):
        raise SystemExit(f"{distribution} declares {declared[:80]!r}; remove it from PACKAGES")
    return declared.removeprefix("License :: OSI Approved :: ")[:80]


def collect() -> tuple[Corpus, Corpus]:
    """The standard library and the packages, each split by content hash."""
    paths = sysconfig.get_paths()
    keep: Any = {"languages": ("python",), "held_out_share": 0.03}
    stdlib = scan([f"{paths['stdlib']}/*.py", *(
        str(p) for p in sorted(Path(paths["stdlib"]).iterdir())
        if p.is_dir() and p.name not in ("site-packages", "dist-packages", "ensurepip")
        and not p.name.startswith("config-")
    )], exclude=EXCLUDE, **keep)  # fmt: skip
    files: dict[str, Document] = {}
    for distribution, (folder, most) in PACKAGES.items():
        licence_of(distribution)
        root = Path(paths["purelib"]) / folder
        for f in scan([str(root)], exclude=EXCLUDE, **keep).files[:most]:
            files[f.digest] = f
    return stdlib, Corpus(tuple(files[d] for d in sorted(files)))


def train_tokenizer(files: list[Document]) -> Any:
    """Byte-level BPE of `VOCABULARY` entries; a line break and its indent are one piece."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SEPARATOR, "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f.text for f in files), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SEPARATOR,
        bos_token=SEPARATOR,
        pad_token="<|pad|>",  # noqa: S106 - a token of text
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build() -> Any:
    """A Llama of 2.8 M parameters: 192 x 5 layers, 6 heads over 2 key-value heads, tied."""
    config: Any = LlamaConfig
    return LlamaForCausalLM(
        config(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            rope_theta=10_000.0,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
    )


class Muon:
    """Momentum orthogonalised by Newton-Schulz (K. Jordan, 2024), in float32.

    `torch.optim.Muon` runs the iteration in bfloat16, which CPUs without bf16 units emulate.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.momentum = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update of every matrix; `lr` is the RMS of the update."""
        for p, m in zip(self.parameters, self.momentum, strict=True):
            assert p.grad is not None
            m.lerp_(p.grad, 0.05)
            x = p.grad.lerp(m, 0.95)
            tall = x.shape[0] > x.shape[1]
            x = x.T if tall else x
            x = x / (x.norm() + 1e-7)
            for _ in range(5):
                g = x @ x.T
                x = 3.4445 * x + (-4.7750 * g + 2.0315 * g @ g) @ x
            p.mul_(1 - lr * 0.1).add_(x.T if tall else x, alpha=-lr * 0.2 * max(p.shape) ** 0.5)


def main() -> None:
    """Trains, evaluates, writes the folder and its card."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--work", type=Path, default=Path(".pretrain"), help="snapshots and log")
    parser.add_argument("--tokens", type=float, default=24e6, help="tokens to train on")
    parser.add_argument("--batch", type=int, default=32, help="sequences per step")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--card", action="store_true", help="only measure --out and write its card")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)

    stdlib, packages = collect()
    if args.card:
        facts = json.loads((args.work / "training.json").read_text())
        write_card(args.out, facts, stdlib, packages)
        return
    train = stdlib.of("train") + packages.of("train")
    tokenizer = train_tokenizer(train)
    tokenizer.save_pretrained(args.out)
    model = build()
    rows = torch.from_numpy(tokenise(train, lambda t: tokenizer(t)["input_ids"], 0, CONTEXT))
    n = sum(p.numel() for p in model.parameters())
    print(f"{n:,} parameters; {len(train)} files, {rows.numel():,} tokens", flush=True)

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    steps = int(args.tokens / (args.batch * CONTEXT))
    start, seconds = 0, 0.0
    snapshot = args.work / "snapshot.safetensors"
    state: dict[str, Tensor] = {}
    if snapshot.exists():
        state = load_file(snapshot)
        start, seconds = int(state["step"]), float(state["seconds"])
        for i, p in enumerate(matrices):
            p.data.copy_(state[f"matrix.{i}"])
            muon.momentum[i].copy_(state[f"momentum.{i}"])
        for i, p in enumerate(others):
            p.data.copy_(state[f"other.{i}"])
            adam.state[p] = {
                k: state[f"adam.{i}.{k}"].clone() for k in ("step", "exp_avg", "exp_avg_sq")
            }

    order = torch.Generator().manual_seed(SEED)
    permutation = torch.cat(
        [torch.randperm(len(rows), generator=order)
         for _ in range(1 + steps * args.batch // len(rows))]
    )  # fmt: skip
    begun = time.monotonic()
    smooth = 0.0
    for step in range(start, steps):
        # Snapshots are of the stable phase only, so that a resumed run may change its length.
        scale = min(1.0, (step + 1) / 50, 4 * (steps - step) / steps)
        if scale == 1.0 and step % 100 == 0 and step > start:
            state = {"step": torch.tensor(step),
                     "seconds": torch.tensor(seconds + time.monotonic() - begun)}  # fmt: skip
            for i, p in enumerate(matrices):
                state |= {f"matrix.{i}": p.data, f"momentum.{i}": muon.momentum[i]}
            for i, p in enumerate(others):
                state[f"other.{i}"] = p.data
                state |= {f"adam.{i}.{k}": v for k, v in adam.state[p].items()}
            save_file(state, snapshot.with_suffix(".tmp"))
            snapshot.with_suffix(".tmp").replace(snapshot)
        batch = rows[permutation[step * args.batch : (step + 1) * args.batch]]
        logits = model(batch).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        muon.step(6e-3 * scale)
        for group in adam.param_groups:
            group["lr"] = 2e-3 * scale
        adam.step()
        model.zero_grad(set_to_none=True)
        value = loss.item()
        smooth = value if not smooth else 0.98 * smooth + 0.02 * value
        if step % 20 == 0:
            rate = (step + 1 - start) * args.batch * CONTEXT / (time.monotonic() - begun)
            print(f"step {step}/{steps} loss {smooth:.3f} {rate:,.0f} tok/s", flush=True)
        if step % 500 == 0 and step:
            model.eval()
            bits, hits = bits_per_byte(model, tokenizer, stdlib.of("held_out"))
            model.train()
            print(f"  held-out standard library {bits:.3f} bits/byte, {hits:.1%}", flush=True)
    seconds += time.monotonic() - begun

    # What ships is bfloat16, so the card measures the rounded weights, as everyone will load them.
    model.to(torch.bfloat16).save_pretrained(args.out)
    facts = {
        "parameters": n, "seconds": round(seconds), "threads": args.threads,
        "tokens": steps * args.batch * CONTEXT, "corpus_tokens": rows.numel(), "files": len(train),
        "train_loss": round(smooth, 4), "seed": SEED,
        "sources": {d: [importlib.metadata.version(d), licence_of(d)] for d in PACKAGES},
    }  # fmt: skip
    (args.work / "training.json").write_text(json.dumps(facts, indent=1))
    write_card(args.out, facts, stdlib, packages)


if __name__ == "__main__":
    main()
