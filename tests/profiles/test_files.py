"""Files are there entirely or not at all."""

from __future__ import annotations

import pytest

from profiles.files import replacing


def test_a_file_takes_its_place_when_it_is_written(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with replacing(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError], ids=["Ctrl-C", "full disk"])
def test_what_is_interrupted_leaves_the_old_one_and_nothing_else(tmp_path, error):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as draft:
        draft.write_text("half")
        raise error
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["report.html"]
