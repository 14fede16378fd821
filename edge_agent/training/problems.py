"""pass@k: programs written for problems with tests, run in the sandbox.

Asks the model for programs, has them tested, and estimates pass@k without bias. What is asked is
`problem_files`', what keeps a program in is `sandbox`'s. Nothing generated is run in this process.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from edge_agent.training.backbone import Backbone
from edge_agent.training.completions import generate
from edge_agent.training.problem_files import ProblemError, read_problems
from edge_agent.training.sandbox import Limits, SandboxError, run_program

log = logging.getLogger("sketchfleet.trainer")


class ProblemResult(NamedTuple):
    """How many problems were posed and what share was solved; None where none could be."""

    problems: int
    samples: int
    pass_at_1: float | None
    pass_at_k: float | None  # k = samples


def measure_problems(
    base: Backbone,
    model: Any,
    path: str | Path,
    samples: int,
    limits: Limits,
    seed: int,
    *,
    max_problems: int | None = None,
    temperature: float = 0.8,
    max_new_tokens: int = 256,
) -> ProblemResult:
    """Writes and tests `samples` programs for each problem of the file.

    One sample is the model's most likely program; several are drawn at `temperature` (top-p 0.95)
    from torch's generator, seeded here and left as it was found. Where this device cannot keep a
    program in, no figure is given and the log says what is missing.

    Raises `CorpusError` on a file that cannot be used.
    """
    solved: list[int] = []
    outcomes = Counter[str]()
    protections: Sequence[str] = ()
    before = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        for problem in read_problems(Path(path), max_problems):
            passed = 0
            for _ in range(samples):
                answer = generate(
                    base,
                    model,
                    problem.prompt,
                    max_new_tokens=max_new_tokens,
                    stops=problem.stops,
                    temperature=temperature if samples > 1 else 0.0,
                )
                verdict = run_program(problem.program(answer), problem.tests, limits)
                outcomes[verdict.outcome] += 1
                protections = verdict.protections
                passed += verdict.passed
            solved.append(passed)
    except SandboxError as error:
        log.warning("problems are not posed: %s", error)
        return ProblemResult(0, samples, None, None)
    finally:
        torch.random.set_rng_state(before)
    if not solved:
        raise ProblemError(f"{path} holds no problem; check [evaluation] problems")
    log.info("problems", extra={"outcomes": dict(outcomes), "protections": ", ".join(protections)})
    at_1 = sum(pass_at_k(samples, c, 1) for c in solved) / len(solved)
    at_k = sum(pass_at_k(samples, c, samples) for c in solved) / len(solved)
    return ProblemResult(len(solved), samples, at_1, at_k)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of k programs passes, estimated from n of which c passed; k <= n.

    1 - C(n - c, k) / C(n, k), the unbiased estimator of arXiv 2107.03374.
    """
    if not 0 < k <= n or not 0 <= c <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {c} of {n} programs")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
