"""Predicted against measured peak memory and step time of local rounds, in fresh trainers.

The prediction is the planner's own (`profiles.cost`): it knows the model's shape and what the
device's probe measured of that base, in that precision, at its two sizes. What is compared is what
a device would report. Random models of several shapes; no setting was used to fit a constant.

Peaks are told the same on a busy machine; seconds want a quiet one.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._local_rounds import Setting, local_round, make_spec, probe, write_model
from profiles.cost import LocalWork, reported_peak_bytes, round_seconds
from profiles.device import ComputeProfile, DeviceProfile
from profiles.model import ModelShape
from protos.contract import AdapterSpec, Precision, from_plain, to_plain

RANK = 32
PROBE = {"sequence_tokens": 256, "micro_batch": 4, "rank": RANK // 4}
STEPS = 3
QV, ATTENTION = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")


def _model(
    kind: str, h: int, layers: int, heads: int, i: int, v: int, tied: bool
) -> dict[str, Any]:
    return {"model_type": kind, "hidden": h, "layers": layers, "heads": heads, "kv_heads": 2,
            "intermediate": i, "vocabulary": v, "tied": tied}  # fmt: skip


MODELS = {
    "llama 384x8, 32k": _model("llama", 384, 8, 6, 1024, 32000, False),
    "qwen2 256x6, 152k": _model("qwen2", 256, 6, 4, 1024, 151936, True),
    "starcoder2 384x6, 49k": _model("starcoder2", 384, 6, 6, 1536, 49152, True),
    "llama 512x12, 8k": _model("llama", 512, 12, 8, 1408, 8192, True),
}
PRECISIONS: tuple[Precision, ...] = ("fp32", "nf4", "int8", "bf16")


@dataclass(frozen=True)
class Result:
    """One setting, predicted and measured."""

    setting: Setting
    loaded_bytes: int  # before any work
    peak_bytes: int
    predicted_bytes: int
    step_s: float
    predicted_s: float

    @property
    def memory_error(self) -> float:
        """Relative, of the whole peak."""
        return self.predicted_bytes / self.peak_bytes - 1

    @property
    def above_error(self) -> float:
        """Relative, of what the work added to the loaded base."""
        added = self.peak_bytes - self.loaded_bytes
        return (self.predicted_bytes - self.loaded_bytes) / max(1, added) - 1

    @property
    def time_error(self) -> float:
        """Relative, of a step."""
        return self.predicted_s / self.step_s - 1


def grid(*, quick: bool) -> Iterator[Setting]:
    """Settings that differ from the probe's in one or several ways."""
    for model in list(MODELS)[: 1 if quick else None]:
        for precision in PRECISIONS[: 2 if quick else None]:
            yield Setting(model, precision, (), 32, 256, 4, checkpointing=True)
            yield Setting(model, precision, (), 16, 512, 2, False, "sgd")
            yield Setting(model, precision, (), 4, 512, 4, True, "adamw8bit")
            if not quick:
                yield Setting(model, precision, (), 32, 128, 2, False)
    for model in list(MODELS)[: 0 if quick else None]:
        yield Setting(model, "fp32", QV, 32, 512, 2, False)
        yield Setting(model, "nf4", QV, 8, 512, 4, True)
        yield Setting(model, "nf4", ATTENTION, 16, 384, 2, False, "adamw8bit")
        yield Setting(model, "fp32", (), 8, 1024, 1, False)


def work_of(setting: Setting, spec: AdapterSpec, steps: int) -> LocalWork:
    """The setting as the planner would put it."""
    return LocalWork(
        precision=setting.precision, rank=setting.rank,
        parameters_per_rank=spec.parameters_per_rank, global_rank=RANK,
        sequence_tokens=setting.sequence_tokens, micro_batch=setting.micro_batch, accumulation=1,
        local_steps=steps, checkpointing=setting.checkpointing,
        evaluation_sequences=setting.micro_batch, evaluates_global=False, slice_bytes=0,
        update_bytes=0, global_bytes=0, targets=setting.targets, optimizer=setting.optimizer,
    )  # fmt: skip


def device_of(measured: ComputeProfile) -> DeviceProfile:
    """The machine at hand, as its agent would tell it."""
    return DeviceProfile(
        board="here", cpu="", cores=os.cpu_count() or 1, memory_total_bytes=2**40,
        memory_available_bytes=2**40, disk_free_bytes=2**40, agent_version="", compute=measured,
    )  # fmt: skip


