"""Fill in the middle: training text rearranged so that its middle comes last.

"Efficient Training of Language Models to Fill in the Middle", arXiv 2207.14255: a text is cut at
two characters; half of the time it reads prefix, suffix, middle (PSM), else suffix, prefix, middle
(SPM, in the layout that StarCoder and Code Llama share). Each piece that fits a row is rearranged
by itself ("context level" in the paper), so that no row lacks a part. Knows which tokens mark the
parts in which tokenizers. It knows no rows and no models; what is held out is never given to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Encode = Callable[[list[str]], list[list[int]]]
LEAST_ROW_TOKENS = 32
SLACK_TOKENS = 8  # marks, separator, and what cutting inside a token adds
SPM_SHARE = 0.5

# Prefix, suffix, middle, end (None: the separator ends a document here as elsewhere).
MARKS: tuple[tuple[str, str, str, str | None], ...] = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", None),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", None),  # StarCoder, StarCoder2
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>", None),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", None),  # DeepSeek-Coder
    ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"),  # Code Llama
)


@dataclass(frozen=True)
class MiddleTokens:
    """What marks the parts: token ids."""

    prefix: int
    suffix: int
    middle: int
    end: int | None


def middle_tokens(tokenizer: Any) -> MiddleTokens | None:
    """The marks that this tokenizer was made with; None when it has none."""
    unknown = getattr(tokenizer, "unk_token_id", None)

    def of(token: str | None) -> int | None:
        found = None if token is None else tokenizer.convert_tokens_to_ids(token)
        return None if found is None or found == unknown else int(found)

    for *marks, end in MARKS:
        prefix, suffix, middle = (of(mark) for mark in marks)
        if prefix is not None and suffix is not None and middle is not None:
            return MiddleTokens(prefix, suffix, middle, of(end))
    return None


@dataclass(frozen=True)
class FillInMiddle:
    """Rearranges a share of texts; the same text, share and seed give the same tokens."""

    tokens: MiddleTokens
    share: float
    seed: int

    def pieces(
        self, text: str, digest: str, encode: Encode, separator_id: int, row_tokens: int
    ) -> list[tuple[NDArray[np.int64], NDArray[np.bool_]]] | None:
        """Tokens, and which of them count, of each piece of a rearranged text.

        digest: of the text, hex. None when this text is not among the share, or when it cannot be
        rearranged in rows so short. The marks do not count: an editor sets them, not the model.
        """
        draw = np.random.default_rng([self.seed, int(digest[:16], 16)])
        if row_tokens < LEAST_ROW_TOKENS or draw.random() >= self.share:
            return None
        texts = list(_by_lines(text, encode, row_tokens - SLACK_TOKENS))
        thirds: list[str] = []
        for piece in texts:
            one, two = sorted(draw.integers(0, len(piece) + 1, 2).tolist())
            thirds += [piece[:one], piece[one:two], piece[two:]]
        ids = _encoded_bare(thirds, encode)
        found = []
        for prefix, inside, suffix in zip(ids[::3], ids[1::3], ids[2::3], strict=True):
            swapped = draw.random() < SPM_SHARE
            laid = self._laid_out(prefix, inside, suffix, swapped, separator_id, row_tokens)
            if laid is None:
                return None
            found.append(laid)
        return found

    def _laid_out(
        self,
        prefix: list[int],
        middle: list[int],
        suffix: list[int],
        swapped: bool,
        separator_id: int,
        row_tokens: int,
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]] | None:
        marks = self.tokens
        end = separator_id if marks.end is None else marks.end
        if swapped:
            before = [separator_id, marks.prefix, marks.suffix, *suffix, marks.middle, *prefix]
            uncounted = {0, 1, 2, 3 + len(suffix)}
        else:
            before = [separator_id, marks.prefix, *prefix, marks.suffix, *suffix, marks.middle]
            uncounted = {0, 1, 2 + len(prefix), 3 + len(prefix) + len(suffix)}
        if len(before) >= row_tokens:
            return None
        # Cutting inside tokens can make more of them: then the middle loses its end.
        ids = [*before, *middle, end][:row_tokens]
        counted = np.ones(len(ids), dtype=np.bool_)
        counted[sorted(uncounted)] = False
        return np.asarray(ids, dtype=np.int64), counted


def _by_lines(text: str, encode: Encode, most: int) -> Iterator[str]:
    """The text in pieces of whole lines of about `most` tokens; only longer lines are cut."""
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        lines += [line[i : i + most] for i in range(0, len(line), most)]
    piece, used = "", 0
    for line, ids in zip(lines, encode(lines), strict=True):
        if piece and used + len(ids) > most:
            yield piece
            piece, used = "", 0
        piece, used = piece + line, used + len(ids)
    if piece:
        yield piece


def _encoded_bare(texts: list[str], encode: Encode) -> list[list[int]]:
    """Token ids of texts that go on from others: without the space that some tokenizers add.

    SentencePiece (Code Llama) sets a space before every text; one after a line break it does not.
    """
    alone, line_break, after = encode(["x", "\n", "\nx"])
    if after == line_break + alone:
        return encode(texts)
    return [ids[len(line_break) :] for ids in encode(["\n" + text for text in texts])]
