"""Exports are what users load: stock PEFT must see the very model that the fleet trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator.config import RunConfig
from coordinator.export import export_run, global_adapter, whole_adapter
from coordinator.lowrank import Bundle
from coordinator.methods import METHODS, MethodOptions, ModuleState, make
from coordinator.state import StateReader, StateWriter
from coordinator.store.blobs import BlobStore
from coordinator.store.rows import RunRecord
from profiles.model import ModelError, ModuleShape, base_digest, dense_tensors
from protos.contract import AdapterSpec
from protos.export_options import ExportError, Wanted
from protos.peft_folder import write_peft

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

HIDDEN, WIDE, LAYERS, RANK = 32, 48, 2, 4
IDS = torch.arange(20).reshape(2, 10)


def make_spec(**changes) -> AdapterSpec:
    modules = []
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        modules.append(ModuleShape(f"{at}.self_attn.q_proj", HIDDEN, HIDDEN))
        modules.append(ModuleShape(f"{at}.mlp.down_proj", HIDDEN, WIDE))
    facts = {
        "run_id": "run",
        "base": "tiny",
        "base_revision": "",
        "base_digest": "ab" * 32,
        "rank": RANK,
        "alpha": 8.0,
        "use_rslora": False,
        "seed": 1,
        "modules": tuple(modules),
    }
    return AdapterSpec(**(facts | changes))


def make_adapter(spec: AdapterSpec, scale: float | None = None) -> dict[str, Bundle]:
    draw = np.random.default_rng(0)
    return {
        m.name: Bundle(
            draw.normal(size=(spec.rank, m.out_features)).astype(np.float32) * 0.2,
            draw.normal(size=(spec.rank, m.in_features)).astype(np.float32) * 0.2,
            spec.scale(spec.rank) if scale is None else scale,
        )
        for m in spec.modules
    }


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        vocab_size=64,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def export_peft(spec, adapter, folder, base_name, dense=None, base_folder=None) -> Path:
    return write_peft(whole_adapter(spec, adapter, dense), folder, base_name, base_folder)


def export(run, files, blobs, folder: Path) -> Path:
    export_run(run, 3, files, blobs, Wanted(folder))
    return folder


def load(folder: Path, dtype):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def logits_by_hand(base_folder: Path, *added: dict[str, np.ndarray]):
    """Of the base with these matrices added to its weights, by the names of modules."""
    model = load(base_folder, torch.float32)
    with torch.no_grad():
        for matrices in added:
            for name, matrix in matrices.items():
                weight = model.get_submodule(name).weight
                weight += torch.from_numpy(matrix.astype(np.float32)).reshape(weight.shape)
        return model(input_ids=IDS).logits


def products(adapter: dict[str, Bundle]) -> dict[str, np.ndarray]:
    return {name: bundle.dense() for name, bundle in adapter.items()}


def logits_by_peft(base_folder: Path, folder: Path):
    model = peft.PeftModel.from_pretrained(load(base_folder, torch.float32), folder)
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("use_rslora", "scale"),
    [(False, None), (True, None), (False, 0.7)],
    ids=["lora", "rslora", "odd scale"],
)
def test_stock_peft_loads_it_and_computes_the_same(
    tmp_path: Path, base_folder: Path, use_rslora: bool, scale: float | None
) -> None:
    spec = make_spec(use_rslora=use_rslora)
    adapter = make_adapter(spec, scale)
    folder = export_peft(spec, adapter, tmp_path / "adapter", "tiny")
    want = logits_by_hand(base_folder, products(adapter))
    with torch.no_grad():
        plain = load(base_folder, torch.float32)(input_ids=IDS).logits
        model = peft.PeftModel.from_pretrained(load(base_folder, torch.float32), folder)
        got = model(input_ids=IDS).logits
        half = peft.PeftModel.from_pretrained(load(base_folder, torch.bfloat16), folder)
        got_half = half(input_ids=IDS).logits.float()
    assert not torch.allclose(plain, want, atol=0.1), "the adapter must matter for this test"
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    # bfloat16 keeps 8 bits: 2^-8 of the largest logit, a few times over through the layers.
    assert (got_half - want).abs().max() < 8 * 2**-8 * want.abs().max()


def test_the_exported_adapter_has_the_parameters_of_its_rank(
    tmp_path: Path, base_folder: Path
) -> None:
    spec = make_spec()
    folder = export_peft(spec, make_adapter(spec), tmp_path / "adapter", "tiny")
    model = peft.PeftModel.from_pretrained(
        load(base_folder, torch.float32), folder, is_trainable=True
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == spec.rank * spec.parameters_per_rank


def test_the_folder_is_standard_and_says_what_it_is(tmp_path: Path) -> None:
    spec = make_spec()
    folder = export_peft(spec, make_adapter(spec), tmp_path / "new" / "adapter", "org/base")
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, 8.0)
    assert config["base_model_name_or_path"] == "org/base"
    assert spec.base_digest in (folder / "README.md").read_text()


def test_an_existing_target_is_left_alone(tmp_path: Path) -> None:
    spec = make_spec()
    with pytest.raises(ExportError, match="already exists"):
        export_peft(spec, make_adapter(spec), tmp_path, "tiny")


def test_an_adapter_that_does_not_fit_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    spec = make_spec()
    adapter = make_adapter(spec)
    name = spec.modules[0].name
    short = Bundle(adapter[name].up[:2], adapter[name].down[:2], adapter[name].scale)
    target = tmp_path / "adapter"
    with pytest.raises(ExportError, match="ranks \\[2, 4\\]"):
        export_peft(spec, adapter | {name: short}, target, "tiny")
    with pytest.raises(ExportError, match=f"first {name}"):
        export_peft(spec, {n: b for n, b in adapter.items() if n != name}, target, "tiny")
    assert list(tmp_path.iterdir()) == []


# --- whole runs ---------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path, base_folder: Path):
    """(run, files, blobs, state by module, dense by name) of a made-up run of this method."""

    def of(method: str, *, side: int = 0, core: bool = False, dense: tuple[str, ...] = (),
           **options):  # fmt: skip
        base = str(base_folder)
        spec = make_spec(
            base=base, base_digest=base_digest(base_folder), dense=dense_tensors(base_folder, dense)
        )
        config = RunConfig.model_validate(
            {
                "run": {"name": "run"},
                "model": {"base": base, "modules_to_save": dense},
                "adapter": {"rank": RANK, "alpha": 8.0},
                "method": {"name": method, **options},
            }
        )
        draw = np.random.default_rng(3)

        def drawn(*shape):
            return (0.2 * draw.normal(size=shape)).astype(np.float32)

        blobs = BlobStore(tmp_path / "blobs")
        parts = ("up", "down", "core") if core else ("up", "down")
        writer = StateWriter(spec, parts, lambda role: blobs.draft())
        states, tensors = {}, {}
        for m in spec.modules:
            up, down = drawn(RANK, m.out_features), drawn(RANK, m.in_features)
            beside = drawn(side, m.out_features), drawn(side, m.in_features)
            states[m.name] = ModuleState(
                Bundle(up, down, spec.scale(RANK)),
                Bundle(*beside, 1.0) if side else None,
                drawn(RANK, RANK) if core else None,
            )
            writer.write(m.name, states[m.name])
        for t in spec.dense:
            tensors[t.name] = 0.5 + drawn(t.out_features, t.in_features)
            writer.write_dense(t.name, (tensors[t.name], {}))
        files = {r: blobs.adopt(f.path, f.payload) for r, f in writer.finish().items()}
        stored = json.loads(json.dumps(config.model_dump(mode="json")))
        return RunRecord("run", 0.0, stored, spec, 1.0, 2.0), files, blobs, states, tensors

    return of


def side_products(states: dict[str, ModuleState]) -> dict[str, np.ndarray]:
    return {name: s.side.dense() for name, s in states.items() if s.side is not None}


@pytest.mark.parametrize("method", [m for m in METHODS if m != "fedsa-lora"])
def test_a_run_of_every_method_is_exported(tmp_path: Path, finished, method: str) -> None:
    core = "core" in make(method, MethodOptions(rank=RANK)).parts(1)
    run, files, blobs, states, _ = finished(method, core=core)
    folder = export(run, files, blobs, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, state in states.items():
        up, down = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "BA")
        np.testing.assert_allclose(
            run.spec.scale(RANK) * up @ down, state.product.dense(), atol=1e-5
        )


def test_a_core_is_multiplied_into_the_factors(tmp_path: Path, base_folder: Path, finished) -> None:
    run, files, blobs, states, _ = finished("fed-sb", core=True)
    folder = export(run, files, blobs, tmp_path / "adapter")
    dense = {
        n: s.adapter.scale * s.adapter.up.T @ s.core @ s.adapter.down for n, s in states.items()
    }
    want = logits_by_hand(base_folder, dense)
    torch.testing.assert_close(logits_by_peft(base_folder, folder), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
def test_a_branch_beside_the_base_becomes_further_rows(
    tmp_path: Path, base_folder: Path, finished, method: str
) -> None:
    run, files, blobs, states, _ = finished(method, side=7)
    folder = export(run, files, blobs, tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == RANK + 7
    own = products({name: state.product for name, state in states.items()})
    want = logits_by_hand(base_folder, own, side_products(states))
    without = logits_by_hand(base_folder, own)
    assert (want - without).abs().max() > 0.1, "the branch must matter for this test"
    torch.testing.assert_close(logits_by_peft(base_folder, folder), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [0, 7])
def test_tensors_trained_whole_are_added_to_the_base_and_load_with_stock_peft(
    tmp_path: Path, base_folder: Path, finished, side: int
) -> None:
    method = "fedex-lora" if side else "fedit"
    run, files, blobs, states, tensors = finished(
        method, side=side, dense=("model.norm", "lm_head")
    )
    assert [(t.name, t.out_features, t.in_features) for t in run.spec.dense] == [
        ("model.norm.weight", 1, HIDDEN), ("lm_head.weight", 64, HIDDEN)
    ]  # fmt: skip
    folder = export(run, files, blobs, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head", "model.norm"]
    dense = {name.removesuffix(".weight"): values for name, values in tensors.items()}
    own = products({name: state.product for name, state in states.items()})
    want = logits_by_hand(base_folder, own, side_products(states), dense)
    without = logits_by_hand(base_folder, own, side_products(states))
    assert (want - without).abs().max() > 0.1, "the dense tensors must matter for this test"
    torch.testing.assert_close(logits_by_peft(base_folder, folder), want, rtol=1e-4, atol=1e-4)


def test_a_bfloat16_base_is_read_for_its_dense_tensors(
    tmp_path: Path, base_folder: Path, finished
) -> None:
    half = tmp_path / "half"
    load(base_folder, torch.bfloat16).save_pretrained(half)
    run, files, blobs, _, tensors = finished("fedit", dense=("lm_head",))
    bundles, dense = global_adapter(
        run.spec,
        make("fedit", MethodOptions(rank=RANK)),
        StateReader(run.spec, {r: _file(blobs, b) for r, b in files.items()}),
    )
    folder = export_peft(run.spec, bundles, tmp_path / "adapter", "tiny", dense, half)
    got = load_file(folder / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    base = load(half, torch.bfloat16).lm_head.weight.float().detach().numpy()
    np.testing.assert_array_equal(got, base + tensors["lm_head.weight"])


@pytest.mark.parametrize(("method", "side", "core"), [("fedit", 0, False), ("flora", 7, False),
                                                      ("fed-sb", 0, True)])  # fmt: skip
def test_every_form_is_of_the_same_model(
    tmp_path: Path, base_folder: Path, finished, method: str, side: int, core: bool
) -> None:
    """A branch and a core are in merged weights and the GGUF file as in the PEFT folder."""
    gguf = pytest.importorskip("gguf")
    run, files, blobs, states, _ = finished(method, side=side, core=core)
    said = {
        form: export_run(run, 3, files, blobs, Wanted(tmp_path / form, form))
        for form in ("peft", "merged", "gguf")
    }
    assert f"{len(states)} tensors changed" in said["merged"]
    want = logits_by_peft(base_folder, tmp_path / "peft")
    with torch.no_grad():
        got = load(tmp_path / "merged", torch.float32)(input_ids=IDS).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    found = gguf.GGUFReader(tmp_path / "gguf")
    assert found.get_field("sketchfleet.rounds").contents() == 3
    tensors = {t.name: t.data for t in found.tensors}
    a, b = (tensors[f"blk.1.ffn_down.weight.lora_{x}"] for x in "ab")
    assert len(a) == RANK + side
    state = states["model.layers.1.mlp.down_proj"]
    whole = state.product.dense() + (state.side.dense() if state.side else 0)
    alpha = found.get_field("adapter.lora.alpha").contents()
    np.testing.assert_allclose(alpha / len(a) * b @ a, whole, atol=1e-5)


def _file(blobs: BlobStore, blob):
    from coordinator.state import StateFile

    return StateFile(blobs.path(blob.digest), blob.payload)


def test_a_model_that_is_partly_at_home_is_not_exported_from_here(tmp_path: Path, finished) -> None:
    run, files, blobs, _, _ = finished("fedsa-lora")
    with pytest.raises(
        ExportError, match=r"fedsa-lora keeps up on the devices.*`sketchfleet-agent"
    ):
        export(run, files, blobs, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_dense_tensors_need_the_runs_own_base(tmp_path: Path, finished) -> None:
    spec = finished("fedit", dense=("lm_head",))[0].spec
    adapter = make_adapter(spec)
    dense = {"lm_head.weight": np.zeros((64, HIDDEN), np.float32)}
    with pytest.raises(ExportError, match="the base's own weights are needed"):
        export_peft(spec, adapter, tmp_path / "adapter", "tiny", dense)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ModelError, match=r"holds no tensor lm_head\.weight; is it the run's base"):
        export_peft(spec, adapter, tmp_path / "adapter", "tiny", dense, other)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blobs", "other"]
