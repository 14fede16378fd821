"""An exported base in ONNX Runtime against torch: size, speed, held-out loss, and adapter swaps.

    python -m benchmarks.inference [--quick] [--base MODEL] [--threads N]

The nano code model and three LoRA adapters of rank 8, trained here for some steps on the agent's
own source; held out is the coordinator's. Torch computes in float32, in transformers' loop with its
own cache and the PEFT adapter on it. Rates are the best of some turns that all sides take one after
the other, so that whatever else the machine does meets all alike. Greedy tokens of float32 are
compared with those of transformers' `generate`. Then eight clients ask int8 without a pause while
adapters are swapped below them: every request must end, on one adapter alone.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edge_agent.inference import Engine
    from edge_agent.training.backbone import Backbone

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "trials" / "nano_code"
RANK, ALPHA, LEARNING_RATE, ROW_TOKENS = 8, 16, 5e-4, 128
CLIENTS = 8
SWAP_EVERY_S = 0.1
PROMPT_TOKENS, DECODED_TOKENS = 128, 48


@dataclass(frozen=True)
class Extent:
    """How much is done."""

    prompts: int
    steps: int  # of each adapter
    rows: int  # held out
    turns: int
    swap_s: float


QUICK = Extent(prompts=10, steps=8, rows=24, turns=2, swap_s=3.0)
FULL = Extent(prompts=100, steps=40, rows=160, turns=5, swap_s=15.0)


def tokens_of(package: str, base: Backbone) -> NDArray[np.int64]:
    """The source files of a package of ours, one after the other."""
    import numpy as np

    texts = [path.read_text() for path in sorted((ROOT / package).glob("*.py"))]
    ids = [token for one in base.encode(texts) for token in (base.separator_id, *one)]
    return np.array(ids, np.int64)


def rows_of(package: str, base: Backbone, count: int) -> NDArray[np.int64]:
    """(count, ROW_TOKENS) of such source, evenly spaced."""
    import numpy as np

    tokens = tokens_of(package, base)
    rows = tokens[: len(tokens) // ROW_TOKENS * ROW_TOKENS].reshape(-1, ROW_TOKENS)
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64)]


def prompts_of(base: Backbone, count: int, most: int) -> list[list[int]]:
    """Tokens of source up to some place in it: of 16 to `most` tokens, the same every time."""
    import numpy as np

    tokens, draw = tokens_of("coordinator", base), np.random.default_rng(0)
    found = []
    for _ in range(count):
        size = int(draw.integers(16, most))
        at = int(draw.integers(0, len(tokens) - size))
        found.append([base.separator_id, *tokens[at : at + size - 1].tolist()])
    return found


def train_adapter(base: Backbone, folder: Path, steps: int, seed: int) -> Path:
    """A PEFT folder that fits the agent's source a little."""
    import torch
    from peft import LoraConfig, get_peft_model

    from edge_agent.training.batches import whole_rows
    from edge_agent.training.optimizers import make_optimizer
    from edge_agent.training.steps import settle, train_step

    settle(seed)
    names = sorted({name for name, module in base.model.named_modules()
                    if isinstance(module, torch.nn.Linear) and ".layers." in name})  # fmt: skip
    model: Any = get_peft_model(
        base.model,
        LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=names),
    )
    rows = rows_of("edge_agent", base, 4 * steps)
    optimizer = make_optimizer("adamw", model, LEARNING_RATE)
    model.train()
    for step in range(steps):
        train_step(model, optimizer, [whole_rows(rows[step::steps])])
    model.save_pretrained(folder)
    model.unload()
    base.model.requires_grad_(False)
    return folder


@contextmanager
def adapted(base: Backbone, folder: Path) -> Iterator[Any]:
    """The torch model with a PEFT adapter, for as long as the block lasts."""
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(base.model, str(folder)).eval()
    try:
        yield model
    finally:
        model.unload()


def greedy_differences(
    base: Backbone, engine: Engine, peft: Path, adapter: Path, count: int
) -> list[int]:
    """Prompts, by number, after which the engine writes other tokens than `generate` of torch."""
    import torch

    engine.swap(adapter)
    most = engine.info.context_tokens - DECODED_TOKENS
    differ = []
    with adapted(base, peft) as model, torch.no_grad():
        for number, ids in enumerate(prompts_of(base, count, most)):
            given = torch.tensor([ids])
            wanted = model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), do_sample=False,
                max_new_tokens=DECODED_TOKENS, pad_token_id=base.padding_id,
            )[0, len(ids):].tolist()  # fmt: skip
            pieces = list(engine.generate(ids, max_tokens=DECODED_TOKENS))
            if [piece.token for piece in pieces] != wanted:
                differ.append(number)
    return differ