def measure(
    settings: Iterable[Setting], folder: Path, threads: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Raw measurements: of each setting, with the probe that belongs to it; the best of several."""
    probes: dict[Any, ComputeProfile] = {}
    for setting in settings:
        base = folder / setting.model.replace(" ", "-").replace(",", "")
        if not (base / "config.json").exists():
            base.mkdir(parents=True, exist_ok=True)
            write_model(base, **MODELS[setting.model])
        spec = make_spec(base, setting.targets, RANK)
        if setting.probe not in probes:
            request = PROBE | {"precision": setting.precision}
            probes[setting.probe] = _best_probe(
                [probe(base, spec, request, threads) for _ in range(repeats)]
            )
        reports = [
            local_round(base, spec, setting, folder, steps=STEPS, threads=threads)
            for _ in range(repeats)
        ]
        yield {
            "setting": asdict(setting), "probe": to_plain(probes[setting.probe]),
            "peak_bytes": min(r.peak_bytes for r in reports),
            "step_s": min(r.step_s for r in reports),
        }  # fmt: skip


def _best_probe(found: Sequence[ComputeProfile]) -> ComputeProfile:
    """The one of several that was disturbed least."""
    return max(found, key=lambda p: p.tokens_per_s)


def compare(raw: dict[str, Any]) -> Result:
    """A measurement beside what the planner expects."""
    setting = from_plain(Setting, raw["setting"])
    measured = from_plain(ComputeProfile, raw["probe"])
    model = MODELS[setting.model]
    shape = ModelShape.from_config({
        "model_type": model["model_type"], "hidden_size": model["hidden"],
        "num_hidden_layers": model["layers"], "num_attention_heads": model["heads"],
        "num_key_value_heads": model["kv_heads"], "intermediate_size": model["intermediate"],
        "vocab_size": model["vocabulary"], "tie_word_embeddings": model["tied"],
    })  # fmt: skip
    modules = shape.modules(setting.targets)
    spec = AdapterSpec("bench", "bench", "", "", RANK, 32.0, False, 1, modules)
    work, device = work_of(setting, spec, STEPS), device_of(measured)
    return Result(
        setting=setting,
        loaded_bytes=measured.loaded_bytes,
        peak_bytes=raw["peak_bytes"],
        predicted_bytes=reported_peak_bytes(shape, device, work),
        step_s=raw["step_s"],
        predicted_s=round_seconds(shape, device, work).train_s / STEPS,
    )


def main() -> None:
    """Measures, or reads what was measured, and prints the errors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one model, two precisions")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--repeats", type=int, default=1, help="of each; the best counts")
    parser.add_argument("--raw", type=Path, help="keep measurements here, one JSON a line")
    parser.add_argument("--again", type=Path, help="read measurements from here instead")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if args.again is not None:
        raw = [json.loads(line) for line in args.again.read_text().splitlines()]
    else:
        raw = []
        with tempfile.TemporaryDirectory() as folder:
            every = grid(quick=args.quick)
            for found in measure(every, Path(folder), args.threads, args.repeats):
                raw.append(found)
                if args.raw is not None:
                    with args.raw.open("a") as stream:
                        stream.write(json.dumps(found) + "\n")
    results = [compare(found) for found in raw]
    if args.json:
        print(json.dumps([asdict(r) for r in results]))
        return
    for r in results:
        s = r.setting
        how = (
            f"{s.micro_batch}x{s.sequence_tokens:<4d} {'recomputed' if s.checkpointing else '':10s}"
        )
        print(
            f"{s.model:22s} {s.precision:4s} {'+'.join(s.targets) or 'all':13.13s} k={s.rank:<2d} "
            f"{how} {s.optimizer:9s} {r.peak_bytes / 1e6:6.0f} MB {r.memory_error:+6.1%}   "
            f"{r.step_s:6.2f} s {r.time_error:+6.1%}"
        )
    _summary("peak memory", [r.memory_error for r in results])
    _summary("of which above the loaded base", [r.above_error for r in results])
    _summary("seconds of a step", [r.time_error for r in results])


def _summary(name: str, errors: Sequence[float]) -> None:
    found = np.abs(errors)
    print(
        f"{name}: median error {np.median(found):.1%}, 95th percentile "
        f"{np.percentile(found, 95):.1%}, largest {found.max():.1%}, mean {np.mean(errors):+.1%}, "
        f"of {len(found)} settings"
    )


if __name__ == "__main__":
    main()
