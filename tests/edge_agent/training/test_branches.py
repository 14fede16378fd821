"""What stands beside the base acts as if it were in it, and is gone without a trace."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_agent.training.backbone import load_base
from edge_agent.training.batches import whole_rows
from edge_agent.training.branches import DenseDelta, SliceError, dense_deltas, side_branch
from edge_agent.training.loss import next_token_loss
from edge_agent.training.optimizers import make_optimizer
from edge_agent.training.slice import attached, read_parts, write_parts
from edge_agent.training.steps import train_step
from edge_agent.training.workbench import Workbench
from profiles.model import ModuleShape
from protos.contract import AdapterSpec
from tests.edge_agent.training.rounds import HEAD, NORM, make_adapter

CPU = torch.device("cpu")
ROWS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base(bench: Workbench, base_folder: Path, spec: AdapterSpec):
    return bench.base(base_folder, "fp32", spec)


def bits_of(model) -> dict[str, torch.Tensor]:
    return {name: values.clone() for name, values in model.state_dict().items()}


def same_bits(model, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[n], v) for n, v in before.items())


# --- the frozen branch --------------------------------------------------------------------------


def test_a_branch_equals_its_product_added_to_the_weights(base, spec: AdapterSpec) -> None:
    side, adapter = make_adapter(spec, 5, seed=1), make_adapter(spec, 2, seed=2)
    merged = copy.deepcopy(base.model)
    for name, parts in side.items():
        added = torch.from_numpy(parts["up"].T @ parts["down"])
        merged.get_submodule(name).weight.data += added
    found = []
    with side_branch(base.model, side, torch.float32):
        found.append(gradients(base.model, spec, adapter))
    found.append(gradients(merged, spec, adapter))
    for (name, got), (_, want) in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5, msg=name)


def gradients(model, spec: AdapterSpec, adapter) -> list[tuple[str, torch.Tensor]]:
    """The loss and the gradient of every adapter parameter."""
    with attached(model, spec, 2, alpha=16.0) as peft_model:
        write_parts(peft_model, adapter)
        peft_model.train()
        loss = next_token_loss(peft_model, whole_rows(ROWS.numpy()))
        loss.backward()
        trained = [(n, p.grad) for n, p in peft_model.named_parameters() if p.requires_grad]
    return [("loss", loss.detach()), *trained]


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_gradients_flow_through_a_branch_beside_quantised_layers(
    base_folder: Path, spec: AdapterSpec, precision
) -> None:
    quantised = load_base(base_folder, precision, CPU)
    side, adapter = make_adapter(spec, 3, seed=1), make_adapter(spec, 2, seed=2)
    alone = gradients(quantised.model, spec, adapter)
    found = []
    for checkpointing in (False, True):
        with side_branch(quantised.model, side, quantised.compute_dtype):
            quantised.checkpointing(checkpointing)
            try:
                found.append(gradients(quantised.model, spec, adapter))
            finally:
                quantised.checkpointing(False)
    for (name, plain), (_, again), (_, without) in zip(*found, alone, strict=True):
        assert torch.isfinite(plain).all() and plain.any(), name
        torch.testing.assert_close(plain, again, msg=f"{name} when computed again")
        assert not torch.allclose(plain, without, rtol=1e-3), f"{name} does not see the branch"


def test_a_branch_adds_its_product_to_a_quantised_layer(
    base_folder: Path, spec: AdapterSpec
) -> None:
    quantised = load_base(base_folder, "nf4", CPU)
    module = spec.modules[0]
    parts = make_adapter(spec, 3)[module.name]
    layer = quantised.model.get_submodule(module.name)
    x = torch.randn(4, module.in_features, dtype=quantised.compute_dtype, requires_grad=True)
    with torch.no_grad():
        alone = layer(x)
    with side_branch(quantised.model, {module.name: parts}, torch.float32):
        beside = layer(x)
    added = torch.from_numpy(parts["up"].T @ parts["down"])
    torch.testing.assert_close((beside - alone).float(), x.float() @ added.T, rtol=1e-2, atol=1e-2)
    beside.sum().backward()
    assert x.grad is not None and x.grad.any()


def test_a_branch_is_gone_afterwards_and_after_an_error(base, spec: AdapterSpec) -> None:
    before, bits = base.model(input_ids=ROWS).logits, bits_of(base.model)
    side = make_adapter(spec, 3)
    with side_branch(base.model, side, torch.float32):
        assert not torch.equal(base.model(input_ids=ROWS).logits, before)
    with pytest.raises(MemoryError), side_branch(base.model, side, torch.float32):
        raise MemoryError
    broken = side | {spec.modules[-1].name: make_adapter(spec, 3)[spec.modules[3].name]}
    with pytest.raises(SliceError), side_branch(base.model, broken, torch.float32):
        pass
    assert torch.equal(base.model(input_ids=ROWS).logits, before)
    assert same_bits(base.model, bits)
    assert not any(m._forward_hooks for m in base.model.modules())


def test_a_branch_of_another_base_is_named(base, spec: AdapterSpec) -> None:
    side = make_adapter(spec, 3)
    name = spec.modules[0].name
    with (
        pytest.raises(SliceError, match="has no up and down"),
        side_branch(base.model, {name: {"up": side[name]["up"]}}, torch.float32),
    ):
        pass
    with (
        pytest.raises(SliceError, match="no module elsewhere"),
        side_branch(base.model, {"elsewhere": side[name]}, torch.float32),
    ):
        pass


# --- tensors trained whole ----------------------------------------------------------------------


@pytest.mark.parametrize("tensor", [NORM, HEAD])
def test_a_difference_trains_as_the_tensor_itself_would(base, spec: AdapterSpec, tensor) -> None:
    """The head is tied to the embeddings here; trained whole it moves alone."""
    steps, lr = 3, 0.5
    reference = copy.deepcopy(base.model)
    owner = reference.get_submodule(tensor.name.rpartition(".")[0])
    owner.weight = torch.nn.Parameter(owner.weight.detach().clone())
    started = owner.weight.detach().clone()
    optimizer = make_optimizer("sgd", reference, lr)
    for _ in range(steps):
        train_step(reference.train(), optimizer, [whole_rows(ROWS.numpy())])

    whole = replace(spec, dense=(tensor,))
    nothing = {
        name: {part: np.zeros_like(values) for part, values in parts.items()}
        for name, parts in make_adapter(whole, 2, parts=("up", "down", "dense")).items()
    }
    with attached(base.model, whole, 2, alpha=16.0, trained=("dense",)) as model:
        write_parts(model, nothing)
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert len(trained) == 1 and tensor.name.split(".")[-2] in trained[0]
        optimizer = make_optimizer("sgd", model, lr)
        for _ in range(steps):
            train_step(model.train(), optimizer, [whole_rows(ROWS.numpy())])
        delta = read_parts(model)[tensor.name]["dense"]
    want = (owner.weight.detach() - started).reshape(delta.shape)
    assert want.abs().max() > 1e-3
    torch.testing.assert_close(torch.from_numpy(delta), want, rtol=1e-3, atol=1e-6)


def test_the_base_is_bit_for_bit_what_it_was_after_tensors_were_trained(
    base, spec: AdapterSpec
) -> None:
    tensors = (NORM, HEAD)
    bits = bits_of(base.model)
    held = [id(base.model.get_parameter(t.name)) for t in tensors]
    kinds = [type(m) for m in base.model.modules()]
    whole = replace(spec, dense=tensors)
    for error in (None, MemoryError):
        try:
            with attached(base.model, whole, 2, alpha=16.0, trained=("dense",)) as model:
                optimizer = make_optimizer("sgd", model, 1.0)
                train_step(model.train(), optimizer, [whole_rows(ROWS.numpy())])
                if error is not None:
                    raise error
        except MemoryError:
            pass
        assert same_bits(base.model, bits)
        assert [id(base.model.get_parameter(t.name)) for t in tensors] == held
        assert [type(m) for m in base.model.modules()] == kinds
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight, "still tied"
    assert not any(p.requires_grad for p in base.model.parameters())


def test_steps_too_small_for_bfloat16_add_up_in_a_difference() -> None:
    weight = torch.ones(4, dtype=torch.bfloat16)  # the next number is 1.0078
    difference = DenseDelta("norm.weight", weight)
    optimizer = torch.optim.SGD([difference.delta], lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        (-difference(weight).float().sum()).backward()
        optimizer.step()
    torch.testing.assert_close(difference.delta.detach(), torch.full((4,), 0.01))
    assert (difference(weight) > weight).all()
    assert torch.equal(weight, torch.ones(4, dtype=torch.bfloat16))


def test_tensors_that_cannot_be_trained_whole_are_named(
    base, base_folder: Path, spec: AdapterSpec
) -> None:
    bits = bits_of(base.model)
    for wrong, words in (
        (ModuleShape("model.nothing.weight", 1, 4), "no tensor model.nothing.weight"),
        (replace(NORM, in_features=9), r"\(1, 64\) in the base model, \(1, 9\) in the run"),
    ):
        with (
            pytest.raises(SliceError, match=words),
            dense_deltas(base.model, (HEAD, wrong)),
        ):
            pass
        assert same_bits(base.model, bits), "what was changed before is undone"
    quantised = load_base(base_folder, "nf4", CPU)
    module = spec.modules[0]
    weight = ModuleShape(f"{module.name}.weight", module.out_features, module.in_features)
    with pytest.raises(SliceError, match="quantised"), dense_deltas(quantised.model, (weight,)):
        pass
    with dense_deltas(quantised.model, (NORM,)):
        assert quantised.model(input_ids=ROWS).logits.isfinite().all()
