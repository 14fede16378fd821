"""Adapter files: what a round leaves, scales folded in; damaged and foreign ones are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edge_agent.inference_adapter import load_adapter, read_peft, write_adapter, write_whole
from edge_agent.inference_folder import InferenceError
from profiles.model import ModuleShape, base_digest, read_shape
from protos.contract import AdapterSpec
from protos.whole_adapter import WholeAdapter, with_branch
from tests.edge_agent.inference.conftest import tokens_of


def spec_of(base_folder, **options):
    return AdapterSpec(
        **{
            "run_id": "run", "base": "qwen", "base_revision": "",
            "base_digest": base_digest(base_folder), "rank": 4, "alpha": 8.0, "use_rslora": False,
            "seed": 1, "modules": read_shape(base_folder).modules(()),
        } | options
    )  # fmt: skip


def whole_of(spec, rank, seed=0):
    draw = np.random.default_rng(seed)
    factors = {
        m.name: (draw.normal(size=(rank, m.out_features)).astype(np.float32),
                 draw.normal(size=(rank, m.in_features)).astype(np.float32))
        for m in spec.modules
    }  # fmt: skip
    return WholeAdapter(spec, rank, factors)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_round_s_adapter_adds_its_scaled_product(engine, base_folder, tmp_path, rslora):
    import onnxruntime

    spec = spec_of(base_folder, use_rslora=rslora)
    adapter = whole_of(spec, 4)
    path = write_whole(adapter, tmp_path)
    held = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
    assert len(held) == 2 * len(spec.modules)
    for name, (up, down) in adapter.factors.items():
        product = held[f"{name}.down"].numpy() @ held[f"{name}.up"].numpy()
        np.testing.assert_allclose(product.T, spec.scale(4) * up.T @ down, rtol=1e-5, atol=1e-5)
    engine.swap(path)
    assert engine.adapter == path.stem


def test_a_core_and_a_branch_are_part_of_it(base_folder, tmp_path):
    spec = spec_of(base_folder)
    draw = np.random.default_rng(0)
    module = spec.modules[0]

    def values(*shape):
        return draw.normal(size=shape).astype(np.float32)

    parts = {"up": values(4, module.out_features), "down": values(4, module.in_features),
             "core": values(4, 4)}  # fmt: skip
    side = {"up": values(3, module.out_features), "down": values(3, module.in_features)}
    factors = {module.name: with_branch(spec, parts, 0.5, side)}
    path = write_whole(WholeAdapter(spec, 7, factors), tmp_path)
    import onnxruntime

    held = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
    got = (held[f"{module.name}.down"].numpy() @ held[f"{module.name}.up"].numpy()).T
    want = 0.5 * parts["up"].T @ parts["core"] @ parts["down"] + side["up"].T @ side["down"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_the_name_is_the_digest_of_what_is_in_it(base_folder, tmp_path):
    spec = spec_of(base_folder)
    first = write_whole(whole_of(spec, 4), tmp_path)
    written = first.stat().st_mtime_ns
    assert write_whole(whole_of(spec, 4), tmp_path) == first
    assert first.stat().st_mtime_ns == written
    others = {
        write_whole(whole_of(spec, 4, seed=1), tmp_path),
        write_whole(whole_of(spec_of(base_folder, alpha=9.0), 4), tmp_path),
        write_whole(whole_of(spec_of(base_folder, base_digest="f" * 64), 4), tmp_path),
    }
    assert len(others | {first}) == 4
    assert sorted(tmp_path.iterdir()) == sorted(others | {first})  # and nothing half written


def test_what_a_graph_has_no_place_for_is_refused(base_folder, tmp_path):
    spec = spec_of(base_folder)
    dense = WholeAdapter(spec, 4, {}, {"model.norm.weight": np.zeros((1, 32), np.float32)})
    with pytest.raises(InferenceError, match=r"model\.norm\.weight whole"):
        write_whole(dense, tmp_path)


def change(path, name, value):
    config = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps(config | value))


def test_a_peft_folder_of_another_kind_is_refused(adapters, tmp_path):
    import shutil

    for number, odd in enumerate(({"use_dora": True}, {"modules_to_save": ["lm_head"]})):
        folder = shutil.copytree(adapters.peft(1), tmp_path / str(number))
        change(folder, "adapter_config.json", odd)
        with pytest.raises(InferenceError, match=next(iter(odd))):
            read_peft(folder)
    with pytest.raises(InferenceError, match="not a PEFT folder"):
        read_peft(tmp_path)


def test_a_foreign_or_damaged_file_changes_nothing(engine, base_folder, adapters, tmp_path):
    good = adapters.file(1)
    engine.swap(good)
    before = tokens_of(engine.generate("x", max_tokens=6))
    spec = spec_of(base_folder)
    name = spec.modules[0].name
    whole = good.read_bytes()
    damaged = [whole[:size] for size in (0, 10, len(whole) // 2, len(whole) - 8)]
    damaged.append(np.random.default_rng(0).bytes(len(whole)))
    wrong = [
        ("another base", write_whole(
            whole_of(spec_of(base_folder, base_digest="f" * 64), 4), tmp_path
        )),
        ("does not have", write_adapter(
            {"model.layers.9.mlp.up_proj": (np.zeros((1, 48)), np.zeros((1, 32)))},
            spec.base_digest, tmp_path,
        )),
        ("its layer is", write_adapter(
            {name: (np.zeros((1, 31)), np.zeros((1, 32)))}, spec.base_digest, tmp_path
        )),
        ("its layer is", write_adapter(
            {name: (np.zeros((2, 32)), np.zeros((1, 32)))}, spec.base_digest, tmp_path
        )),
        ("damaged", tmp_path / "gone.onnx_adapter"),
    ]  # fmt: skip
    for number, data in enumerate(damaged):
        path = tmp_path / f"damaged-{number}.onnx_adapter"
        path.write_bytes(data)
        wrong.append(("damaged", path))
    for why, path in wrong:
        with pytest.raises(InferenceError, match=why):
            engine.swap(path)
        assert engine.adapter == good.stem, path
    assert tokens_of(engine.generate("x", max_tokens=6)) == before


def test_modules_that_an_adapter_leaves_out_stay_as_they_are(engine, base_folder, tmp_path):
    spec = spec_of(base_folder)
    module: ModuleShape = spec.modules[-1]
    nothing = {module.name: (np.zeros((3, module.out_features)), np.ones((3, module.in_features)))}
    path = write_adapter(nothing, spec.base_digest, tmp_path)
    bare = tokens_of(engine.generate("x", max_tokens=6))
    engine.swap(path)
    assert tokens_of(engine.generate("x", max_tokens=6)) == bare
    assert load_adapter(path, engine.info).name == path.stem
