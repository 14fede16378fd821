from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_agent.training.backbone import BackboneError, compute_dtype, load_base
from edge_agent.training.batches import whole_rows
from edge_agent.training.branches import SliceError
from edge_agent.training.optimizers import make_optimizer
from edge_agent.training.slice import (
    attached,
    read_parts,
    subtract,
    trained_parameters,
    write_parts,
)
from edge_agent.training.steps import train_step
from edge_agent.training.workbench import Workbench
from profiles.model import ModuleShape
from protos.contract import AdapterSpec
from protos.layout import Parts
from tests.edge_agent.training.rounds import make_adapter

ROWS = torch.arange(24).reshape(2, 12)
ALPHA = 16.0


@pytest.fixture
def model(bench: Workbench, base_folder: Path, spec: AdapterSpec):
    return bench.base(base_folder, "fp32", spec).model


def names_of(model) -> list[str]:
    return [name for name, _ in model.named_modules()]


def test_parts_come_back_as_they_were_written(model, spec: AdapterSpec) -> None:
    adapter = make_adapter(spec, 3, parts=("up", "down", "core"))
    with attached(model, spec, 3, alpha=ALPHA, core=True) as peft_model:
        write_parts(peft_model, adapter)
        found = read_parts(peft_model)
    assert list(found) == [m.name for m in spec.modules], "wire order"
    for name, parts in adapter.items():
        assert found[name].keys() == parts.keys()
        for part, values in parts.items():
            np.testing.assert_array_equal(found[name][part], values)


def added(parts: Parts, scale: float) -> torch.Tensor:
    """scale * up' core down."""
    inner = parts["core"] @ parts["down"] if "core" in parts else parts["down"]
    return torch.from_numpy(scale * parts["up"].T @ inner)


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("k", [2, 8])
def test_the_adapter_adds_scale_up_core_down(
    model, spec: AdapterSpec, k: int, rslora: bool, core: bool
) -> None:
    spec = replace(spec, use_rslora=rslora)
    adapter = make_adapter(spec, k, parts=("up", "down", "core") if core else ("up", "down"))
    alpha = 12.0  # of the device's adapter, whatever the run's own is
    with attached(model, spec, k, alpha=alpha, core=core) as peft_model, torch.no_grad():
        write_parts(peft_model, adapter)
        got = peft_model(input_ids=ROWS).logits
    kept = {n: p.clone() for n, p in model.state_dict().items()}
    with torch.no_grad():
        for name, parts in adapter.items():
            model.get_submodule(name).weight += added(parts, alpha / spec.divisor(k))
        want = model(input_ids=ROWS).logits
        model.load_state_dict(kept)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_a_core_is_that_of_the_dense_product(model, spec: AdapterSpec) -> None:
    """dW = s up' R down, so that dL/dR = s up G down' with G = dL/dW."""
    adapter = make_adapter(spec, 3, parts=("up", "down", "core"))
    name = spec.modules[0].name
    with attached(model, spec, 3, alpha=ALPHA, trained=("core",), core=True) as peft_model:
        write_parts(peft_model, adapter)
        trained = [(n, p) for n, p in peft_model.named_parameters() if p.requires_grad]
        assert all(p.shape == (3, 3) for _, p in trained) and len(trained) == len(spec.modules)
        peft_model(input_ids=ROWS, labels=ROWS).loss.backward()
        got = next(p.grad.clone() for n, p in trained if f".{name}." in f".{n}")
    kept = {n: p.clone() for n, p in model.state_dict().items()}
    with torch.no_grad():
        for other, parts in adapter.items():
            model.get_submodule(other).weight += added(parts, ALPHA / 3)
    weight = model.get_submodule(name).weight.requires_grad_(True)
    model(input_ids=ROWS, labels=ROWS).loss.backward()
    up, down = (torch.from_numpy(adapter[name][part]) for part in ("up", "down"))
    want = ALPHA / 3 * up @ weight.grad @ down.T
    weight.requires_grad_(False).grad = None
    model.load_state_dict(kept)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("trained", [("up",), ("down",), ("core",), ("up", "core")])
def test_only_the_trained_parts_move_and_only_they_are_in_the_optimiser(
    model, spec: AdapterSpec, trained
) -> None:
    adapter = make_adapter(spec, 2, parts=("up", "down", "core"))
    with attached(model, spec, 2, alpha=ALPHA, trained=trained, core=True) as peft_model:
        write_parts(peft_model, adapter)
        optimizer = make_optimizer("adamw", peft_model, 1e-2)
        held = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        assert held == trained_parameters(peft_model)
        assert held == sum(adapter[m.name][p].size for m in spec.modules for p in trained)
        train_step(peft_model.train(), optimizer, [whole_rows(ROWS.numpy())])
        found = read_parts(peft_model)
    for name, parts in found.items():
        for part, values in parts.items():
            same = np.array_equal(values, adapter[name][part])
            assert same == (part not in trained), f"{name} {part}"


