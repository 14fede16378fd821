"""What is kept of a stream of documents is bounded, and the same in whatever order it comes."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.training.documents import Document, digest_of, gather, split_of, unusable


def document(text: str, split: str | None = None, language: str = "") -> Document:
    digest = digest_of(text)
    return Document(((text, True),), language, digest, split or split_of(digest, 0.2), "here")


@given(
    st.lists(st.text("ab\n", max_size=9), max_size=30),
    st.one_of(st.none(), st.integers(0, 12)),
    st.one_of(st.none(), st.integers(0, 60)),
    st.randoms(use_true_random=False),
)
def test_a_sample_does_not_depend_on_the_order_and_keeps_its_limits(
    texts, max_files, max_bytes, random
):
    found = [document(text) for text in texts]
    kept = gather(found, Counter(), max_files, max_bytes).files
    again = list(found)
    random.shuffle(again)
    assert gather(again, Counter(), max_files, max_bytes).files == kept
    assert max_files is None or len(kept) <= max_files
    assert max_bytes is None or sum(len(f.text) for f in kept) <= max_bytes
    digests = [f.digest for f in kept]
    assert digests == sorted(set(digests))
    by_key = sorted({f.digest: f for f in found}.values(), key=lambda f: f.digest[::-1])
    assert set(kept) == set(by_key[: len(kept)]), "those with the smallest keys"


def test_memory_is_bounded_by_the_limit_not_by_the_source():
    alive, most = [0], [0]

    class Counted(str):
        def __init__(self, _: str) -> None:
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self) -> None:
            alive[0] -= 1

    def stream():
        for i in range(2000):
            yield document(Counted(f"{i:06}" * 10))

    corpus = gather(stream(), Counter(), max_bytes=600)
    assert len(corpus.files) == 10
    assert most[0] < 20, f"{most[0]} documents were held at once"


def test_a_text_of_both_splits_is_held_out():
    for order in (("train", "held_out"), ("held_out", "train")):
        skipped: Counter[str] = Counter()
        corpus = gather([document("x", split) for split in order], skipped)
        assert [f.split for f in corpus.files] == ["held_out"]
        assert skipped == {"copy": 1}


def test_a_corpus_without_languages_has_no_main_one():
    assert gather([document("x")], Counter()).summary.main_language == ""
    both = [document("long" * 9), document("y", language="go")]
    assert gather(both, Counter()).summary.main_language == "go"


def test_what_is_not_taken_is_named():
    assert unusable(" \n") == "empty"
    assert unusable("a\0b") == "binary"
    assert unusable("token = 'ghp_" + "a" * 36) == "secret"
    assert unusable("abc", 2) == "too large"
    assert unusable("abc") is None
