"""Lines are drawn from what counts, completed greedily, and compared as CodeXGLUE does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.training import completions
from edge_agent.training.backbone import Backbone
from edge_agent.training.completions import (
    CompletionResult,
    common_subsequence,
    draw_lines,
    edit_similarity,
    generate,
    measure_completions,
)
from edge_agent.training.documents import Document, digest_of
from edge_agent.training.evaluation import measure
from edge_agent.training.row_packing import pack_documents
from edge_agent.training.rows import Rows
from edge_agent.training.slice import attached
from edge_agent.training.workbench import Workbench
from protos.contract import AdapterSpec

CODE = "".join(f"def name_{i}(value):\n    return value * {i}\n\n" for i in range(6))


@pytest.fixture
def base(bench: Workbench, base_folder: Path, spec: AdapterSpec) -> Backbone:
    return bench.base(base_folder, "fp32", spec)


def rows_of(base: Backbone, *parts: tuple[str, bool], length: int = 256) -> Rows:
    document = Document(parts, "", digest_of(*(t for t, _ in parts)), "held_out", "here")
    return pack_documents([document], base.encode, base.separator_id, length)


def slow_common_subsequence(one: str, other: str) -> int:
    row = [0] * (len(other) + 1)
    for a in one:
        new = [0]
        for j, b in enumerate(other):
            new.append(row[j] + 1 if a == b else max(row[j + 1], new[j]))
        row = new
    return row[-1]


@given(st.text("abc ", max_size=90), st.text("abc ", max_size=90))
def test_the_similarity_is_that_of_its_definition(one: str, other: str) -> None:
    assert common_subsequence(one, other) == slow_common_subsequence(one, other)
    assert 0 <= edit_similarity(one, other) <= 1
    assert edit_similarity(one, other) == edit_similarity(other, one)
    assert edit_similarity(one, one) == 1


def test_the_similarity_of_known_pairs() -> None:
    """As `Levenshtein.ratio` has them."""
    assert edit_similarity("lewenstein", "levenshtein") == pytest.approx(18 / 21)
    assert edit_similarity("abc", "") == 0
    assert edit_similarity("abcd", "wxyz") == 0


def test_lines_are_whole_and_follow_their_context(base: Backbone) -> None:
    lines = draw_lines(base, rows_of(base, (CODE, True)), 99, 0)
    assert 5 <= len(lines) <= 12
    for drawn in lines:
        assert CODE.startswith(drawn.context) and drawn.context.endswith("\n")
        assert CODE[len(drawn.context) :].lstrip(" ").startswith(drawn.line + "\n")
    assert draw_lines(base, rows_of(base, (CODE, True)), 4, 0) == draw_lines(
        base, rows_of(base, (CODE, True)), 4, 0
    )
    assert len(draw_lines(base, rows_of(base, (CODE, True)), 4, 0)) == 4


def test_lines_that_do_not_count_are_not_drawn(base: Backbone) -> None:
    rows = rows_of(base, (CODE, False), ("fresh = 1\nlater = 2\n", True), length=512)
    drawn = {line.line for line in draw_lines(base, rows, 99, 0)}
    assert drawn == {"fresh = 1", "later = 2"}
    assert draw_lines(base, rows_of(base, ("x = 1\n", True)), 9, 0) == [], "no context"


def test_generation_is_what_stock_greedy_decoding_writes(base: Backbone) -> None:
    prompt = CODE[:60]
    ids = torch.tensor([[base.separator_id, *base.encode([prompt])[0]]])
    stock: Any = base.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
        pad_token_id=base.separator_id,
    )  # fmt: skip
    wanted = base.tokenizer.decode(stock[0, ids.shape[1] :], skip_special_tokens=True)
    got = generate(base, base.model, prompt, max_new_tokens=20)
    assert got == wanted
    cut = wanted[3:5]
    assert (
        generate(base, base.model, prompt, max_new_tokens=20, stops=(cut,))
        == wanted[: wanted.find(cut)]
    )


def test_a_prompt_beyond_the_context_loses_its_beginning(base: Backbone) -> None:
    """The tiny base has 256 positions."""
    assert isinstance(generate(base, base.model, CODE * 9, max_new_tokens=8), str)


def test_sampling_follows_the_seed(base: Backbone) -> None:
    def written(seed: int) -> str:
        torch.manual_seed(seed)
        return generate(base, base.model, CODE[:40], max_new_tokens=12, temperature=1.0)

    assert written(1) == written(1)
    assert len({written(seed) for seed in range(5)}) > 1


def test_a_model_that_writes_the_held_out_lines_matches_them_all(
    base: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(base, (CODE, True))

    def knows(_: Backbone, __: Any, prompt: str, **options: Any) -> str:
        assert options["stops"] == ("\n",)
        return CODE[len(prompt) :].split("\n")[0]

    monkeypatch.setattr(completions, "generate", knows)
    result = measure_completions(base, base.model, rows, 4, 0)
    assert result == CompletionResult(4, 1.0, 1.0)
    monkeypatch.setattr(completions, "generate", lambda *_, **__: "")
    none = measure_completions(base, base.model, rows, 4, 0)
    assert none == CompletionResult(4, 0.0, 0.0)


def test_an_evaluation_carries_the_completions_and_leaves_the_mode(
    base: Backbone, spec: AdapterSpec
) -> None:
    rows = rows_of(base, (CODE, True))
    with attached(base.model, spec, 2, alpha=spec.alpha) as model:
        model.train()
        got = measure(
            base, model, rows, "slice", "received",
            micro_batch=2, completions=3, problems=None, seed=4,
        )  # fmt: skip
        assert model.training
        none = measure(
            base, model, rows, "slice", "received",
            micro_batch=2, completions=0, problems=None, seed=4,
        )  # fmt: skip
    assert got.completions == 3
    assert got.exact_match is not None and got.edit_similarity is not None
    assert 0 <= got.exact_match <= got.edit_similarity + 1e-9 <= 1 + 1e-9
    assert (none.completions, none.exact_match) == (0, None)
    assert got.loss == none.loss
