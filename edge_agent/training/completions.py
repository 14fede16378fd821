"""Greedy completions of held-out lines, compared with what stands there.

The line completion task of CodeXGLUE (arXiv 2102.04664) and RepoBench (arXiv 2306.03091): code up
to the start of a line is given, the rest of that line is wanted, both without outer blanks. Knows
rows, tokens and text. It does not know which adapter is on the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edge_agent.training.backbone import Backbone
from edge_agent.training.rows import Rows

MAX_LINE_TOKENS = 64
LEAST_LINE_CHARACTERS = 4
LEAST_CONTEXT_CHARACTERS = 32


@dataclass(frozen=True)
class CompletionResult:
    """How near generated lines come to the held-out ones; None where no line was asked for."""

    count: int
    exact_match: float | None  # share
    edit_similarity: float | None  # mean, in [0, 1]


@dataclass(frozen=True)
class HeldOutLine:
    """A line and what stands before it in its document."""

    context: str
    line: str


def measure_completions(
    base: Backbone, model: Any, held_out: Rows, count: int, seed: int
) -> CompletionResult:
    """Completes at most `count` lines of `held_out`, drawn evenly by `seed`, one at a time.

    Lines that do not count, end beyond their row, or are shorter than four characters are not
    drawn. `model` carries the adapter; it is left in the mode it was in.
    """
    lines = draw_lines(base, held_out, count, seed)
    if not lines:
        return CompletionResult(0, None, None)
    exact, similarity = 0, 0.0
    for wanted in lines:
        got = generate(
            base, model, wanted.context, max_new_tokens=MAX_LINE_TOKENS, stops=("\n",)
        ).strip()
        exact += got == wanted.line
        similarity += edit_similarity(got, wanted.line)
    return CompletionResult(len(lines), exact / len(lines), similarity / len(lines))


def draw_lines(base: Backbone, rows: Rows, count: int, seed: int) -> list[HeldOutLine]:
    """At most `count` lines, the same for the same rows and seed, in the order of the rows."""
    breaks = _tokens_with_line_breaks(base, rows)
    places = list(_line_starts(rows, breaks))
    order = np.random.default_rng(seed).permutation(len(places))
    drawn: list[tuple[int, HeldOutLine]] = []
    for i in order.tolist():
        if len(drawn) == count:
            break
        row, start, at, stop = places[i]
        ids = rows.tokens[row]
        before = base.tokenizer.decode(ids[start : at + 1].tolist(), skip_special_tokens=True)
        until = base.tokenizer.decode(ids[start : stop + 1].tolist(), skip_special_tokens=True)
        context = before[: before.rfind("\n") + 1]
        line = until[len(context) :].split("\n")[0].strip()
        if (
            until.startswith(context)
            and len(line) >= LEAST_LINE_CHARACTERS
            and len(context.strip()) >= LEAST_CONTEXT_CHARACTERS
        ):
            drawn.append((i, HeldOutLine(context, line)))
    return [line for _, line in sorted(drawn, key=lambda pair: pair[0])]


def _tokens_with_line_breaks(base: Backbone, rows: Rows) -> set[int]:
    return {i for i in np.unique(rows.tokens).tolist() if "\n" in base.tokenizer.decode([i])}


def _line_starts(rows: Rows, breaks: set[int]) -> Iterator[tuple[int, int, int, int]]:
    """(row, where its document starts, its line break, the next one) of lines that count."""
    has_break = np.isin(rows.tokens, sorted(breaks))
    for row in range(len(rows)):
        found = np.flatnonzero(has_break[row])
        document = rows.document[row]
        for at, stop in zip(found[:-1].tolist(), found[1:].tolist(), strict=True):
            if document[at] == document[stop] and rows.counted[row, at + 1 : stop + 1].all():
                yield row, int(np.searchsorted(document, document[at])), at, stop


@torch.no_grad()
def generate(
    base: Backbone,
    model: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    stops: tuple[str, ...] = (),
    temperature: float = 0.0,
    top_p: float = 0.95,
) -> str:
    """What `model` writes after `prompt`, up to the first of `stops` or the end of the text.

    Greedy at temperature 0, else drawn from torch's generator. A prompt that leaves no room in the
    model's context loses its beginning. `model` is left in the mode it was in.
    """
    ids = [base.separator_id, *base.encode([prompt])[0]]
    window = int(getattr(model.config, "max_position_embeddings", 2048))
    ids = ids[-max(window - max_new_tokens, 1) :]
    was_training = model.training
    model.eval()
    try:
        return _generated(base, model, ids, max_new_tokens, stops, temperature, top_p)
    finally:
        model.train(was_training)


def _generated(
    base: Backbone,
    model: Any,
    ids: list[int],
    max_new_tokens: int,
    stops: tuple[str, ...],
    temperature: float,
    top_p: float,
) -> str:
    """One token at a time with the model's own cache: what generation_config.json says of
    sampling or repetition, which would make the same weights score differently, is not asked.
    """
    device = next(model.parameters()).device
    given = torch.tensor([ids], device=device)
    written: list[int] = []
    cache: Any = None
    text = ""
    for _ in range(max_new_tokens):
        out = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        token = _next_token(out.logits[0, -1].float(), temperature, top_p)
        if token == base.separator_id:
            break
        written.append(token)
        text = base.tokenizer.decode([*ids[-1:], *written], skip_special_tokens=True)
        text = text.removeprefix(base.tokenizer.decode(ids[-1:], skip_special_tokens=True))
        if any(stop in text for stop in stops):
            break
        given = torch.tensor([[token]], device=device)
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def _next_token(logits: torch.Tensor, temperature: float, top_p: float) -> int:
    """The most likely, or one drawn from the smallest set that has `top_p` of the probability."""
    if temperature <= 0:
        return int(logits.argmax())
    chances, order = torch.softmax(logits / temperature, -1).sort(descending=True)
    outside = chances.cumsum(-1) - chances > top_p
    return int(order[torch.multinomial(chances.masked_fill(outside, 0.0), 1)])


def edit_similarity(one: str, other: str) -> float:
    """2 LCS / (|one| + |other|) over characters, in [0, 1]; 1 for two empty texts.

    That is 1 - d / (|one| + |other|) with d the edit distance in which replacing costs two, and is
    what CodeXGLUE and RepoBench report as "edit similarity" (`Levenshtein.ratio`, `fuzz.ratio`).
    """
    total = len(one) + len(other)
    return 1.0 if total == 0 else 2 * common_subsequence(one, other) / total


def common_subsequence(one: str, other: str) -> int:
    """Length of a longest common subsequence, 64 cells at a time (Hyyro 2004, bit-parallel)."""
    where: dict[str, int] = {}
    for i, character in enumerate(one):
        where[character] = where.get(character, 0) | 1 << i
    every = (1 << len(one)) - 1
    open_cells = every
    for character in other:
        hit = open_cells & where.get(character, 0)
        open_cells = (open_cells + hit | open_cells - hit) & every
    return (every & ~open_cells).bit_count()
