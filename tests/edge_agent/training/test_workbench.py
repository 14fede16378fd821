"""The rows of local code: every connector reaches them, and fill in the middle where it can."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_agent.training.backbone import Backbone
from edge_agent.training.connectors import DataSelection
from edge_agent.training.fill_in_middle import middle_tokens
from edge_agent.training.records import Keys
from edge_agent.training.workbench import NoDataError, Workbench
from protos.contract import AdapterSpec

MARKS = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]


@pytest.fixture
def base(bench: Workbench, base_folder: Path, spec: AdapterSpec) -> Backbone:
    return bench.base(base_folder, "fp32", spec)


def test_a_base_without_marks_says_so_once_and_changes_nothing(
    bench: Workbench, base: Backbone, code_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = DataSelection((str(code_folder),))
    plain = bench.rows(Path("b"), base, data, 64, 0.25)
    with caplog.at_level(logging.INFO, "sketchfleet.trainer"):
        asked = bench.rows(Path("b"), base, data, 64, 0.25, 0.5, 1)
        bench.rows(Path("b"), base, data, 64, 0.25, 0.5, 1)
    assert caplog.text.count("fill in the middle is off: the tokenizer of this base has no") == 1
    np.testing.assert_array_equal(plain.train.tokens, asked.train.tokens)


def test_only_training_text_is_rearranged(
    bench: Workbench, base: Backbone, code_folder: Path
) -> None:
    able = replace(base, tokenizer=copy.deepcopy(base.tokenizer))
    able.tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    marks = middle_tokens(able.tokenizer)
    assert marks is not None and marks.prefix == able.tokenizer.convert_tokens_to_ids(MARKS[0])
    data = DataSelection((str(code_folder),))
    plain = bench.rows(Path("b"), able, data, 128, 0.25)
    found = bench.rows(Path("b"), able, data, 128, 0.25, 0.5, 3)
    assert (found.train.tokens == marks.prefix).any()
    assert (found.train.tokens == marks.suffix).sum() == (found.train.tokens == marks.prefix).sum()
    np.testing.assert_array_equal(found.held_out.tokens, plain.held_out.tokens)
    again = bench.rows(Path("c"), able, data, 128, 0.25, 0.5, 3)
    np.testing.assert_array_equal(found.train.tokens, again.train.tokens)


def test_records_without_a_language_are_rows_too(
    bench: Workbench, base: Backbone, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    pairs = [{"q": f"# add {i}\n", "a": f"x = x + {i}\n"} for i in range(60)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    data = DataSelection(jsonl=(str(path),), keys=Keys(prompt="q", completion="a"))
    rows = bench.rows(Path("b"), base, data, 96, 0.2)
    rows.require(trains=True)
    assert rows.main_language == ""
    counted = rows.train.tokens[rows.train.counted].tolist()
    text = base.tokenizer.decode(counted, skip_special_tokens=True)
    assert "x = x + " in text and "# add" not in text


def test_a_split_without_a_document_is_no_data(
    bench: Workbench, base: Backbone, code_folder: Path
) -> None:
    rows = bench.rows(Path("b"), base, DataSelection((str(code_folder),)), 64, 0.0)
    with pytest.raises(NoDataError, match=r"there is no held-out code, but \d+ sequences of 64"):
        rows.require(trains=False)