@dataclass
class Rates:
    """Best tokens per second so far."""

    prefill: float = 0.0
    decode: float = 0.0

    def took(self, read_s: float, written_s: float) -> None:
        """A prompt was read, and so many tokens written, in these seconds."""
        self.prefill = max(self.prefill, PROMPT_TOKENS / read_s)
        self.decode = max(self.decode, DECODED_TOKENS / written_s)


def torch_turn(model: Any, ids: list[int], rates: Rates) -> None:
    """A prompt and its greedy continuation in transformers' own loop."""
    import torch

    with torch.no_grad():
        began = time.perf_counter()
        out = model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        read = time.perf_counter()
        for _ in range(DECODED_TOKENS):
            token = int(out.logits[0, -1].argmax())
            out = model(input_ids=torch.tensor([[token]]), use_cache=True,
                        past_key_values=out.past_key_values, logits_to_keep=1)  # fmt: skip
        rates.took(read - began, time.perf_counter() - read)


def engine_turn(engine: Engine, ids: list[int], rates: Rates) -> None:
    """The same with the engine, pieces of text and all."""
    engine._prefixes.begin(engine._current)  # the prompt is to be read, not remembered
    began = time.perf_counter()
    pieces = engine.generate(ids, max_tokens=DECODED_TOKENS + 1)
    next(pieces)
    read = time.perf_counter()
    written = sum(1 for _ in pieces)
    rates.took(read - began, (time.perf_counter() - read) * DECODED_TOKENS / max(written, 1))


