from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_agent.training.backbone import BackboneError, compute_dtype, load_base
from edge_agent.training.slice import (
    SliceError,
    attached,
    read_factors,
    subtract,
    trained_parameters,
    write_factors,
)
from edge_agent.training.workbench import Workbench
from profiles.model import ModuleShape
from protos.contract import AdapterSpec
from protos.packing import Factors

ROWS = torch.arange(24).reshape(2, 12)


def make_factors(spec: AdapterSpec, k: int, seed: int = 0) -> dict[str, Factors]:
    draw = np.random.default_rng(seed)
    return {
        m.name: Factors(
            up=draw.normal(size=(k, m.out_features)).astype(np.float32) * 0.1,
            down=draw.normal(size=(k, m.in_features)).astype(np.float32) * 0.1,
        )
        for m in spec.modules
    }


@pytest.fixture
def model(bench: Workbench, base_folder: Path, spec: AdapterSpec):
    return bench.base(base_folder, "fp32", spec).model


def test_factors_come_back_as_they_were_written(model, spec: AdapterSpec) -> None:
    factors = make_factors(spec, 3)
    with attached(model, spec, 3) as peft_model:
        write_factors(peft_model, factors)
        found = read_factors(peft_model)
    assert list(found) == [m.name for m in spec.modules], "wire order"
    for name, f in factors.items():
        np.testing.assert_array_equal(found[name].up, f.up)
        np.testing.assert_array_equal(found[name].down, f.down)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("k", [2, 8])
def test_the_adapter_adds_scale_up_down(model, spec: AdapterSpec, k: int, rslora: bool) -> None:
    spec = replace(spec, use_rslora=rslora)
    factors = make_factors(spec, k)
    with attached(model, spec, k) as peft_model, torch.no_grad():
        write_factors(peft_model, factors)
        got = peft_model(input_ids=ROWS).logits
    kept = {n: p.clone() for n, p in model.state_dict().items()}
    with torch.no_grad():
        for name, f in factors.items():
            delta = spec.scale(k) * f.up.T @ f.down
            model.get_submodule(name).weight += torch.from_numpy(delta)
        want = model(input_ids=ROWS).logits
        model.load_state_dict(kept)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_switching_between_slice_and_whole_leaves_the_base_as_it_was(
    model, spec: AdapterSpec
) -> None:
    names = [n for n, _ in model.named_modules()]
    with torch.no_grad():
        before = model(input_ids=ROWS).logits
        for k in (2, spec.rank, 2):
            with attached(model, spec, k) as peft_model:
                write_factors(peft_model, make_factors(spec, k))
                assert not torch.equal(peft_model(input_ids=ROWS).logits, before)
        after = model(input_ids=ROWS).logits
    assert torch.equal(before, after)
    assert [n for n, _ in model.named_modules()] == names, "adapters are freed"


def test_an_error_inside_leaves_the_base_as_it_was(model, spec: AdapterSpec) -> None:
    names = [n for n, _ in model.named_modules()]
    with pytest.raises(MemoryError), attached(model, spec, 2):
        raise MemoryError
    assert [n for n, _ in model.named_modules()] == names


def test_a_device_of_size_k_trains_k_of_r_of_the_adapter(model, spec: AdapterSpec) -> None:
    whole = spec.rank * spec.parameters_per_rank
    for k in (1, 3, spec.rank):
        with attached(model, spec, k) as peft_model:
            assert trained_parameters(peft_model) * spec.rank == whole * k
            dtypes = {p.dtype for p in peft_model.parameters() if p.requires_grad}
            assert dtypes == {torch.float32}


def test_adapters_stay_float32_on_a_bfloat16_base(base_folder: Path, spec: AdapterSpec) -> None:
    base = load_base(base_folder, "fp32", torch.device("cpu")).model.to(torch.bfloat16)
    with attached(base, spec, 2) as peft_model:
        factors = make_factors(spec, 2)
        write_factors(peft_model, factors)
        name = spec.modules[0].name
        np.testing.assert_array_equal(read_factors(peft_model)[name].up, factors[name].up)


def test_missing_unknown_and_misshapen_factors_are_named(model, spec: AdapterSpec) -> None:
    factors = make_factors(spec, 2)
    first = spec.modules[0].name
    with attached(model, spec, 2) as peft_model:
        with pytest.raises(SliceError, match="lacks 1 modules"):
            write_factors(peft_model, {n: f for n, f in factors.items() if n != first})
        with pytest.raises(SliceError, match="unknown here, first other"):
            write_factors(peft_model, factors | {"other": factors[first]})
        with pytest.raises(SliceError, match=first):
            write_factors(peft_model, factors | {first: make_factors(spec, 3)[first]})


def test_a_base_of_another_shape_is_named(model, spec: AdapterSpec) -> None:
    absent = replace(spec, modules=(ModuleShape("model.layers.9.mlp.up_proj", 4, 4),))
    with pytest.raises(SliceError, match="no module"), attached(model, absent, 2):
        pass
    wrong = replace(spec, modules=(replace(spec.modules[0], out_features=7),))
    with pytest.raises(SliceError, match="in the run"), attached(model, wrong, 2):
        pass


def test_subtract_is_what_training_added(spec: AdapterSpec) -> None:
    one, two = make_factors(spec, 2, 1), make_factors(spec, 2, 2)
    name = spec.modules[0].name
    np.testing.assert_array_equal(subtract(two, one)[name].up, two[name].up - one[name].up)


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
