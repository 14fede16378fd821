"""Rows keep documents apart, lose no counted token, and say what counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.training.documents import Document, digest_of
from edge_agent.training.fill_in_middle import FillInMiddle, MiddleTokens, middle_tokens
from edge_agent.training.row_packing import best_fit, pack_documents

SEPARATOR = 0
PRE, SUF, MID, EOT = 901, 902, 903, 904


def encode(texts: list[str]) -> list[list[int]]:
    """One token per character; 0 is the separator's."""
    return [[ord(c) for c in text] for text in texts]


def document(*parts: tuple[str, bool], together: bool = False) -> Document:
    digest = digest_of(*(text for text, _ in parts))
    return Document(parts, "", digest, "train", "here", together)


def whole(text: str) -> Document:
    return document((text, True))


def shown(rows, row: int) -> list[tuple[str, str]]:
    """(text, which counts) of each document of a row; the separator is a dot."""
    found = []
    for number in range(rows.document[row].max() + 1):
        inside = rows.document[row] == number
        text = "".join("." if t == 0 else chr(t) for t in rows.tokens[row][inside])
        found.append((text, "".join("x" if c else "-" for c in rows.counted[row][inside])))
    return found


def test_a_document_stands_between_separators_and_its_end_counts() -> None:
    rows = pack_documents([whole("ab")], encode, SEPARATOR, 6)
    assert shown(rows, 0) == [(".ab.", "-xxx"), ("..", "--")]


def test_a_long_document_is_cut_and_its_rest_shares_a_row() -> None:
    rows = pack_documents([whole("abcdefg"), whole("xy")], encode, SEPARATOR, 8)
    assert [shown(rows, i) for i in range(len(rows))] == [
        [(".abcdefg", "-xxxxxxx")],
        [(".xy.", "-xxx"), ("....", "----")],
    ], "the lone separator that is left over predicts nothing"
    rows = pack_documents([whole("abcdefghi"), whole("xy")], encode, SEPARATOR, 8)
    assert shown(rows, 1) == [("hi.", "-xx"), (".xy.", "-xxx"), (".", "-")]


def test_only_completions_count_and_they_stay_with_their_prompt() -> None:
    ask = document(("say ", False), ("hi", True), together=True)
    rows = pack_documents([whole("abc"), ask], encode, SEPARATOR, 12)
    assert shown(rows, 0) == [(".abc.", "-xxxx"), (".......", "-------")]
    assert shown(rows, 1) == [(".say hi.", "-----xxx"), ("....", "----")]


def test_a_long_prompt_loses_its_beginning_and_a_long_completion_its_end() -> None:
    long = document(("0123456789", False), ("ab", True), together=True)
    assert shown(pack_documents([long], encode, SEPARATOR, 8), 0) == [(".6789ab.", "-----xxx")]
    both = document(("0123456789", False), ("abcdefghij", True), together=True)
    assert shown(pack_documents([both], encode, SEPARATOR, 8), 0) == [(".789abc.", "----xxxx")]


def test_pieces_in_which_nothing_counts_are_left_out() -> None:
    late = document(("0123456789", False), ("ab", True))
    rows = pack_documents([late], encode, SEPARATOR, 6)
    assert [shown(rows, i) for i in range(len(rows))] == [
        [("56789a", "-----x")],
        [("b.", "-x"), ("....", "----")],
    ]
    assert len(pack_documents([document(("0123", False))], encode, SEPARATOR, 6)) == 0


@given(
    st.lists(st.text("abcde", max_size=40), max_size=20),
    st.integers(8, 24),
)
def test_every_token_of_every_document_is_in_the_rows_once(texts, length) -> None:
    rows = pack_documents([whole(t) for t in texts], encode, SEPARATOR, length)
    assert rows.tokens.shape == rows.document.shape == rows.counted.shape
    assert (rows.tokens.dtype, rows.document.dtype, rows.counted.dtype) == (
        np.int64, np.int32, np.bool_
    )  # fmt: skip
    pieces = [text for i in range(len(rows)) for text, flags in shown(rows, i) if "x" in flags]
    assert sorted("".join(pieces).replace(".", "")) == sorted("".join(texts))
    steps = np.diff(rows.document, axis=1)
    assert ((steps == 0) | (steps == 1)).all() and (rows.document[:, :1] == 0).all()
    starts = np.concatenate([np.ones((len(rows), 1), bool), steps == 1], axis=1)
    assert not (rows.counted & starts).any(), "nothing before it predicts a document's first token"
    again = pack_documents([whole(t) for t in texts], encode, SEPARATOR, length)
    assert (again.tokens == rows.tokens).all() and (again.counted == rows.counted).all()


