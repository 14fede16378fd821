"""Whether this interpreter can train on this device: one JSON line per thing tried.

    python -m edge_agent.training.selfcheck

Lines are written as each thing was tried, so that a crash or a hang tells where it happened. Judges
nothing: `edge_agent.checks.trainer` does, in the agent's process.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "accelerate")
SIZE = 512  # of the matrices


def main() -> int:
    """Tries everything; returns 0 whatever came out."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no fact
    os.environ["HF_HUB_OFFLINE"] = "1"

    def tell(**fact: Any) -> None:
        out.write(json.dumps(fact) + "\n")
        out.flush()

    tell(stage="python", version=platform.python_version(), executable=sys.executable)
    imported = []
    for package in PACKAGES:
        tell(stage="begin", what=f"import {package}")
        try:
            importlib.import_module(package)
        except Exception as error:  # noqa: BLE001 - a broken wheel raises anything
            tell(stage="import", package=package, error=_sentence(error))
        else:
            tell(stage="import", package=package, version=importlib.metadata.version(package))
            imported.append(package)
    if "torch" not in imported:
        return 0
    tell(stage="begin", what="looking for CUDA")
    tell(stage="cuda", **_cuda())
    for what, attempt in (("matmul", _matmul), ("nf4", _nf4)):
        if what == "nf4" and "bitsandbytes" not in imported:
            continue
        tell(stage="begin", what=what)
        tell(stage=what, **_tried(attempt))
    return 0


def _cuda() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        why = ""
        if torch.version.cuda is not None:
            try:
                torch.cuda.init()
            except (RuntimeError, AssertionError) as error:
                why = _sentence(error)
        return {"built": torch.version.cuda, "available": False, "why": why}
    facts = torch.cuda.get_device_properties(0)
    return {
        "built": torch.version.cuda,
        "available": True,
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "architectures": torch.cuda.get_arch_list(),
        "unified": bool(getattr(facts, "is_integrated", False)),
    }


def _tried(attempt: Callable[[], float]) -> dict[str, Any]:
    begun = time.perf_counter()
    try:
        error = attempt()
    except Exception as failure:  # noqa: BLE001 - drivers raise anything
        return {"error": _sentence(failure)}
    return {"relative_error": error, "seconds": time.perf_counter() - begun}


def _matmul() -> float:
    """Relative error of a bf16 product on the device against float32 on the CPU."""
    import torch

    a, b = (torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    exact = a @ b
    got = (a.to(_device(), torch.bfloat16) @ b.to(_device(), torch.bfloat16)).float().cpu()
    return float((got - exact).norm() / exact.norm())


def _nf4() -> float:
    """Relative error of a 4-bit round trip on the device; about 0.1 when it works."""
    import torch
    from bitsandbytes import functional

    weights = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(_device())
    packed, state = functional.quantize_4bit(weights, quant_type="nf4")
    back = functional.dequantize_4bit(packed, state)
    return float((back - weights).norm() / weights.norm())


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


if __name__ == "__main__":
    sys.exit(main())
