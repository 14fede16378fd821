"""GLUE's files: columns by task, nothing quoted, mistakes told with file and line."""

from __future__ import annotations

import gzip
import json
import lzma
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.config import AgentConfigError, load_agent_config
from edge_agent.training.connectors import DataSelection, collect, first_document
from edge_agent.training.documents import CorpusError
from edge_agent.training.labelled import Columns, Labelled, labelled_documents, tsv_records

TASKS = {
    "RTE": (
        "index\tsentence1\tsentence2\tlabel\n0\tA cat.\tCats.\tentailment\n",
        ("A cat.", "Cats."), "entailment",
    ),
    "MRPC": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
        '1\t7\t8\tHe said " no " .\tNo .\r\n',
        ('He said " no " .', "No ."), "1",
    ),
    "MNLI": (
        "index\tpromptID\tgenre\tsentence1_parse\tsentence1\tsentence2\tlabel1\tlabel\tgold_label\n"
        "0\t31\tfiction\t( x )\tUp.\tDown.\tneutral\tx\tcontradiction\n",
        ("Up.", "Down."), "contradiction",
    ),
    "SST-2": ("sentence\tlabel\nfine , funny \t1\n", ("fine , funny ",), "1"),
    "QNLI": ("index\tquestion\tsentence\tlabel\n3\tWho?\tShe.\tentailment\n",
             ("Who?", "She."), "entailment"),
    "QQP": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tA?\tB?\t0\n",
            ("A?", "B?"), "0"),
}  # fmt: skip


def only(path, columns=None, skipped=None, **how):
    documents = labelled_documents(path, columns, skipped or Counter(), **how)
    return [(tuple(text for text, _ in d.parts), d.label) for d in documents]


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_known_by_its_columns(tmp_path, task):
    text, texts, label = TASKS[task]
    path = tmp_path / "train.tsv"
    path.write_bytes(text.encode())
    assert only(path) == [(texts, label)]


@pytest.mark.parametrize(("suffix", "pack"), [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_compressed_files_are_read_too(tmp_path, suffix, pack):
    path = tmp_path / f"dev.tsv{suffix}"
    path.write_bytes(pack(TASKS["RTE"][0].encode()))
    assert only(path) == [(("A cat.", "Cats."), "entailment")]


def test_json_lines_with_numbered_labels_and_own_keys(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"a": "one", "b": "two", "y": 2}) + "\n")
    assert only(path, Columns("a", "b", "y")) == [(("one", "two"), "2")]
    path.write_text(json.dumps({"premise": "one", "hypothesis": "two", "label": "no"}) + "\n")
    assert only(path) == [(("one", "two"), "no")]


BETWEEN_TABS = st.characters(exclude_characters="\t\n\r\0", exclude_categories=["Cs"])
PRINTED = st.text(BETWEEN_TABS, min_size=1)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(PRINTED, PRINTED), min_size=1, max_size=5))
def test_whatever_stands_between_tabs_is_the_text(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("any") / "train.tsv"
    lines = ["sentence1\tsentence2\tlabel", *(f"{a}\t{b}\tyes" for a, b in rows)]
    path.write_bytes(("\n".join(lines) + "\n").encode())
    found = [values for _, values in tsv_records(path, Counter())]
    assert [(v["sentence1"], v["sentence2"]) for v in found] == rows


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sentence\tlabel\ngood\t1\nbad\n", r"train.tsv line 3 has 1 columns where .* 2"),
        ("sentence\tlabel\ngood\tfine\t1\n", r"line 2 has 3 columns .* no tabs"),
        ("sentence\tlabel\ngood\t\n", r"line 2 has no label under 'label'"),
        ("just a line\n", r"line 1 is no header"),
        ("sentence\tsentence\ngood\t1\n", r"line 1 is no header"),
        ("text\tstars\ngood\t1\n", r"columns text, stars, .* first_key, second_key and label_key"),
        ("index\tsentence1\tsentence2\n0\ta\tb\n", r"none of MNLI, RTE"),
    ],
)
def test_a_bad_file_is_told_with_its_line(tmp_path, text, said):
    path = tmp_path / "train.tsv"
    path.write_text(text)
    with pytest.raises(CorpusError, match=said):
        only(path)


