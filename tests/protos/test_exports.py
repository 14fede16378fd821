"""What is exported for other programs is the very model that the fleet trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from profiles.model import base_digest, dense_tensors, read_shape
from protos.contract import AdapterSpec, Classification
from protos.export_options import ExportError
from protos.gguf_lora import write_gguf
from protos.merged_folder import write_merged
from protos.peft_folder import write_peft
from protos.whole_adapter import WholeAdapter, with_branch
from tests.tiny_base import write_base

RANK = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), hidden=32, intermediate=48)


def make_spec(base: Path, **changes) -> AdapterSpec:
    facts = {
        "run_id": "team", "base": str(base), "base_revision": "",
        "base_digest": base_digest(base), "rank": RANK,
        "alpha": 6.0, "use_rslora": False, "seed": 1, "modules": read_shape(base).modules(()),
    }  # fmt: skip
    return AdapterSpec(**(facts | changes))


def make_adapter(spec: AdapterSpec, **changes) -> WholeAdapter:
    draw = np.random.default_rng(0)
    factors = {
        m.name: tuple(
            (0.1 * draw.normal(size=(spec.rank, width))).astype(np.float32)
            for width in (m.out_features, m.in_features)
        )
        for m in spec.modules
    }
    dense = {
        t.name: (0.1 * draw.normal(size=(t.out_features, t.in_features))).astype(np.float32)
        for t in spec.dense
    }
    return replace(WholeAdapter(spec, spec.rank, factors, dense, 4), **changes)


def delta_of(adapter: WholeAdapter, module: str) -> np.ndarray:
    up, down = adapter.factors[module]
    return adapter.scale * up.T.astype(np.float64) @ down.astype(np.float64)


# --- llama.cpp ----------------------------------------------------------------------------------


def read_gguf(path: Path):
    """(metadata, tensor -> values with rows first)"""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    return facts, {t.name: np.array(t.data).reshape(t.shape[::-1]) for t in reader.tensors}


def llama_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter of base models lays out q and k, in its own words."""
    return (
        rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_llama_cpp_computes_the_same_delta_for_every_tensor(base, tmp_path, rslora) -> None:
    spec = make_spec(base, use_rslora=rslora)
    adapter, shape = make_adapter(spec), read_shape(base)
    facts, tensors = read_gguf(write_gguf(adapter, shape, tmp_path / "a.gguf"))
    assert facts["general.type"] == "adapter" and facts["adapter.type"] == "lora"
    assert facts["general.architecture"] == "llama"
    assert len(tensors) == 2 * len(spec.modules)
    ours = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    for layer in range(shape.layers):
        for theirs, name in ours.items():
            a, b = (tensors[f"blk.{layer}.{theirs}.weight.lora_{x}"] for x in "ab")
            got = facts["adapter.lora.alpha"] / len(a) * b.astype(np.float64) @ a
            want = delta_of(adapter, f"model.layers.{layer}.{name}")
            if theirs in ("attn_q", "attn_k"):
                want = llama_rows(want, shape.heads if theirs == "attn_q" else shape.kv_heads)
            np.testing.assert_allclose(got, want, atol=1e-6, err_msg=theirs)


def test_rows_of_queries_and_keys_lie_as_llama_cpp_rotates_them() -> None:
    """transformers turns row i with i + d/2, llama.cpp 2i with 2i + 1: scores must be equal."""
    draw = np.random.default_rng(1)
    half = 4
    q, k = draw.normal(size=(2, 2 * half))
    angles = 1.7 * 10.0 ** -np.arange(half)

    def turned(first, second, angle):
        return first * np.cos(angle) - second * np.sin(angle), (
            first * np.sin(angle) + second * np.cos(angle)
        )

    def by_halves(v, angle):
        return np.concatenate(turned(v[:half], v[half:], angle))

    def by_pairs(v, angle):
        return np.stack(turned(v[::2], v[1::2], angle), axis=1).ravel()

    want = by_halves(q, 5 * angles) @ by_halves(k, 2 * angles)
    got = by_pairs(llama_rows(q, 1), 5 * angles) @ by_pairs(llama_rows(k, 1), 2 * angles)
    assert got == pytest.approx(want)
    assert by_pairs(q, 5 * angles) @ by_pairs(k, 2 * angles) != pytest.approx(want)


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "gemma", "gemma2", "starcoder2"])
def test_every_supported_decoder_has_its_names(base, tmp_path, kind) -> None:
    shape = replace(read_shape(base), model_type=kind)
    spec = make_spec(base, modules=shape.modules(()))
    facts, tensors = read_gguf(write_gguf(make_adapter(spec), shape, tmp_path / "a.gguf"))
    assert facts["general.architecture"] == {"mistral": "llama"}.get(kind, kind)
    assert len(tensors) == 2 * len(spec.modules)
    if kind == "qwen2":  # rotates halves, as transformers does
        want = make_adapter(spec).factors["model.layers.0.self_attn.q_proj"][0].T
        np.testing.assert_array_equal(tensors["blk.0.attn_q.weight.lora_b"], want)


