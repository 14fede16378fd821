"""JSONL, Parquet and datasets become documents; what is wrong with a file is said in a sentence."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_agent.training import records
from edge_agent.training.connectors import DataSelection, collect, first_document, require_usable
from edge_agent.training.documents import CorpusError, digest_of
from edge_agent.training.records import Keys
from profiles.errors import MissingExtraError

PAIRS = Keys(prompt="q", completion="a")


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows), path, **options)
    return path


def texts(data: DataSelection, share: float = 0.0) -> list[str]:
    return sorted(f.text for f in collect(data, share).files)


@pytest.mark.parametrize("opener", [open, gzip.open, bz2.open, lzma.open])
def test_texts_of_plain_and_compressed_lines(tmp_path: Path, opener: Any) -> None:
    suffix = {open: "", gzip.open: ".gz", bz2.open: ".bz2", lzma.open: ".xz"}[opener]
    path = tmp_path / f"a.jsonl{suffix}"
    with opener(path, "wt") as file:
        file.write('{"text": "x = 1"}\n\n{"text": "y = 2", "more": 3}')
    data = DataSelection(jsonl=(str(path),))
    assert texts(data) == ["x = 1", "y = 2"]
    assert first_document(data).origin == f"{path} line 1"


def test_secrets_binaries_copies_and_empties_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = ["x = 1", "x = 1", "a\0b", " ", "k = 'ghp_" + "a" * 36 + "'", "z" * (2 << 20), None]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in rows])
    with path.open("a") as file:
        file.write('{"text": "\\ud800 half"}\n')
    corpus = collect(DataSelection(jsonl=(str(path),)), 0.0)
    assert [f.text for f in corpus.files] == ["x = 1"]
    assert corpus.skipped == {
        "copy": 1, "binary": 1, "empty": 2, "secret": 1, "too large": 1, "not UTF-8": 1
    }  # fmt: skip


def test_a_secret_in_a_prompt_or_a_completion_is_found(tmp_path: Path) -> None:
    secret = "ghp_" + "a" * 36
    rows = [{"q": secret, "a": "b"}, {"q": "b", "a": secret}, {"q": "", "a": "kept"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    corpus = collect(DataSelection(jsonl=(str(path),), keys=PAIRS), 0.0)
    assert [f.parts for f in corpus.files] == [(("", False), ("kept", True))]
    assert corpus.skipped == {"secret": 2}


def test_records_with_one_prompt_are_in_one_split(tmp_path: Path) -> None:
    rows = [{"q": f"prompt {i // 5}", "a": f"answer {i}"} for i in range(200)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    corpus = collect(DataSelection(jsonl=(str(path),), keys=PAIRS), 0.4)
    splits: dict[str, set[str]] = {}
    for f in corpus.files:
        splits.setdefault(f.parts[0][0], set()).add(f.split)
    assert all(len(found) == 1 for found in splits.values())
    assert {"train", "held_out"} == set().union(*splits.values())


def test_a_text_is_in_the_split_of_a_file_with_the_same_content(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    rows = []
    for i in range(30):
        (tmp_path / "code" / f"{i}.py").write_text(f"x = {i}\n")
        rows.append({"text": f"x = {i}\n"})
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    files = collect(DataSelection((str(tmp_path / "code"),)), 0.3).files
    lines = collect(DataSelection(jsonl=(str(path),)), 0.3).files
    assert [(f.digest, f.split) for f in files] == [(f.digest, f.split) for f in lines]


def test_languages_are_those_of_their_key(tmp_path: Path) -> None:
    rows = [{"text": "x", "lang": "Python"}, {"text": "y", "lang": "Go"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    data = DataSelection(jsonl=(str(path),), keys=Keys(language="lang"), languages=("python",))
    corpus = collect(data, 0.0)
    assert [f.text for f in corpus.files] == ["x"]
    assert corpus.summary.main_language == "python"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"txt": "x", "id": 1}', r"line 2 has no key 'text' \(it has: id, txt\); .*text_key"),
        ('{"text": ["x"]}', r"line 2 holds a list under 'text', which must be text"),
        ("[1]", r"line 2 holds a list, not an object; .*one JSON object per line"),
        ("{", r"line 2 is not JSON: "),
        ("[" * 100_000, r"line 2 is not JSON: "),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' + line + "\n")
    with pytest.raises(CorpusError, match=sentence) as told:
        collect(DataSelection(jsonl=(str(path),)), 0.0)
    assert str(path) in str(told.value)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"nothing packed")
    with pytest.raises(CorpusError, match=rf"a\.jsonl\{suffix} cannot be read after line 0"):
        collect(DataSelection(jsonl=(str(path),)), 0.0)
    whole = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix].compress(b'{"text": "x"}\n' * 999)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match="cannot be read after line"):
        collect(DataSelection(jsonl=(str(path),)), 0.0)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"none\.jsonl does not exist; check \[data\] jsonl"):
        collect(DataSelection(jsonl=(str(tmp_path / "none.jsonl"),)), 0.0)
    with pytest.raises(CorpusError, match=r"matches no file; check \[data\] parquet"):
        collect(DataSelection(parquet=(str(tmp_path / "*.parquet"),)), 0.0)
    with pytest.raises(CorpusError, match="is not a file"):
        collect(DataSelection(jsonl=(str(tmp_path),)), 0.0)
    path = write_jsonl(tmp_path / "a.jsonl", [])
    with pytest.raises(CorpusError, match=r"no usable code under .*a\.jsonl \(no files\)"):
        collect(DataSelection(jsonl=(str(path),)), 0.0)


def test_a_line_without_end_is_passed_over_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 64)
    path = tmp_path / "a.jsonl"
    long = json.dumps({"text": "z" * 1000})
    path.write_text(f'{{"text": "x"}}\n{long}\n{{"text": "y"}}\n{long}')
    skipped: Counter[str] = Counter()
    found = list(records.jsonl_records(path, skipped))
    assert [(where.split()[-1], row["text"]) for where, row in found] == [("1", "x"), ("3", "y")]
    assert skipped == {"too large": 2}


def test_parquet_is_read_by_its_columns(tmp_path: Path) -> None:
    rows = [{"q": f"say {i}", "a": f"print({i})", "rest": "z" * 99} for i in range(300)]
    path = write_parquet(tmp_path / "a.parquet", rows, row_group_size=50)
    data = DataSelection(parquet=(str(tmp_path / "*.parquet"),), keys=PAIRS)
    corpus = collect(data, 0.1)
    assert len(corpus.files) == 300
    assert {f.digest for f in corpus.files} == {digest_of(r["q"], r["a"]) for r in rows}
    assert all(f.together for f in corpus.files)
    with pytest.raises(CorpusError, match=r"a\.parquet has no column 'text' \(it has: a, q, rest"):
        collect(replace(data, keys=Keys()), 0.1)
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(CorpusError, match=r"a\.parquet is not a readable Parquet file"):
        collect(data, 0.1)


def test_a_large_parquet_file_does_not_fill_memory(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    rows = [{"text": f"{i} " + "xyz " * 25_000} for i in range(500)]
    path = write_parquet(
        tmp_path / "a.parquet", rows, compression="none", use_dictionary=False, write_batch_size=8
    )
    del rows
    assert path.stat().st_size > 48e6
    pool = arrow.default_memory_pool()
    arrow.default_memory_pool().release_unused()
    before, most = pool.bytes_allocated(), 0
    for _ in records.parquet_records(path, ["text"]):
        most = max(most, pool.bytes_allocated() - before)
    assert most < 16e6, "a few pages, not the one row group that the file is"


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pyarrow .*sketchfleet\[data\]"):
        first_document(DataSelection(parquet=(str(tmp_path / "a.parquet"),)))


# --- datasets -----------------------------------------------------------------------------------


def make_dataset(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    (folder / "python").mkdir()
    (folder / "dataset_infos.json").write_text("{}")
    write_jsonl(folder / "data" / "train-00000-of-00002.jsonl", [{"text": "train 0"}])
    write_jsonl(folder / "data" / "train-00001-of-00002.jsonl", [{"text": "train 1"}])
    write_jsonl(folder / "data" / "test.json", [{"text": "test 0"}, {"text": "train 1"}])
    write_jsonl(folder / "python" / "constrained.jsonl", [{"text": "no split"}])
    return folder


def test_a_dataset_folder_is_read_by_split(tmp_path: Path) -> None:
    data = DataSelection(dataset=str(make_dataset(tmp_path / "set")), dataset_folder="data")
    assert texts(data) == ["train 0", "train 1"]
    corpus = collect(replace(data, dataset_held_out="test"), 0.5)
    assert {f.text: f.split for f in corpus.files} == {
        "train 0": "train", "test 0": "held_out", "train 1": "held_out"
    }, "what is in both splits is held out only"  # fmt: skip
    with pytest.raises(CorpusError, match=r"of split 'dev' below 'data' \(its data files: data/te"):
        texts(replace(data, dataset_split="dev"))


def test_parquet_shards_of_a_dataset(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set" / "train" / "0000.parquet", [{"text": "x = 1"}])
    write_parquet(tmp_path / "set" / "train_extra.parquet", [{"text": "y = 2"}])
    assert texts(DataSelection(dataset=str(tmp_path / "set"))) == ["x = 1", "y = 2"]


def test_a_dataset_of_the_hub_is_fetched_by_its_files_and_found_again_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    folder, asked = make_dataset(tmp_path / "set"), []
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    online = True

    class Api:
        def list_repo_files(self, name: str, **options: Any) -> list[str]:
            if not online:
                raise ConnectionError("away")
            assert (name, options["repo_type"]) == ("org/set", "dataset")
            return names

    def download(name: str, **options: Any) -> str:
        asked.append((options["revision"], options.get("allow_patterns")))
        if options.get("local_files_only") and not folder.exists():
            raise FileNotFoundError("not in the cache")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    data = DataSelection(dataset="org/set", dataset_revision="v1", dataset_held_out="test")
    require_usable(data)
    shards = [f"data/train-0000{i}-of-00002.jsonl" for i in range(2)]
    assert asked == [("v1", shards), ("v1", ["data/test.json"])]
    online = False
    assert len(collect(data, 0.1).files) == 3
    assert asked[-1] == ("v1", None)
    online = True
    with pytest.raises(CorpusError, match=r"of split 'dev'.*its data files: data/test\.json"):
        require_usable(replace(data, dataset_split="dev"))
    online, folder = False, tmp_path / "gone"
    with pytest.raises(CorpusError, match=r"'org/set' is neither a folder here nor .*HF_TOKEN"):
        require_usable(data)
    with pytest.raises(CorpusError, match="neither a folder here nor a name like owner/name"):
        require_usable(DataSelection(dataset=str(tmp_path / "none")))