def test_bytes_that_are_not_utf8_are_told_with_their_line(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_bytes(b"sentence\tlabel\ngood\t1\ncaf\xe9\t1\n")
    with pytest.raises(CorpusError, match=r"train.tsv line 3 is not UTF-8"):
        only(path)


def test_pairs_without_agreement_empty_texts_and_copies_are_left_out_and_counted(tmp_path):
    path = tmp_path / "train.tsv"
    rows = ["a\tb\tyes", "a\tb\tyes", "c\td\t-", " \tb\tno", "e\tf\tno"]
    path.write_text("\n".join(["sentence1\tsentence2\tgold_label", *rows]) + "\n")
    corpus = collect(DataSelection(labelled=Labelled((str(path),))), 0.5)
    assert {d.label for d in corpus.files} == {"yes", "no"} and len(corpus.files) == 2
    assert corpus.skipped == {"no label agreed on": 1, "empty": 1, "copy": 1}


def test_the_same_texts_are_never_in_both_splits_whatever_their_labels(tmp_path):
    path = tmp_path / "train.tsv"
    rows = [f"word {i}\tother\t{label}" for i in range(60) for label in ("yes", "no")]
    path.write_text("\n".join(["sentence1\tsentence2\tlabel", *rows]) + "\n")
    corpus = collect(DataSelection(labelled=Labelled((str(path),))), 0.4)
    splits: dict[str, set[str]] = {}
    for document in corpus.files:
        splits.setdefault(document.text, set()).add(document.split)
    assert {len(found) for found in splits.values()} == {1}
    assert {s for found in splits.values() for s in found} == {"train", "held_out"}


def test_a_file_of_its_own_is_held_out_and_nothing_else(tmp_path):
    for name, word in (("train", "a"), ("dev", "b")):
        (tmp_path / f"{name}.tsv").write_text(f"sentence\tlabel\n{word}\t1\n{word}{word}\t0\n")
    chosen = Labelled((str(tmp_path / "train.tsv"),), (str(tmp_path / "dev.tsv"),))
    corpus = collect(DataSelection(labelled=chosen), 0.1)
    assert {d.text for d in corpus.of("train")} == {"a", "aa"}
    assert {d.text for d in corpus.of("held_out")} == {"b", "bb"}


AGENT = '[data]\nlabelled = ["RTE/train.tsv"]\n'


def test_agent_toml_names_labelled_files_relative_to_itself(tmp_path):
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "train.tsv").write_text(TASKS["RTE"][0])
    (tmp_path / "agent.toml").write_text(AGENT)
    selection = load_agent_config(tmp_path / "agent.toml").selection
    assert selection.labelled == Labelled((str(tmp_path / "RTE" / "train.tsv"),))
    assert first_document(selection).label == "entailment"
    assert "RTE" in selection.named


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('include = ["src"]', "labelled stands alone"),
        ('first_key = "a"', "go together"),
        ('second_key = "b"', "go together"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, more, said):
    (tmp_path / "agent.toml").write_text(AGENT + more + "\n")
    with pytest.raises(AgentConfigError, match=said):
        load_agent_config(tmp_path / "agent.toml")


def test_held_out_files_alone_are_refused(tmp_path):
    (tmp_path / "agent.toml").write_text('[data]\ninclude=["a"]\nlabelled_held_out = ["x.tsv"]\n')
    with pytest.raises(AgentConfigError, match="labelled_held_out needs labelled"):
        load_agent_config(tmp_path / "agent.toml")


GLUE = next(
    (p for p in Path(__file__).resolve().parents if (p / "shared" / "data" / "glue").is_dir()), None
)


@pytest.mark.skipif(GLUE is None, reason="GLUE's files are not here: shared/data/glue")
@pytest.mark.parametrize(
    ("task", "train", "held_out"), [("RTE", 2490, 277), ("MRPC", 3667, 408), ("SST-2", 67349, 872)]
)
def test_glue_as_published_is_read_to_the_last_row(task, train, held_out):
    assert GLUE is not None
    folder = GLUE / "shared" / "data" / "glue" / task
    for name, count in (("train", train), ("dev", held_out)):
        skipped: Counter[str] = Counter()
        found = sum(1 for _ in labelled_documents(folder / f"{name}.tsv.xz", None, skipped))
        assert (found, dict(skipped)) == (count, {})