def test_switching_between_slice_and_whole_leaves_the_base_as_it_was(
    model, spec: AdapterSpec
) -> None:
    names = names_of(model)
    with torch.no_grad():
        before = model(input_ids=ROWS).logits
        for k, core in ((2, False), (spec.rank, True), (2, True)):
            parts = ("up", "down", "core") if core else ("up", "down")
            with attached(model, spec, k, alpha=ALPHA, core=core) as peft_model:
                write_parts(peft_model, make_adapter(spec, k, parts=parts))
                assert not torch.equal(peft_model(input_ids=ROWS).logits, before)
        after = model(input_ids=ROWS).logits
    assert torch.equal(before, after)
    assert names_of(model) == names, "adapters are freed"


def test_an_error_inside_leaves_the_base_as_it_was(model, spec: AdapterSpec) -> None:
    names = names_of(model)
    with pytest.raises(MemoryError), attached(model, spec, 2, alpha=ALPHA, core=True):
        raise MemoryError
    assert names_of(model) == names


def test_a_device_of_size_k_trains_k_of_r_of_the_adapter(model, spec: AdapterSpec) -> None:
    whole = spec.rank * spec.parameters_per_rank
    for k in (1, 3, spec.rank):
        with attached(model, spec, k, alpha=ALPHA) as peft_model:
            assert trained_parameters(peft_model) * spec.rank == whole * k
            dtypes = {p.dtype for p in peft_model.parameters() if p.requires_grad}
            assert dtypes == {torch.float32}


def test_adapters_stay_float32_on_a_bfloat16_base(base_folder: Path, spec: AdapterSpec) -> None:
    base = load_base(base_folder, "fp32", torch.device("cpu")).model.to(torch.bfloat16)
    adapter = make_adapter(spec, 2, parts=("up", "down", "core"))
    with attached(base, spec, 2, alpha=ALPHA, core=True) as peft_model:
        write_parts(peft_model, adapter)
        found = read_parts(peft_model)[spec.modules[0].name]
        for part in ("up", "down", "core"):
            np.testing.assert_array_equal(found[part], adapter[spec.modules[0].name][part])
        assert peft_model(input_ids=ROWS).logits.dtype == torch.bfloat16


def test_missing_unknown_and_misshapen_values_are_named(model, spec: AdapterSpec) -> None:
    adapter = make_adapter(spec, 2)
    first = spec.modules[0].name
    with attached(model, spec, 2, alpha=ALPHA) as peft_model:
        with pytest.raises(SliceError, match="lacks 1 modules"):
            write_parts(peft_model, {n: p for n, p in adapter.items() if n != first})
        with pytest.raises(SliceError, match="unknown here, first other"):
            write_parts(peft_model, adapter | {"other": adapter[first]})
        with pytest.raises(SliceError, match=first):
            write_parts(peft_model, adapter | {first: make_adapter(spec, 3)[first]})
        with pytest.raises(SliceError, match=first):
            write_parts(peft_model, adapter | {first: {"up": adapter[first]["up"]}})


def test_a_base_of_another_shape_is_named(model, spec: AdapterSpec) -> None:
    absent = replace(spec, modules=(ModuleShape("model.layers.9.mlp.up_proj", 4, 4),))
    with pytest.raises(SliceError, match="no module"), attached(model, absent, 2, alpha=ALPHA):
        pass
    wrong = replace(spec, modules=(replace(spec.modules[0], out_features=7),))
    with pytest.raises(SliceError, match="in the run"), attached(model, wrong, 2, alpha=ALPHA):
        pass


def test_subtract_is_what_training_added_to_the_parts_asked_for(spec: AdapterSpec) -> None:
    one, two = make_adapter(spec, 2, seed=1), make_adapter(spec, 2, seed=2)
    name = spec.modules[0].name
    added_to_up = subtract(two, one, ("up",))
    assert added_to_up[name].keys() == {"up"}
    np.testing.assert_array_equal(added_to_up[name]["up"], two[name]["up"] - one[name]["up"])


def test_a_folder_that_does_not_load_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(BackboneError, match="cannot be loaded as fp32"):
        load_base(tmp_path, "fp32", torch.device("cpu"))


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", None])
def test_a_processor_without_bf16_units_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch, base_folder: Path, flag: str | None
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True} | {flag: True})
    wanted = torch.float32 if flag is None else torch.bfloat16
    cpu = torch.device("cpu")
    assert compute_dtype(cpu) == wanted
    assert load_base(base_folder, "bf16", cpu).model.dtype == wanted, "upcast, said so in the docs"
    assert load_base(base_folder, "fp32", cpu).model.dtype == torch.float32
