"""Held-out loss through ONNX Runtime: the numbers of `training.evaluation`, and the command."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edge_agent.cli import main
from edge_agent.inference_folder import InferenceError
from edge_agent.training.evaluation import evaluate
from edge_agent.training.rows import Rows


def packed(length=96, rows=3):
    """Rows of several documents, prompts that do not count, and padding."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 257, (rows, length))
    document = np.sort(draw.integers(0, 3, (rows, length)), axis=1).astype(np.int32)
    counted = draw.random((rows, length)) < 0.8
    counted[:, 0] = False
    counted[:, 1:] &= document[:, 1:] == document[:, :-1]
    counted[0, -20:] = False
    return Rows(tokens, document, counted)


def test_loss_and_accuracy_are_those_of_torch(engine, adapters, backbone):
    rows = packed()
    bare = evaluate(backbone.model, rows, 2)
    got = engine.held_out(rows)
    assert (got.tokens, got.token_accuracy) == (bare.tokens, bare.token_accuracy)
    assert got.loss == pytest.approx(bare.loss, rel=1e-5)
    engine.swap(adapters.file(1))
    model = adapters.model(1)
    try:
        tuned = evaluate(model, rows, 2)
    finally:
        model.unload()
    assert engine.held_out(rows).loss == pytest.approx(tuned.loss, rel=1e-5)
    assert abs(tuned.loss - bare.loss) > 1e-3


def test_long_documents_are_read_in_parts(engine, monkeypatch):
    rows = packed(length=120, rows=2)
    whole = engine.held_out(rows)
    monkeypatch.setattr("edge_agent.inference_evaluation.PART_TOKENS", 7)
    parts = engine.held_out(rows)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.tokens == whole.tokens


def test_nothing_to_predict_and_too_long_a_text_are_told(engine):
    rows = packed()
    with pytest.raises(InferenceError, match="no held-out text"):
        engine.held_out(Rows(rows.tokens, rows.document, np.zeros_like(rows.counted)))
    with pytest.raises(InferenceError, match="context of 160"):
        engine.held_out(packed(length=600))


def test_the_commands_complete_and_measure(exported, adapters, tmp_path, capsys, monkeypatch):
    code = tmp_path / "code"
    code.mkdir()
    for i in range(40):
        (code / f"f{i}.py").write_text(f"def add_{i}(a, b):\n    return a + b * {i}\n")
    config = tmp_path / "agent.toml"
    config.write_text(
        '[coordinator]\naddress = "127.0.0.1:1"\n[device]\nname = "d"\n'
        f'[data]\ninclude = ["{code}"]\n'
    )
    peft = str(adapters.peft(1))
    words = [
        "evaluate",
        "--config",
        str(config),
        "--base",
        str(exported),
        "--held-out-share",
        "0.5",
    ]
    assert main([*words, "--json"]) == 0
    bare = json.loads(capsys.readouterr().out)
    assert bare["tokens"] > 0 and bare["adapter"] == ""
    assert main([*words, "--adapter", peft, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] != bare["loss"]
    assert main([*words, "--adapter", str(adapters.file(1))]) == 0
    assert "held-out loss" in capsys.readouterr().out

    from io import StringIO

    monkeypatch.setattr("sys.stdin", StringIO("def f("))
    base = ["--base", str(exported), "--max-tokens", "4"]
    assert main(["generate", "-", *base]) == 0
    assert capsys.readouterr().out.startswith("def f(")
    assert main(["generate", "def f(", *base, "--suffix", "):", "--temperature", "1"]) == 0
    assert capsys.readouterr().out.endswith("):\n")
    assert main(["generate", "x", *base, "--adapter", "newest", "--config", str(config)]) == 1
    assert "holds no adapter" in capsys.readouterr().err
    assert main(["generate", "x", "--base", str(tmp_path), "--top-p", "0.5"]) == 1
    assert "--top-p needs a folder of export-base" in capsys.readouterr().err