@given(st.lists(st.integers(2, 16), min_size=1, max_size=60))
def test_best_fit_wastes_little(sizes) -> None:
    pieces = [(np.full(n, i), np.ones(n, dtype=np.bool_)) for i, n in enumerate(sizes)]
    rows = best_fit(pieces, SEPARATOR, 16)
    least = -(-sum(sizes) // 16)
    assert least <= len(rows) <= 1.5 * least + 1, "best fit decreasing is within 11/9 of the best"
    firsts = [row[0] for row in rows.tokens]
    assert firsts == sorted(firsts), "rows come in the order of what they begin with"


# --- fill in the middle -------------------------------------------------------------------------


def middle(share: float = 1.0, seed: int = 1, end: int | None = None) -> FillInMiddle:
    return FillInMiddle(MiddleTokens(PRE, SUF, MID, end), share, seed)


def undone(tokens: list[int]) -> tuple[str, str]:
    """The text that a rearranged piece was made of, and in which order."""
    assert tokens[:2] == [SEPARATOR, PRE]
    suf, mid = tokens.index(SUF), tokens.index(MID)
    text = lambda ids: "".join(map(chr, ids))  # noqa: E731
    assert tokens[-1] in (SEPARATOR, EOT)
    if suf == 2 and mid > 3 and tokens[1] == PRE and tokens[2] == SUF:
        return text(tokens[mid + 1 : -1]) + text(tokens[3:mid]), "spm"
    return text(tokens[2:suf]) + text(tokens[mid + 1 : -1]) + text(tokens[suf + 1 : mid]), "psm"


def test_rearranged_text_has_all_its_characters_in_both_orders() -> None:
    text = "def f(x):\n    return x + 1\n"
    orders = set()
    for seed in range(40):
        found = middle(seed=seed).pieces(text, "ab" * 32, encode, SEPARATOR, 64)
        assert found is not None and len(found) == 1
        tokens, counted = found[0]
        assert len(tokens) == len(text) + 5
        back, order = undone(tokens.tolist())
        orders.add(order)
        assert back == text
        marks = np.isin(tokens, [PRE, SUF, MID])
        assert not counted[marks].any() and not counted[0]
        assert counted[~marks][1:].all(), "text and its end count"
    assert orders == {"psm", "spm"}


def test_a_share_of_documents_is_rearranged_the_same_each_time() -> None:
    texts = [whole(f"value_{i} = {i}\n" * 3) for i in range(400)]
    half = pack_documents(texts, encode, SEPARATOR, 128, middle(0.5))
    share = (half.tokens == PRE).sum() / len(texts)
    assert 0.4 < share < 0.6
    again = pack_documents(texts, encode, SEPARATOR, 128, middle(0.5))
    assert (half.tokens == again.tokens).all()
    other = pack_documents(texts, encode, SEPARATOR, 128, middle(0.5, seed=2))
    assert half.tokens.shape != other.tokens.shape or (half.tokens != other.tokens).any()
    none = pack_documents(texts, encode, SEPARATOR, 128, middle(0.0))
    assert (none.tokens == pack_documents(texts, encode, SEPARATOR, 128).tokens).all()


def test_a_long_document_is_rearranged_in_pieces_that_fit() -> None:
    text = "".join(f"line_{i} = {i}\n" for i in range(100)) + "x" * 300
    found = middle().pieces(text, "cd" * 32, encode, SEPARATOR, 64)
    assert found is not None
    assert all(len(tokens) <= 64 for tokens, _ in found)
    assert sorted("".join(undone(tokens.tolist())[0] for tokens, _ in found)) == sorted(text)


def test_prompts_and_rows_too_short_are_left_as_they_are() -> None:
    ask = document(("say ", False), ("hi", True), together=True)
    assert PRE not in pack_documents([ask], encode, SEPARATOR, 64, middle()).tokens
    assert PRE not in pack_documents([whole("ab")], encode, SEPARATOR, 16, middle()).tokens


def test_a_space_that_the_tokenizer_sets_before_a_text_is_not_set_inside_one() -> None:
    def spaced(texts: list[str]) -> list[list[int]]:
        return [[32, *map(ord, text)] if text else [] for text in texts]

    found = middle(end=EOT).pieces("def f(): pass\n", "ab" * 32, spaced, SEPARATOR, 64)
    assert found is not None
    tokens = found[0][0].tolist()
    assert tokens[-1] == EOT, "a tokenizer's own end of the middle"
    assert undone(tokens)[0] == "def f(): pass\n"


@pytest.mark.parametrize(
    ("marks", "has"),
    [
        (["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"], True),
        (["<fim_prefix>", "<fim_suffix>", "<fim_middle>"], True),
        (["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"], True),
        (["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"], True),
        (["<fim_prefix>", "<fim_suffix>"], False),
        ([], False),
    ],
)
def test_tokenizers_are_known_by_their_marks(marks: list[str], has: bool) -> None:
    class Tokenizer:
        unk_token_id = 3

        def convert_tokens_to_ids(self, token: str) -> int:
            return 100 + marks.index(token) if token in marks else 3

    found = middle_tokens(Tokenizer())
    assert (found is not None) == has
    if found is not None:
        assert (found.prefix, found.suffix, found.middle) == (100, 101, 102)
        assert found.end == (103 if len(marks) == 4 else None)
