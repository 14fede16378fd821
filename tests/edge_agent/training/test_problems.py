"""Problems in both formats: reference solutions pass, wrong ones do not, pass@k is unbiased."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_agent.training import problems
from edge_agent.training.backbone import Backbone
from edge_agent.training.connectors import DataSelection, Problems, require_usable
from edge_agent.training.documents import CorpusError
from edge_agent.training.evaluation import measure
from edge_agent.training.problem_files import Problem, ProblemError, read_problems
from edge_agent.training.problems import measure_problems, pass_at_k
from edge_agent.training.row_packing import pack_documents
from edge_agent.training.sandbox import Limits, SandboxError, Verdict, run_program
from edge_agent.training.workbench import Workbench
from protos.contract import AdapterSpec
from tests.edge_agent.training.test_documents import document

ROOT = Path(__file__).resolve().parents[3]
OURS = {kind: ROOT / "tests" / "data" / f"problems_{kind}.jsonl" for kind in ("humaneval", "mbpp")}
SHARED = ROOT.parent / "shared" / "data"
PUBLIC = {
    "humaneval": SHARED / "humaneval" / "HumanEval.jsonl.gz",
    "mbpp": SHARED / "mbpp" / "mbpp.jsonl.xz",
}
LIMITS = Limits(wall_s=20.0, cpu_s=20.0)


@pytest.fixture
def base(bench: Workbench, base_folder: Path, spec: AdapterSpec) -> Backbone:
    return bench.base(base_folder, "fp32", spec)


def check(problem: Problem, completion: str) -> Verdict:
    return run_program(problem.program(completion), problem.tests, LIMITS)


@pytest.mark.parametrize("kind", OURS)
def test_reference_solutions_pass_and_empty_ones_do_not(kind: str) -> None:
    found = list(read_problems(OURS[kind]))
    assert len(found) >= 3
    for problem in found:
        assert problem.reference, problem.name
        assert (verdict := check(problem, problem.reference)).passed, (problem.name, verdict)
        assert not check(problem, "    pass\n" if problem.continues else "").passed


@pytest.mark.parametrize("kind", PUBLIC)
@pytest.mark.parametrize("most", [12, pytest.param(None, marks=pytest.mark.slow)])
def test_public_problems_are_solved_by_their_references(kind: str, most: int | None) -> None:
    if not PUBLIC[kind].is_file():
        pytest.skip(f"{PUBLIC[kind]} is not here")
    failed = [p.name for p in read_problems(PUBLIC[kind], most) if not check(p, p.reference).passed]
    assert failed == [], f"{len(failed)} references do not pass"


def test_an_answer_to_humaneval_goes_on_and_one_to_mbpp_stands_alone() -> None:
    he, mbpp = (next(read_problems(OURS[kind])) for kind in OURS)
    assert he.program("    return 1") == he.prompt + "    return 1"
    assert he.tests.endswith("\ncheck(double_evens)\n")
    assert mbpp.program("x = 1") == "x = 1"
    assert mbpp.prompt.startswith('"""\nWrite a function') and "assert capitals(" in mbpp.prompt


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"text": "x"}, r"line 1 is no problem: HumanEval's have .*\(it has: text\)"),
        ({"entry_point": "f", "test": "x"}, r"line 1: 'prompt' must be text"),
        ({"entry_point": "f()", "test": "x", "prompt": "y"}, r"'f\(\)' is not the name of a func"),
        ({"text": "x", "test_list": []}, r"line 1: test_list must be a list of texts"),
    ],
)
def test_a_bad_problem_is_named(tmp_path: Path, row: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(ProblemError, match=sentence):
        list(read_problems(path))


def test_the_agent_looks_at_the_problems_when_it_starts(tmp_path: Path, code_folder: Path) -> None:
    data = DataSelection((str(code_folder),), problems=Problems(str(tmp_path / "none.jsonl")))
    with pytest.raises(CorpusError, match=r"none\.jsonl"):
        require_usable(data)
    require_usable(DataSelection((str(code_folder),), problems=Problems(str(OURS["mbpp"]))))


def test_pass_at_k_is_the_mean_over_all_choices() -> None:
    for n, c in ((1, 0), (1, 1), (5, 2), (6, 6), (7, 0), (8, 3)):
        for k in range(1, n + 1):
            passed = [True] * c + [False] * (n - c)
            draws = list(itertools.combinations(passed, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)
    assert math.isclose(pass_at_k(10, 3, 1), 0.3)
    with pytest.raises(ValueError, match=r"pass@3 cannot be estimated from 1 of 2"):
        pass_at_k(2, 1, 3)


def test_answers_are_posed_tested_and_counted(
    base: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that knows every second answer."""
    known = list(read_problems(OURS["humaneval"]))
    asked: list[str] = []

    def knows(_: Backbone, __: Any, prompt: str, **options: Any) -> str:
        asked.append(prompt)
        assert options["temperature"] == 0.7 and "\ndef " in options["stops"]
        right = len(asked) % 2 == 1
        return next(p.reference for p in known if p.prompt == prompt) if right else "    return 0\n"

    monkeypatch.setattr(problems, "generate", knows)
    got = measure_problems(
        base, base.model, OURS["humaneval"], 2, LIMITS, 0, max_problems=3, temperature=0.7
    )
    assert got == (3, 2, 0.5, 1.0)
    assert len(asked) == 6


def test_a_real_model_is_measured_and_the_random_generator_left_alone(base: Backbone) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    rows = pack_documents([document("x = 1\n" * 20)], base.encode, base.separator_id, 64)
    asked = Problems(str(OURS["mbpp"]), max_problems=2, max_new_tokens=8)
    got = measure(
        base, base.model, rows, "global", "received",
        micro_batch=1, completions=0, problems=asked, seed=5,
    )  # fmt: skip
    assert (got.problems, got.samples, got.pass_at_1, got.pass_at_k) == (2, 1, 0.0, 0.0)
    assert torch.equal(torch.random.get_rng_state(), before)
    slice_only = measure(
        base, base.model, rows, "slice", "received",
        micro_batch=1, completions=0, problems=asked, seed=5,
    )  # fmt: skip
    assert (slice_only.problems, slice_only.pass_at_1) == (0, None)


def test_where_nothing_keeps_programs_in_no_figure_is_given(
    base: Backbone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise SandboxError("nothing here would protect files")

    monkeypatch.setattr(problems, "run_program", refuse)
    got = measure_problems(base, base.model, OURS["mbpp"], 1, LIMITS, 0, max_new_tokens=2)
    assert got == (0, 1, None, None)
    assert "problems are not posed: nothing here would protect files" in caplog.text


def test_a_file_without_problems_is_named(base: Backbone, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ProblemError, match=r"empty\.jsonl holds no problem"):
        measure_problems(base, base.model, tmp_path / "empty.jsonl", 1, LIMITS, 0)
