"""Measures the shipped nano code model and writes its card.

Bits per byte and next-token accuracy on held-out files of what it was trained on, and on kinds of
code it never saw; completions as they come, not chosen.
"""

# ruff: noqa: E501 - rows of Markdown tables are single lines
from __future__ import annotations

import math
import platform
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from edge_agent.training.corpus import scan
from edge_agent.training.documents import Corpus, CorpusError, Document
from trials.stream import tokenise

EVALUATED_SEQUENCES = 96
# Label -> pattern under site-packages, language. None of it is trained on.
UNSEEN = {
    "Python: SymPy": ("sympy/**/*.py", "python"),
    "Python tests: NetworkX": ("networkx/**/tests/*.py", "python"),
    "type stubs: NumPy": ("numpy/**/*.pyi", "python-stub"),
    "C++ headers: PyTorch": ("torch/include/torch/**/*.h", "c-header"),
    "JavaScript": ("**/*.js", "javascript"),
}
PROMPTS = (
    "import os\nimport ",
    "def read_lines(path, encoding=",
    "class Stack:\n    def __init__(self",
)


def bits_per_byte(
    model: Any, tokenizer: Any, files: Sequence[Document], most: int = EVALUATED_SEQUENCES
) -> tuple[float, float]:
    """(bits per byte, next-token accuracy) over at most `most` packed sequences."""
    context = int(model.config.max_position_embeddings)
    packed = tokenise(
        files, lambda texts: tokenizer(texts)["input_ids"], tokenizer.eos_token_id, context, most
    )
    nats = hits = count = size = 0.0
    with torch.no_grad():
        for batch in torch.from_numpy(packed).split(16):
            logits = model(batch).logits[:, :-1].flatten(0, 1)
            target = batch[:, 1:].flatten()
            nats += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
            hits += float((logits.argmax(-1) == target).sum())
            count += target.numel()
            text = "".join(tokenizer.batch_decode(batch[:, 1:]))
            size += len(text.replace(tokenizer.eos_token, "").encode())
    return nats / math.log(2) / size, hits / count


def write_card(folder: Path, facts: Mapping[str, Any], stdlib: Corpus, packages: Corpus) -> None:
    """Measures the model in `folder` and writes its README.md."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    site = sysconfig.get_paths()["purelib"]
    measured = [
        ("Python: standard library, held-out files", stdlib.of("held_out")),
        ("Python: packages below, held-out files", packages.of("held_out")),
    ]
    for label, (pattern, language) in UNSEEN.items():
        try:
            found = scan([f"{site}/{pattern}"], languages=(language,), max_files=200)
        except CorpusError:
            continue  # that package is not installed here
        measured.append((f"{label}, never seen", list(found.files)))
    rows = []
    for label, files in measured:
        bits, accuracy = bits_per_byte(model, tokenizer, files)
        rows.append(f"| {label} | {bits:.3f} | {accuracy:.1%} |")
        print(rows[-1], flush=True)
    samples = [_complete(model, tokenizer, prompt) for prompt in PROMPTS]
    (folder / "README.md").write_text(_card(facts, rows, samples, model))


def _complete(model: Any, tokenizer: Any, prompt: str) -> str:
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(prompt)["input_ids"]]])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=72,
                             do_sample=False, repetition_penalty=1.15)  # fmt: skip
    return str(tokenizer.decode(out[0, 1:], skip_special_tokens=True)).rstrip()


def _card(facts: Mapping[str, Any], rows: Sequence[str], samples: Sequence[str], model: Any) -> str:
    config = model.config
    sources = "\n".join(
        f"| {name} | {version} | {licence} |"
        for name, (version, licence) in facts["sources"].items()
    )
    shown = "\n\n".join(f"```python\n{sample}\n```" for sample in samples)
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [code, nano]
---
# Nano code model

A decoder of {facts["parameters"] / 1e6:.2f} M parameters (Llama architecture: {config.hidden_size} wide,
{config.num_hidden_layers} layers, {config.num_attention_heads} heads over {config.num_key_value_heads} key-value heads, tied embeddings, context {config.max_position_embeddings}) with a
byte-level BPE tokenizer of {config.vocab_size} entries, stored in bfloat16. It exists so that Sketchfleet can
be tried and tested offline, with every real part in place. **It is not a useful coding assistant.**

## Training

| | |
|---|---|
| script | `python -m trials.pretrain --out trials/nano_code`, seed {facts["seed"]} |
| data | {facts["files"]:,} Python files, {facts["corpus_tokens"] / 1e6:.1f} M tokens: the standard library and the packages below, without their tests; 3 % of files held out by content hash |
| trained on | {facts["tokens"] / 1e6:.1f} M tokens, {facts["seconds"] / 60:.0f} minutes on {facts["threads"]} shared CPU cores, float32 |
| optimiser | Muon for matrices (6e-3), AdamW for the rest (2e-3), constant, then linear to zero over the last quarter |
| final training loss | {facts["train_loss"]:.3f} nats per token (exponential mean) |

## Measured

| held-out code | bits per byte | next token right |
|---|---|---|
{chr(10).join(rows)}

Held-out files are whole files by content hash; the packages repeat much of their code, so their
figure flatters. Of the kinds marked never seen, the demo fine-tunes on the first four.

## Completions

Greedy with a repetition penalty of 1.15, taken as they come.

{shown}

## Data and licences

The Python standard library {platform.python_version()} (PSF-2.0), and:

| package | version | declared licence |
|---|---|---|
{sources}

The weights are released under Apache-2.0. They may reproduce short passages of the code above,
which stays under its own licences.
"""
