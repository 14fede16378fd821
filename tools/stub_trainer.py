"""Stands in for the trainer where PyTorch cannot be had: the same lines in and out, no training.

Put in the place of the trainer's interpreter (`[trainer] python`), it answers jobs with updates of
noise and made-up measurements, so that everything around training can be tried. Needs what the
network agent needs, nothing more.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from profiles.device import ComputeProfile
from protos.contract import (
    AdapterSpec,
    Assignment,
    Evaluation,
    LocalReport,
    Part,
    ProfileRequest,
    from_plain,
    to_plain,
)
from protos.fitting import fit
from protos.packing import pack

TOKENS_PER_S = 2000.0


def profile(job: Mapping[str, Any]) -> dict[str, Any]:
    """What a device of moderate speed would have measured."""
    spec, request = from_plain(AdapterSpec, job["spec"]), from_plain(ProfileRequest, job["request"])
    compute = ComputeProfile(
        base_digest=spec.base_digest, precision=request.precision, tokens_per_s=TOKENS_PER_S,
        forward_tokens_per_s=3 * TOKENS_PER_S, baseline_bytes=3 * 10**8, peak_bytes=4 * 10**8,
        rank=request.rank, sequence_tokens=request.sequence_tokens,
        micro_batch=request.micro_batch,
    )  # fmt: skip
    return {"event": "result", "compute": to_plain(compute), "gpu": None}


def train(job: Mapping[str, Any]) -> dict[str, Any]:
    """Writes an update of noise, as the assignment wants it packed, and reports a loss."""
    spec, task = from_plain(AdapterSpec, job["spec"]), from_plain(Assignment, job["assignment"])
    evaluations = []
    if task.trains:
        draw = np.random.default_rng(task.seed)
        shapes: dict[Part, str] = {"up": "out_features", "down": "in_features"}
        delta = {
            module.name: {
                part: draw.normal(scale=1e-3, size=(task.rank, getattr(module, width)))
                .astype(np.float32)
                for part, width in shapes.items()
            }
            for module in spec.modules
        }  # fmt: skip
        payload = task.update
        if task.budget is not None:
            fits, _ = fit(spec, payload, task.budget, delta, fed_back=task.error_feedback)
            payload = fits.payload
        packed = pack(spec, payload, delta, assignment_digest=task.digest, seed=task.seed)
        Path(job["update_path"]).write_bytes(packed)
        evaluations.append(Evaluation("slice", "received", 2.0, 0.5, 1000))
    if task.evaluates_global:
        evaluations.append(Evaluation("global", "received", 2.0, 0.5, 1000))
    report = LocalReport(task.assignment_id, "done", evaluations=tuple(evaluations),
                         train_examples=8 if task.trains else 0)  # fmt: skip
    return {"event": "result", "report": to_plain(report)}


JOBS = {"profile": profile, "train": train}


def main() -> int:
    """Answers jobs until the end of input."""
    for line in sys.stdin:
        job = json.loads(line)
        if job["job"] == "stop":
            break
        print(json.dumps(JOBS[job["job"]](job)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
