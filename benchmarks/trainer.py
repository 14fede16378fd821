"""Our training step against a plain transformers + PEFT loop: tokens per second and memory.

    python -m benchmarks.trainer [--quick]

The same random Qwen2 of few layers with a vocabulary of 151 936, the same LoRA on all projections,
batch, precision (what an agent would compute in here) and AdamW; the plain loop is
`model(input_ids, labels=input_ids).loss.backward()` with gradients clipped. Each side runs in a
process of its own, so its peak memory is its own: the high-water mark of the steps less what the
process held before the base was loaded. The two take turns step by step, so that whatever else the
machine does meets both alike; the best step of each counts. CPU seconds stand beside: they change
less when others take the processor. Both sides use two threads.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARY = 151_936  # Qwen2.5's
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 512, 2048, 6, 8, 2
RANK, ALPHA, LEARNING_RATE = 16, 32.0, 1e-4
THREADS = 2
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """What both sides train."""

    precision: str
    tokens: int
    micro_batch: int = 1


def write_base(folder: Path) -> None:
    """A random Qwen2 with a tokenizer of one token per byte."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    words = Tokenizer(models.BPE(vocab={"<|end|>": 0, "a": 1}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        tie_word_embeddings=True, eos_token_id=0, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)


def draw(case: Case) -> Any:
    """Random tokens: (micro_batch, tokens) int64."""
    import numpy as np

    shape = (case.micro_batch, case.tokens)
    return np.random.default_rng(0).integers(VOCABULARY, size=shape, dtype=np.int64)


def ours(folder: Path, case: Case) -> Callable[[], float]:
    """A step as a local round takes it; returns the loss."""
    import torch

    from edge_agent.training.backbone import load_base
    from edge_agent.training.batches import whole_rows
    from edge_agent.training.optimizers import make_optimizer
    from edge_agent.training.slice import attached
    from edge_agent.training.steps import settle, train_step
    from profiles.model import base_digest, read_shape
    from protos.contract import AdapterSpec

    settle(0)
    modules = read_shape(folder).modules(())
    spec = AdapterSpec("bench", "b", "", base_digest(folder), RANK, ALPHA, False, 1, modules)
    precision: Any = case.precision
    base = load_base(folder, precision, torch.device("cpu"))
    attachment = attached(base.model, spec, RANK, alpha=ALPHA)
    model = attachment.__enter__()  # for the life of the process
    optimizer = make_optimizer("adamw", model, LEARNING_RATE)
    model.train()
    batches = [whole_rows(draw(case))]

    def step() -> float:
        assert attachment is not None
        return train_step(model, optimizer, batches)

    return step


def plain(folder: Path, case: Case) -> Callable[[], float]:
    """A step as tutorials take it; returns the loss."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from edge_agent.training.backbone import compute_dtype

    dtype = torch.float32 if case.precision == "fp32" else compute_dtype(torch.device("cpu"))
    make: Any = BitsAndBytesConfig  # untyped
    quantised = make(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    base: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype,
        quantization_config=quantised if case.precision == "nf4" else None,
    )  # fmt: skip
    base.config.use_cache = False
    alpha: Any = ALPHA  # PEFT says int and only divides
    config = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=alpha, target_modules=list(TARGETS)
    )
    model: Any = get_peft_model(base, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    model.train()
    ids = torch.from_numpy(draw(case))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


SIDES = {"ours": ours, "plain": plain}


def work(side: str, folder: str, case: Case, pipe: Any) -> None:
    """In a process of its own: a step whenever asked, with its seconds and the peak so far."""
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    speech: Any = transformers.logging  # untyped
    speech.disable_progress_bar()
    import bitsandbytes  # noqa: F401  imported on both sides, whether the base needs it or not
    import peft  # noqa: F401

    before = resident_bytes("VmRSS")
    step = SIDES[side](Path(folder), case)
    loss = step()  # pays for allocation and kernel choice
    pipe.send(loss)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM back to VmRSS, proc(5)
    while pipe.recv():
        began, cpu = time.perf_counter(), time.process_time()
        step()
        pipe.send({
            "step_s": time.perf_counter() - began,
            "cpu_s": time.process_time() - cpu,
            "peak_bytes": resident_bytes("VmHWM") - before,
        })  # fmt: skip


def resident_bytes(what: str) -> int:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {what}")


def compare(folder: Path, case: Case, repeats: int) -> dict[str, Any]:
    """Both sides, turn by turn."""
    context = multiprocessing.get_context("spawn")
    running = {}
    for side in SIDES:
        here, there = context.Pipe()
        child = context.Process(target=work, args=(side, str(folder), case, there))
        child.start()
        there.close()
        running[side] = (child, here)
    first_losses = {side: here.recv() for side, (_, here) in running.items()}
    seen: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side, (_, here) in running.items():
            here.send(True)
            seen[side].append(here.recv())
    for child, here in running.values():
        here.send(False)
        child.join()
    best = {
        side: {
            "tokens_per_s": case.micro_batch * case.tokens / min(x["step_s"] for x in found),
            "cpu_s": min(x["cpu_s"] for x in found),
            "peak_bytes": max(x["peak_bytes"] for x in found),
        }
        for side, found in seen.items()
    }
    us, them = best["ours"], best["plain"]
    return {
        "precision": case.precision,
        "tokens": case.tokens,
        "ours": us,
        "plain": them,
        "speed_ratio": us["tokens_per_s"] / them["tokens_per_s"],
        "cpu_ratio": them["cpu_s"] / us["cpu_s"],
        "peak_ratio": us["peak_bytes"] / them["peak_bytes"],
        # Before any step both adapters are zero, so the first losses are of the same model.
        "loss_difference": abs(first_losses["ours"] - first_losses["plain"]),
    }


def main() -> None:
    """Prints the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two lengths, three steps each")
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    lengths = (256, 1024) if args.quick else (256, 512, 1024)
    repeats = 3 if args.quick else 5
    print(f"Qwen2 {LAYERS} layers x {HIDDEN}, vocabulary {VOCABULARY}, rank {RANK}, batch 1, "
          f"{THREADS} threads, best of {repeats} steps")  # fmt: skip
    print(f"{'base':5} {'tokens':>6} {'ours tok/s':>10} {'plain tok/s':>11} {'speed x':>8} "
          f"{'CPU x':>6} {'ours MB':>8} {'plain MB':>8} {'memory x':>8}  losses apart")  # fmt: skip
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_base(folder)
        for precision in ("fp32", "nf4"):
            for tokens in lengths:
                found = compare(folder, Case(precision, tokens), repeats)
                results.append(found)
                us, them = found["ours"], found["plain"]
                print(f"{precision:5} {tokens:6} {us['tokens_per_s']:10.0f} "
                      f"{them['tokens_per_s']:11.0f} {found['speed_ratio']:8.2f} "
                      f"{found['cpu_ratio']:6.2f} {us['peak_bytes'] / 1e6:8.0f} "
                      f"{them['peak_bytes'] / 1e6:8.0f} {found['peak_ratio']:8.2f}  "
                      f"{found['loss_difference']:.1e}", flush=True)  # fmt: skip
    print(json.dumps({
        "benchmark": "trainer", "quick": args.quick, "threads": THREADS, "results": results,
        "least_speed_ratio": min(r["speed_ratio"] for r in results),
        "most_peak_ratio": max(r["peak_ratio"] for r in results),
        "peak_ratio_at_1024": max(r["peak_ratio"] for r in results if r["tokens"] == 1024),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
