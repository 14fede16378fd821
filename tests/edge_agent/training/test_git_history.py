"""A repository with a cut-off: nothing of the future is trained on, only the new is measured."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from edge_agent.training.connectors import DataSelection, collect
from edge_agent.training.documents import CorpusError
from edge_agent.training.git_history import GitRange, changed_parts, git_documents

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
OLD = "def old():\n    return 1\n"


class Repository:
    """Commits with given dates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.git("init", "-q", "-b", "main")

    def git(self, *words: str, **variables: str) -> str:
        plain = {"GIT_CONFIG_GLOBAL": "/dev/null"}
        for role in ("AUTHOR", "COMMITTER"):
            plain |= {f"GIT_{role}_NAME": "a", f"GIT_{role}_EMAIL": "a@b"}
        environment = {**os.environ, **plain, **variables}
        done = subprocess.run(
            ["git", "-C", str(self.folder), *words],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    def commit(self, day: str, **files: str | None) -> str:
        for name, text in files.items():
            path = self.folder / name.replace("__", "/").replace("_py", ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            if text is None:
                path.unlink()
            else:
                path.write_text(text)
        self.git("add", "-A")
        date = f"2026-{day}T12:00:00+00:00"
        self.git("commit", "-q", "-m", day, GIT_AUTHOR_DATE=date, GIT_COMMITTER_DATE=date)
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    made = Repository(tmp_path / "repository")
    made.commit("01-10", a_py=OLD, b_py="b = 1\n", gone_py="gone = 1\n")
    made.commit("02-10", b_py="b = 1\nc = 2\n")
    made.git("tag", "cut")
    made.commit("03-10", a_py=OLD + "def new():\n    return 2\n", d_py="d = 4\n", gone_py=None)
    return made


def read(repository: Path, cutoff: str, **more: str) -> dict[str, dict[str, tuple]]:
    found: dict[str, dict[str, tuple]] = {"train": {}, "held_out": {}}
    for f in git_documents(GitRange(str(repository), cutoff, **more), Counter()):
        found[f.split][f.origin.split(":")[1]] = f.parts
    return found


@pytest.mark.parametrize("cutoff", ["cut", "2026-03-01", "2026-03-10T12:00+00:00", "HEAD~1"])
def test_the_tree_before_is_trained_on_and_what_is_new_is_held_out(
    repository: Repository, cutoff: str
) -> None:
    found = read(repository.folder, cutoff)
    assert found["train"] == {
        "a.py": ((OLD, True),), "b.py": (("b = 1\nc = 2\n", True),),
        "gone.py": (("gone = 1\n", True),),
    }  # fmt: skip
    assert found["held_out"] == {
        "a.py": ((OLD, False), ("def new():\n    return 2\n", True)),
        "d.py": (("d = 4\n", True),),
    }


def test_only_files_that_changed_since_a_point_are_trained_on(repository: Repository) -> None:
    found = read(repository.folder, "cut", since="2026-02-01")
    assert list(found["train"]) == ["b.py"]
    assert list(found["held_out"]) == ["a.py", "d.py"]


def test_no_line_of_the_future_is_trained_on_and_no_counted_line_was(
    repository: Repository,
) -> None:
    repository.commit(
        "04-10", a_py="def new():\n    return 3\n" + OLD, moved__b_py="b = 1\nc = 2\n"
    )
    found = read(repository.folder, "cut")
    trained = "".join(text for parts in found["train"].values() for text, _ in parts)
    assert "new" not in trained
    for name, parts in found["held_out"].items():
        for text, counts in parts:
            assert counts != (text in trained), f"{name}: {text!r}"
    assert "moved/b.py" not in found["held_out"], "the same content under another name"


def test_a_renamed_file_is_compared_with_what_it_was(repository: Repository) -> None:
    text = "".join(f"line_{i} = {i}\n" for i in range(30))
    repository.commit("04-01", long_py=text)
    repository.git("tag", "later")
    repository.git("mv", "long.py", "longer.py")
    repository.commit("04-02", longer_py=text + "fresh = 1\n")
    assert read(repository.folder, "later")["held_out"] == {
        "longer.py": ((text, False), ("fresh = 1\n", True))
    }


def test_bare_repositories_and_subfolders_are_read(repository: Repository, tmp_path: Path) -> None:
    repository.git("clone", "-q", "--bare", ".", str(tmp_path / "bare.git"))
    whole = read(repository.folder, "cut")
    assert read(tmp_path / "bare.git", "cut") == whole
    (repository.folder / "sub").mkdir()
    assert read(repository.folder / "sub", "cut") == whole


def test_nothing_of_the_repository_runs(repository: Repository, tmp_path: Path) -> None:
    """Everything that git can be told to run, by configuration, attributes or environment."""
    trap = tmp_path / "trap.sh"
    trap.write_text(f"#!/bin/sh\ntouch {tmp_path}/sprung\ncat\n")
    trap.chmod(0o755)
    for key in ("core.fsmonitor", "core.pager", "pager.diff-tree", "diff.external", "core.editor",
                "diff.evil.command", "diff.evil.textconv", "filter.evil.smudge", "core.sshCommand",
                "filter.evil.process", "alias.ls-tree", "core.askPass", "gpg.program",
                "uploadpack.packObjectsHook"):  # fmt: skip
        repository.git("config", key, f"!{trap}" if key.startswith("alias") else str(trap))
    hooks = repository.folder / ".git" / "hooks"
    for name in ("post-checkout", "reference-transaction", "post-index-change", "pre-auto-gc"):
        shutil.copy(trap, hooks / name)
    attributes = repository.folder / ".git" / "info" / "attributes"
    attributes.parent.mkdir(exist_ok=True)
    attributes.write_text("*.py diff=evil filter=evil\n")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GIT_EXTERNAL_DIFF", "GIT_PAGER", "GIT_SSH_COMMAND", "GIT_TRACE"):
            patch.setenv(name, str(trap))
        patch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
        assert len(read(repository.folder, "cut")["train"]) == 3
    assert not (tmp_path / "sprung").exists()


def test_secrets_links_binaries_and_pointers_are_left_out(repository: Repository) -> None:
    folder = repository.folder
    (folder / "link.py").symlink_to("/etc/passwd")
    (folder / "blob.py").write_bytes(b"\0\1")
    (folder / "latin.py").write_bytes(b"x = '\xe9'\n")
    (folder / "huge.py").write_text("z = 1\n" * 400_000)
    (folder / "notes.csv").write_text("1,2\n")
    repository.commit(
        "05-01", secrets_py="x = 1\n", key_py="k = 'ghp_" + "a" * 36 + "'\n", copy_py="d = 4\n",
        lfs_py="version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    )  # fmt: skip
    data = DataSelection(git=GitRange(str(folder), "HEAD"))
    corpus = collect(data, 0.1)
    assert {Path(f.origin.split(":")[1]).name for f in corpus.files} <= {
        "a.py", "b.py", "copy.py", "d.py"
    }  # fmt: skip
    for reason, count in {"secret": 2, "binary": 1, "not UTF-8": 1, "too large": 1, "copy": 1,
                          "LFS pointer": 1}.items():  # fmt: skip
        assert corpus.skipped[reason] == count, reason
    assert corpus.summary.main_language == "python"


def test_a_changed_line_counts_and_a_moved_one_does_not() -> None:
    assert changed_parts("a\nb\nc\n", "c\na\nb\nx\n") == (("c\na\nb\n", False), ("x\n", True))
    assert changed_parts("", "a\n") == (("a\n", True),)
    assert changed_parts("a\n", "a\n") == (("a\n", False),)


@pytest.mark.parametrize(
    ("cutoff", "sentence"),
    [
        ("nonsense", r"'nonsense' names no commit in .*git_cutoff under \[data\] \(a date is wr"),
        ("2026-13-01", r"git_cutoff '2026-13-01' is not a date; write 2026-03-31"),
        ("2025-01-01", r"has no commit before git_cutoff '2025-01-01'; .*shallow"),
        ("side", r"git_cutoff 'side' is not in the history of 'HEAD'"),
        ("--all", r"'--all' names no commit"),
    ],
)
def test_a_bad_cut_off_is_named(repository: Repository, cutoff: str, sentence: str) -> None:
    repository.git("checkout", "-q", "--orphan", "side")
    repository.commit("06-01", z_py="z = 1\n")
    repository.git("checkout", "-q", "main")
    with pytest.raises(CorpusError, match=sentence):
        read(repository.folder, cutoff)


def test_what_is_no_repository_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CorpusError, match=r"none does not exist; check \[data\] git"):
        read(tmp_path / "none", "HEAD")
    with pytest.raises(CorpusError, match="is not a git repository"):
        read(tmp_path, "HEAD")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CorpusError, match="needs the git command; install git"):
        read(tmp_path, "HEAD")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_repository_of_another_user_is_refused_with_the_remedy(repository: Repository) -> None:
    for place in (repository.folder, repository.folder / ".git"):
        os.chown(place, 12345, 12345)
    with pytest.raises(CorpusError, match=r"belongs to another user, .*--add safe\.directory /"):
        read(repository.folder, "cut")
