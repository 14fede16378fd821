import json
from pathlib import Path

import numpy as np
import pytest

from coordinator.export import ExportError, export_peft
from coordinator.lowrank import Bundle
from profiles.model import ModuleShape
from protos.contract import AdapterSpec

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


def load(folder: Path, dtype):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def logits_by_hand(base_folder: Path, adapter: dict[str, Bundle]):
    model = load(base_folder, torch.float32)
    with torch.no_grad():
        for name, b in adapter.items():
            model.get_submodule(name).weight += torch.from_numpy(b.scale * b.up.T @ b.down)
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
    want = logits_by_hand(base_folder, adapter)
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