def swaps_under_load(
    engine: Engine, adapters: list[Path], prompts: list[list[int]], lasts_s: float
) -> dict[str, Any]:
    """Eight clients ask without a pause while the adapter changes all the time."""
    alone: dict[tuple[int, ...], set[tuple[int | None, ...]]] = {}
    for file in adapters:
        engine.swap(file)
        for ids in prompts[:CLIENTS]:
            pieces = engine.generate(ids, max_tokens=DECODED_TOKENS)
            alone.setdefault(tuple(ids), set()).add(tuple(piece.token for piece in pieces))
    over = time.perf_counter() + lasts_s
    asked = [0] * CLIENTS
    dropped = [0] * CLIENTS
    mixed = [0] * CLIENTS
    tokens = [0] * CLIENTS

    def client(number: int) -> None:
        ids = prompts[number]
        while time.perf_counter() < over:
            asked[number] += 1
            dropped[number] += 1
            pieces = list(engine.generate(ids, max_tokens=DECODED_TOKENS))
            if pieces and pieces[-1].finish in ("stop", "length"):
                dropped[number] -= 1
            mixed[number] += tuple(p.token for p in pieces) not in alone[tuple(ids)]
            tokens[number] += len(pieces)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    began = time.perf_counter()
    for one in clients:
        one.start()
    took: list[float] = []
    while time.perf_counter() < over:
        took.append(engine.swap(adapters[len(took) % len(adapters)]))
        time.sleep(SWAP_EVERY_S)
    for one in clients:
        one.join()
    lasted = time.perf_counter() - began
    return {
        "clients": CLIENTS, "requests": sum(asked), "dropped": sum(dropped),
        "of_two_adapters": sum(mixed), "tokens_per_s": sum(tokens) / lasted, "swaps": len(took),
        "swap_median_ms": 1e3 * sorted(took)[len(took) // 2],
        "swap_p95_ms": 1e3 * sorted(took)[len(took) * 95 // 100], "swap_most_ms": 1e3 * max(took),
    }  # fmt: skip


def compare(base_name: str, extent: Extent, threads: int, folder: Path) -> dict[str, Any]:
    """Everything; `folder` for what is written on the way."""
    import torch

    from edge_agent.inference import Engine
    from edge_agent.inference_adapter import read_peft, write_adapter
    from edge_agent.inference_folder import ExportPrecision
    from edge_agent.training.backbone import load_base
    from edge_agent.training.batches import whole_rows
    from edge_agent.training.evaluation import evaluate
    from edge_agent.training.export import export_base
    from profiles.model import base_digest, resolve_base

    torch.set_num_threads(threads)
    place = resolve_base(base_name)
    began = time.perf_counter()
    export_base(str(place), folder / "float32", "float32")
    traced_s = time.perf_counter() - began
    engines: dict[str, Engine] = {}
    sizes = {}
    for precision in get_args(ExportPrecision):
        out = folder / precision
        if precision != "float32":
            export_base(str(folder / "float32"), out, precision)
        sizes[precision] = sum(file.stat().st_size for file in out.glob("model.onnx*"))
        engines[precision] = Engine.open(out, threads=threads)
    base = load_base(place, "fp32", torch.device("cpu"))
    sizes["torch"] = sum(p.numel() * p.element_size() for p in base.model.parameters())
    peft = [train_adapter(base, folder / f"peft-{i}", (i + 1) * extent.steps, i) for i in range(3)]
    digest = base_digest(place)
    files = [write_adapter(read_peft(one), digest, folder / "adapters") for one in peft]

    held_out = whole_rows(rows_of("coordinator", base, extent.rows))
    ids = prompts_of(base, 1, PROMPT_TOKENS + 1)[0]
    ids = (ids * PROMPT_TOKENS)[:PROMPT_TOKENS]
    rates = {side: Rates() for side in ("torch", *engines)}
    losses, bare = {}, {}
    with adapted(base, peft[0]) as model:
        losses["torch"] = evaluate(model, held_out, 8).loss
        for _ in range(extent.turns):
            torch_turn(model, ids, rates["torch"])
            for precision, engine in engines.items():
                engine.swap(files[0])
                engine_turn(engine, ids, rates[precision])
    bare["torch"] = evaluate(base.model, held_out, 8).loss
    for precision, engine in engines.items():
        losses[precision] = engine.held_out(held_out).loss
        engine.swap(None)
        bare[precision] = engine.held_out(held_out).loss
    differ = greedy_differences(base, engines["float32"], peft[0], files[0], extent.prompts)
    prompts = prompts_of(base, CLIENTS, engines["int8"].info.context_tokens - DECODED_TOKENS)
    swaps = swaps_under_load(engines["int8"], files, prompts, extent.swap_s)
    sides = {
        side: {
            "size_bytes": sizes[side], "prefill_tokens_per_s": rates[side].prefill,
            "decode_tokens_per_s": rates[side].decode, "loss": losses[side],
            "loss_without_adapter": bare[side],
        }
        for side in rates
    }  # fmt: skip
    return {
        "export_s": traced_s, "sides": sides, "swaps": swaps,
        "adapter_bytes": files[0].stat().st_size,
        "greedy": {"prompts": extent.prompts, "tokens": DECODED_TOKENS, "differ": len(differ)},
        "decode_ratio": sides["int8"]["decode_tokens_per_s"]
        / sides["torch"]["decode_tokens_per_s"],
    }  # fmt: skip


def main() -> None:
    """Prints the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer prompts, steps and turns")
    parser.add_argument("--base", default=str(NANO), help="a decoder (default: the nano model)")
    parser.add_argument("--threads", type=int, default=1, help="of both sides (default: 1)")
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        extent = QUICK if args.quick else FULL
        found = compare(args.base, extent, args.threads, Path(folder))
    print(f"{Path(args.base).name}, {args.threads} threads, adapter of rank {RANK} "
          f"({found['adapter_bytes'] / 1e6:.2f} MB), traced in "
          f"{found['export_s']:.0f} s")  # fmt: skip
    print(f"{'':8} {'MB':>7} {'prefill tok/s':>13} {'decode tok/s':>12} {'loss':>7} "
          f"{'no adapter':>10}")  # fmt: skip
    for side, row in found["sides"].items():
        print(f"{side:8} {row['size_bytes'] / 1e6:7.2f} {row['prefill_tokens_per_s']:13.0f} "
              f"{row['decode_tokens_per_s']:12.0f} {row['loss']:7.4f} "
              f"{row['loss_without_adapter']:10.4f}")  # fmt: skip
    greedy, swaps = found["greedy"], found["swaps"]
    print(f"greedy tokens in float32: {greedy['prompts'] - greedy['differ']} of "
          f"{greedy['prompts']} prompts as torch ({greedy['tokens']} tokens each)")  # fmt: skip
    print(f"{swaps['swaps']} swaps under {swaps['clients']} clients: median "
          f"{swaps['swap_median_ms']:.1f} ms, 95 of 100 below "
          f"{swaps['swap_p95_ms']:.1f} ms, longest {swaps['swap_most_ms']:.1f} ms; "
          f"{swaps['requests']} requests, {swaps['dropped']} dropped, "
          f"{swaps['of_two_adapters']} of two adapters, "
          f"{swaps['tokens_per_s']:.0f} tok/s")  # fmt: skip
    print(json.dumps({"benchmark": "inference", "quick": args.quick, "threads": args.threads,
                      **found}))  # fmt: skip


if __name__ == "__main__":
    main()
