"""The base as a folder: whole or not at all, in three precisions, and only what can be exported."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from edge_agent.inference import Engine
from edge_agent.training import export
from edge_agent.training.export import BaseExportError, export_base
from edge_agent.training.export_graph import GraphError, context_tokens
from edge_agent.training.export_weights import quantise
from profiles.model import base_digest, read_shape
from protos.whole_adapter import ExportError
from tests.edge_agent.inference.conftest import ENDS, tokens_of
from tests.edge_agent.inference.test_evaluation import packed
from tests.tiny_base import write_encoder


@pytest.fixture(scope="module")
def smaller(exported, tmp_path_factory):
    """Precision -> folder."""
    made = {"float32": exported}
    for precision in ("int8", "int4"):
        made[precision] = tmp_path_factory.mktemp("smaller") / precision
        export_base(str(exported), made[precision], precision)
    return made


def size(folder):
    return (folder / "model.onnx").stat().st_size


def test_export_json_says_what_the_graph_is(exported, base_folder):
    info = Engine.open(exported).info
    assert info.base_digest == base_digest(base_folder)
    assert (info.precision, info.context_tokens, info.vocabulary) == ("float32", 160, 264)
    assert (info.layers, info.key_value_heads, info.head_size) == (2, 2, 8)
    assert (info.separator, info.ends, info.marks.end) == (0, ENDS, None)
    assert info.modules == read_shape(base_folder).modules(())
    assert {"onnx", "torch", "transformers"} <= info.versions.keys()


@pytest.mark.parametrize(
    ("layers", "window", "expected"),
    [
        (None, None, 4096), (None, 512, 512), (["full_attention"], 512, 4096),
        (["full_attention", "sliding_attention"], 512, 512), (["sliding_attention"], 9999, 4096),
    ],
)  # fmt: skip
def test_the_context_ends_with_a_sliding_window(layers, window, expected):
    config = SimpleNamespace(
        max_position_embeddings=4096, layer_types=layers, sliding_window=window
    )
    assert context_tokens(config) == expected


def test_the_graph_tells_nothing_of_who_made_it(exported):
    assert b"site-packages" not in (exported / "model.onnx").read_bytes()


def test_fewer_bits_are_smaller_and_near(smaller, adapters):
    rows = packed()
    found = {}
    for precision, folder in smaller.items():
        engine = Engine.open(folder, threads=1)
        bare = engine.held_out(rows).loss
        engine.swap(adapters.file(1))
        found[precision] = (bare, engine.held_out(rows).loss)
    assert size(smaller["int4"]) < size(smaller["int8"]) < size(smaller["float32"])
    for precision, near in (("int8", 0.02), ("int4", 0.3)):
        assert found[precision] == pytest.approx(found["float32"], abs=near)
        assert found[precision][0] != found[precision][1]  # adapters act on these bases too


def test_what_is_read_together_does_not_change_a_quantised_base(smaller):
    engine = Engine.open(smaller["int8"], threads=1)
    session, ids = engine._session, np.arange(40)[None]
    whole, _ = session.run(ids, session.empty, np.arange(40))
    first, cache = session.run(ids[:, :13], session.empty, np.arange(13))
    rest, _ = session.run(ids[:, 13:], cache, np.arange(27))
    np.testing.assert_allclose(np.concatenate([first, rest], 1), whole, rtol=1e-4, atol=1e-4)


def test_texts_of_a_batch_do_not_see_each_other(engine):
    session = engine._session
    ids = np.array([[5, 6, 7, 8], [9, 10, 11, 12]])
    both, cache = session.run(ids, session.empty_of(2), [3])
    after, _ = session.run(np.array([[3], [4]]), cache, [0])
    for row in range(2):
        alone, one = session.run(ids[row : row + 1], session.empty, [3])
        np.testing.assert_allclose(both[row], alone[0], rtol=1e-5, atol=1e-5)
        alone, _ = session.run(np.array([[3 + row]]), one, [0])
        np.testing.assert_allclose(after[row], alone[0], rtol=1e-5, atol=1e-5)


def test_large_weights_lie_beside_the_graph(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MOST_FILE_BYTES", 10_000)
    export_base(str(exported), tmp_path / "int8", "int8")
    beside = tmp_path / "int8" / "model.onnx.data"
    assert beside.stat().st_size > 10_000
    assert onnx.load(tmp_path / "int8" / "model.onnx", load_external_data=False).ir_version
    engine = Engine.open(tmp_path / "int8", threads=1)
    assert tokens_of(engine.generate("x", max_tokens=4))


def test_nothing_half_written_stays(exported, tmp_path, monkeypatch):
    def fail(*_):
        raise BaseExportError("no")

    monkeypatch.setattr(export, "_write_rest", fail)
    with pytest.raises(BaseExportError):
        export_base(str(exported), tmp_path / "out", "int4")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_told(exported, smaller, base_folder, tmp_path):
    with pytest.raises(ExportError, match="already exists"):
        export_base(str(exported), tmp_path, "int8")
    with pytest.raises(BaseExportError, match="an export in int8"):
        export_base(str(smaller["int8"]), tmp_path / "out", "int4")
    with pytest.raises(BaseExportError, match="encoder"):
        export_base(str(write_encoder(tmp_path / "bert")), tmp_path / "out", "int8")
    bare = shutil.copytree(base_folder, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(BaseExportError, match="fast format"):
        export_base(str(bare), tmp_path / "out", "int8")
    config = json.loads((base_folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    (bare / "config.json").write_text(json.dumps(config))
    shutil.copy(base_folder / "tokenizer.json", bare)
    with pytest.raises(GraphError, match="type dynamic"):
        export_base(str(bare), tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


def test_a_graph_that_computes_something_else_is_not_kept(exported):
    info = Engine.open(exported).info
    draw = np.random.default_rng(0)
    with pytest.raises(BaseExportError, match="differ from the model's"):
        export._compare(exported / "model.onnx", info, np.ones((1, 8), np.int64),
                        draw.normal(size=(8, 264)))  # fmt: skip


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("width", [64, 48])  # 48: not whole blocks
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_keep_8_bits_tied_or_not(precision, width, tied):
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(0)
    words = draw.normal(size=(50, width)).astype(np.float32)
    head = words if tied else draw.normal(size=(50, width)).astype(np.float32)
    middle = draw.normal(size=(width, width)).astype(np.float32) / width**0.5
    weights = {"words": words, "middle": middle} | ({} if tied else {"head": head})
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", "middle"], ["y"], name="middle"),
        helper.make_node("Transpose", ["words" if tied else "head"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["y", "turned"], ["logits"], name="logits"),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "t"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "t", 50])],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    made = quantise(model, precision)
    stored = sum(len(tensor.raw_data) for tensor in made.graph.initializer)
    copies = 1 if tied and width == 64 else 2
    assert stored < (copies * 50 + width) * 64 * 1.3 + 200  # bytes, scales; blocks are filled up
    session = onnxruntime.InferenceSession(made.SerializeToString())
    ids = np.arange(50).reshape(2, 25)
    (got,) = session.run(None, {"input_ids": ids})
    want = words[ids] @ middle @ head.T
    assert np.abs(got - want).max() < {"int8": 0.03, "int4": 0.15}[precision] * np.abs(want).max()