def test_what_gguf_cannot_hold_is_refused_and_nothing_is_left(base, tmp_path) -> None:
    shape = read_shape(base)
    dense = make_spec(base, dense=dense_tensors(base, ["model.norm"]))
    with pytest.raises(ExportError, match=r"trained model\.norm\.weight whole.*merged"):
        write_gguf(make_adapter(dense), shape, tmp_path / "a.gguf")
    spec = make_spec(base, classification=Classification(("no", "yes"), "score"))
    with pytest.raises(ExportError, match=r"trains a classifier.*PEFT folder"):
        write_gguf(make_adapter(spec), shape, tmp_path / "a.gguf")
    odd = make_spec(base)
    odd = replace(odd, modules=(replace(odd.modules[0], name="model.layers.0.odd"),))
    with pytest.raises(ExportError, match=r"no tensor for model\.layers\.0\.odd"):
        write_gguf(make_adapter(odd), shape, tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.gguf").write_bytes(b"mine")
    with pytest.raises(ExportError, match="already exists"):
        write_gguf(make_adapter(make_spec(base)), shape, tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == b"mine"


# --- merged folders -----------------------------------------------------------------------------


def load(folder: Path, dtype: str):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


def logits(model):
    import torch

    with torch.no_grad():
        return model(input_ids=torch.arange(24).reshape(2, 12)).logits


def test_transformers_computes_what_peft_does(base, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    dense = dense_tensors(base, ["model.norm"])
    adapter = make_adapter(make_spec(base, dense=dense))
    merge = write_merged(adapter, base, tmp_path / "merged", "tiny")
    write_peft(adapter, tmp_path / "peft", "tiny", base)
    want = logits(peft.PeftModel.from_pretrained(load(base, "float32"), tmp_path / "peft"))
    got = logits(load(tmp_path / "merged", "float32"))
    assert (want - logits(load(base, "float32"))).abs().max() > 0.1, "the adapter must matter"
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert merge.tensors == len(adapter.spec.modules) + 1 and merge.lost_share < 1e-12


def test_tokenizer_and_configuration_come_along(base, tmp_path) -> None:
    write_merged(make_adapter(make_spec(base)), base, tmp_path / "merged", "org/tiny")
    names = {p.name for p in (tmp_path / "merged").iterdir()}
    assert names >= {p.name for p in base.iterdir()} | {"README.md"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    assert "after 4 rounds" in (tmp_path / "merged/README.md").read_text()


@pytest.mark.parametrize("shards", [1, 3])
def test_a_bfloat16_base_is_rounded_once_or_written_out_in_float32(
    base, tmp_path, monkeypatch, shards
) -> None:
    from safetensors import safe_open

    half = tmp_path / "half"
    size = "1GB" if shards == 1 else "15KB"
    model = load(base, "bfloat16")
    model.save_pretrained(half, max_shard_size=size)
    files = sorted(p.name for p in half.glob("*.safetensors"))
    assert len(files) >= shards
    adapter = make_adapter(make_spec(half))
    monkeypatch.setattr("protos.merged_folder.BLOCK_VALUES", 100)  # blocks that do not fit evenly
    lost = {}
    for precision in (None, "float32"):
        out = tmp_path / str(precision)
        lost[precision] = write_merged(adapter, half, out, "tiny", precision).lost_share
        assert sorted(p.name for p in out.glob("*.safetensors")) == files
        got = load(out, "float32").state_dict()
        for name, weight in model.state_dict().items():
            want = weight.double().numpy()
            module = name.removesuffix(".weight")
            if module in adapter.factors:
                want = want + delta_of(adapter, module)
            step = 2**-8 if precision is None else 2**-24
            np.testing.assert_allclose(got[name].numpy(), want, rtol=step, err_msg=name)
        stored = "BF16" if precision is None else "F32"
        for name in files:
            with safe_open(out / name, "np") as file:
                kinds = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
            assert kinds == {stored}
        config = json.loads((out / "config.json").read_text())
        assert config["dtype"] == (precision or "bfloat16")
    assert lost["float32"] < 1e-9 < lost[None] < 1e-2


def test_a_tied_table_that_was_trained_whole_leaves_the_output_head_as_it_was(
    base, tmp_path
) -> None:
    spec = make_spec(base, dense=dense_tensors(base, ["model.embed_tokens"]))
    write_merged(make_adapter(spec), base, tmp_path / "merged", "tiny")
    got, was = load(tmp_path / "merged", "float32"), load(base, "float32")
    table = was.model.embed_tokens.weight.detach().numpy()
    moved = got.model.embed_tokens.weight.detach().numpy() - table
    np.testing.assert_allclose(moved, make_adapter(spec).dense[spec.dense[0].name], atol=1e-6)
    np.testing.assert_array_equal(got.lm_head.weight.detach().numpy(), table)


def test_weights_that_would_round_an_update_away_are_refused(base, tmp_path) -> None:
    quantised = tmp_path / "quantised"
    load(base, "float32").save_pretrained(quantised)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    adapter = make_adapter(make_spec(base))
    with pytest.raises(ExportError, match=r"quantised weights.*full-precision original"):
        write_merged(adapter, quantised, tmp_path / "merged", "tiny")
    other = replace(adapter, spec=replace(adapter.spec, base_digest="c" * 64))
    with pytest.raises(ExportError, match="another base than run team"):
        write_merged(other, base, tmp_path / "merged", "tiny")
    (tmp_path / "mine").mkdir()
    with pytest.raises(ExportError, match="already exists"):
        write_merged(adapter, base, tmp_path / "mine", "tiny")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "quantised"]


def test_a_sum_that_float16_cannot_hold_is_told(base, tmp_path) -> None:
    adapter = make_adapter(make_spec(base))
    name = adapter.spec.modules[0].name
    up, down = adapter.factors[name]
    factors = {**adapter.factors, name: (up * np.float32(1e7), down)}
    with pytest.raises(ExportError, match=rf"{name}\.weight does not fit F16.*--dtype float32"):
        write_merged(replace(adapter, factors=factors), base, tmp_path / "m", "tiny", "float16")
    assert list(tmp_path.iterdir()) == []


# --- what both ends make it of ------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_core_scale_and_branch_become_one_pair_of_factors(base, rslora) -> None:
    spec = make_spec(base, use_rslora=rslora)
    draw = np.random.default_rng(3)
    parts = {"up": draw.normal(size=(2, 5)), "down": draw.normal(size=(2, 7)),
             "core": draw.normal(size=(2, 2))}  # fmt: skip
    side = {"up": draw.normal(size=(4, 5)), "down": draw.normal(size=(4, 7))}
    up, down = with_branch(spec, parts, 0.7, side)
    want = 0.7 * parts["up"].T @ parts["core"] @ parts["down"] + side["up"].T @ side["down"]
    np.testing.assert_allclose(spec.scale(6) * up.T @ down, want, atol=1e-5)
