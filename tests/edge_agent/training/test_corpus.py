import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.training import corpus as corpus_module
from edge_agent.training.connectors import DataSelection, collect, first_document
from edge_agent.training.corpus import NEVER_ENTERED, detect_language, scan
from edge_agent.training.documents import CorpusError, split_of


def test_copies_secrets_and_binaries_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "copy.py").write_text("x = 1\n")
    (tmp_path / "secrets.py").write_text("y = 2\n")
    (tmp_path / "key.py").write_text("token = 'ghp_" + "a" * 36 + "'\n")
    (tmp_path / "blob.py").write_bytes(b"\0\1\2")
    (tmp_path / "data.csv").write_text("1,2\n")
    corpus = scan([str(tmp_path)])
    assert [f.text for f in corpus.files] == ["x = 1\n"]
    assert corpus.skipped == {"copy": 1, "secret": 2, "binary": 1, "not source code": 1}


@pytest.mark.timeout(20)
def test_what_is_no_file_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "zero.py").symlink_to("/dev/zero")
    (tmp_path / "dangling.py").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)  # a socket's path may have no more than 107 bytes
    with socket.socket(socket.AF_UNIX) as end:
        end.bind("socket.py")
        corpus = scan([str(tmp_path)])
    assert [Path(f.origin).name for f in corpus.files] == ["a.py"]
    assert corpus.skipped == {"not a file": 4}


def test_folders_of_tools_and_packages_are_not_entered(tmp_path: Path) -> None:
    for name in (*NEVER_ENTERED, ".mine", "vendor"):
        (tmp_path / "code" / name).mkdir(parents=True)
        (tmp_path / "code" / name / "a.py").write_text(f"where = {name!r}\n")
    inside = {Path(f.origin).parent.name for f in scan([str(tmp_path)]).files}
    assert inside == {".mine", "vendor"}
    named = scan([str(tmp_path / "code" / "venv")])
    assert len(named.files) == 1, "what the owner names is what the owner means"


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_subfolder_that_cannot_be_read_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "closed").mkdir(mode=0)
    try:
        assert scan([str(tmp_path)]).skipped == {"unreadable folder": 1}
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_a_subfolder_that_the_system_refuses_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "closed").mkdir()
    listing = os.scandir

    def refuse(path: str) -> object:
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return listing(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert scan([str(tmp_path)]).skipped == {"unreadable folder": 1}


def test_the_first_document_is_found_without_reading_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.py").write_bytes(b"\0")
    for name in "bcd":
        (tmp_path / f"{name}.py").write_text(f"{name} = 1\n")
    read: list[str] = []
    reader = corpus_module._read
    monkeypatch.setattr(
        corpus_module, "_read", lambda path, most: read.append(path.name) or reader(path, most)
    )
    data = DataSelection((str(tmp_path),))
    assert first_document(data).text == "b = 1\n"
    assert read == ["a.py", "b.py"]
    assert first_document(replace(data, exclude=("*/b.py",))).text == "c = 1\n"


def test_the_first_document_and_all_say_the_same_when_there_is_none(
    tmp_path: Path, code_folder: Path
) -> None:
    for folder, languages in ((tmp_path, ()), (tmp_path / "none", ()), (code_folder, ("rust",))):
        data = DataSelection((str(folder),), languages=languages)
        with pytest.raises(CorpusError, match=str(folder)) as by_all:
            collect(data, 0.1)
        with pytest.raises(CorpusError) as by_first:
            first_document(data)
        assert str(by_first.value) == str(by_all.value)


def test_a_file_keeps_its_split_wherever_it_lies(tmp_path: Path, code_folder: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in code_folder.glob("*.py"):
        (moved / f"renamed_{path.name}").write_text(path.read_text())
    here, there = scan([str(code_folder)]), scan([str(moved)])
    assert [(f.digest, f.split) for f in here.files] == [(f.digest, f.split) for f in there.files]


def test_the_splits_share_no_file_and_follow_the_share(code_folder: Path) -> None:
    corpus = scan([str(code_folder)], held_out_share=0.3)
    train, held_out = corpus.of("train"), corpus.of("held_out")
    assert len(train) + len(held_out) == 40
    assert not {f.digest for f in train} & {f.digest for f in held_out}
    assert 4 <= len(held_out) <= 20
    assert split_of("0" * 64, 0.1) == "held_out"
    assert split_of("f" * 64, 0.1) == "train"


def test_the_summary_names_no_file(code_folder: Path) -> None:
    summary = scan([str(code_folder)]).summary
    assert summary.main_language == "python"
    assert str(code_folder) not in repr(summary)
    assert "weigh" not in repr(summary)


def test_a_missing_folder_and_an_empty_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="does not exist"):
        scan([str(tmp_path / "none")])
    with pytest.raises(CorpusError, match="no source files"):
        scan([str(tmp_path)])


def test_selection_by_pattern_language_and_number(tmp_path: Path, code_folder: Path) -> None:
    folder = str(code_folder)
    assert len(scan([folder], max_files=5).files) == 5
    assert len(scan([folder], exclude=["*_1?.py"]).files) == 30
    with pytest.raises(CorpusError, match="40 other language"):
        scan([folder], languages=["rust"])


def test_scripts_are_known_by_their_first_line() -> None:
    assert detect_language(Path("tool"), "#!/usr/bin/env python3.11\n") == "python"
    assert detect_language(Path("tool"), "#!/bin/sh -e\n") == "shell"
    assert detect_language(Path("tool"), "hello") is None
