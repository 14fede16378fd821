"""The loss is the stock one, of the tokens that count, with documents apart and no whole logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from edge_agent.training import loss as loss_module
from edge_agent.training import steps
from edge_agent.training.batches import positions_of, to_batch, whole_rows
from edge_agent.training.loss import CHUNK_TOKENS, count_next_tokens, next_token_loss
from edge_agent.training.rows import Rows
from edge_agent.training.slice import attached
from edge_agent.training.workbench import Workbench
from protos.contract import AdapterSpec
from tests.edge_agent.training.rounds import HEAD

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Mistral": {"sliding_window": 7},
    "Starcoder2": {"sliding_window": 5},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.25},
    "Gemma2": {"sliding_window": 6, "head_dim": 8},  # caps its logits
}


def make_model(family: str, attention: str = "") -> Any:
    """A random model in which one tensor may be trained."""
    torch.manual_seed(0)
    known = {"attn_implementation": attention} if attention else {}
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family], **known)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.requires_grad_(False)
    trained(model).requires_grad_(True)
    return model


def trained(model: Any) -> torch.Tensor:
    weight: torch.Tensor = model.get_decoder().layers[0].self_attn.v_proj.weight
    return weight


def draw_tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 250, size=shape, dtype=np.int64)


def packed(lengths: list[list[int]]) -> Rows:
    """Rows of documents of these lengths; all but their first tokens count."""
    document = np.array(
        [np.repeat(np.arange(len(row)), row) for row in lengths], dtype=np.int32
    )  # fmt: skip
    counted = np.ones(document.shape, dtype=np.bool_)
    counted[:, 0] = False
    counted[:, 1:] &= document[:, 1:] == document[:, :-1]
    return Rows(draw_tokens(*document.shape), document, counted)


def gradient_of(model: Any, value: torch.Tensor) -> torch.Tensor:
    weight = trained(model)
    weight.grad = None
    value.backward()
    assert weight.grad is not None
    return weight.grad.clone()


@pytest.mark.parametrize("shape", [(1, 2), (3, 40), (2, CHUNK_TOKENS + 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_where_everything_counts_it_is_the_stock_loss(family: str, shape: Any) -> None:
    model, tokens = make_model(family), draw_tokens(*shape)
    ids = torch.from_numpy(tokens)
    stock = model(input_ids=ids, labels=ids).loss
    ours = next_token_loss(model, whole_rows(tokens))
    torch.testing.assert_close(ours, stock, rtol=1e-6, atol=1e-6)
    wanted = gradient_of(model, stock)
    torch.testing.assert_close(
        gradient_of(model, ours), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())
    )
    found = count_next_tokens(model, whole_rows(tokens))
    assert found.nats.sum() / found.tokens.sum() == pytest.approx(float(stock.detach()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_the_stock_loss_too(dtype: torch.dtype) -> None:
    model, tokens = make_model("Llama").to(dtype), draw_tokens(2, 30)
    ids = torch.from_numpy(tokens)
    stock = model(input_ids=ids, labels=ids).loss
    ours = next_token_loss(model, whole_rows(tokens))
    torch.testing.assert_close(ours, stock.float(), rtol=1e-3, atol=1e-3)
    wanted = gradient_of(model, stock).float()
    got = gradient_of(model, ours).float()
    assert float((got - wanted).norm() / wanted.norm()) < 0.03


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Mistral", "Starcoder2", "Gemma2"])
def test_a_packed_document_is_what_it_is_alone(family: str, attention: str) -> None:
    if family == "Gemma2" and attention == "sdpa":
        pytest.skip("has no such attention")
    model, rows = make_model(family, attention), packed([[13, 1, 26], [30, 10, 0]])
    with torch.no_grad():
        batch = to_batch(rows, CPU)
        decoder = model.get_decoder()
        together = decoder(
            input_ids=batch.tokens, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
        for row, documents in enumerate(rows.document):
            for document in np.unique(documents):
                where = np.flatnonzero(documents == document)
                alone = decoder(input_ids=batch.tokens[row : row + 1, where], use_cache=False)
                torch.testing.assert_close(
                    model.lm_head(together[row, where]),
                    model.lm_head(alone.last_hidden_state[0]),
                    rtol=0, atol=1e-5,
                )  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_a_packed_row_has_the_mean_loss_of_its_documents(family: str, checkpointing: bool) -> None:
    model, lengths = make_model(family), [13, 9, 18]
    rows = packed([lengths])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()
    together = next_token_loss(model, rows)
    got = gradient_of(model, together)
    alone, wanted, begin = 0.0, torch.zeros_like(got), 0
    for length in lengths:
        tokens = rows.tokens[:, begin : begin + length]
        value = next_token_loss(model, whole_rows(tokens)) * (length - 1) / (sum(lengths) - 3)
        alone += float(value.detach())
        wanted += gradient_of(model, value)
        begin += length
    assert float(together.detach()) == pytest.approx(alone, rel=1e-6)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_rows_laid_end_to_end_are_the_same_rows() -> None:
    """As flash attention wants them, which cannot run here."""
    model, rows = make_model("Mistral"), packed([[13, 1, 26], [30, 6, 4]])
    batch = to_batch(rows, CPU)
    with torch.no_grad():
        apart, flat = (batch.hidden_states(model.get_decoder(), flash) for flash in (False, True))
    torch.testing.assert_close(apart, flat, rtol=0, atol=1e-5)


def test_positions_begin_anew_with_every_document() -> None:
    document = np.array([[0, 0, 0, 1, 2, 2], [0, 0, 0, 0, 0, 0]], dtype=np.int32)
    assert positions_of(document).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]]


def test_one_document_and_padding_need_no_mask() -> None:
    rows = packed([[20, 5]])
    assert to_batch(rows, CPU).positions is not None
    rows.counted[:, 20:] = False
    assert to_batch(rows, CPU).positions is None
    assert to_batch(whole_rows(draw_tokens(2, 9)), CPU).positions is None


def test_what_does_not_count_never_meets_the_output_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = make_model("Llama"), whole_rows(draw_tokens(2, 20))
    rows.counted[:, :15] = False
    ids = torch.from_numpy(rows.tokens)
    labels = torch.where(torch.from_numpy(rows.counted), ids, -100)
    stock = model(input_ids=ids, labels=labels).loss
    seen: list[int] = []
    product = torch.mm

    def noted(one: torch.Tensor, other: torch.Tensor, **out: Any) -> torch.Tensor:
        seen.append(len(one))
        return product(one, other, **out)

    monkeypatch.setattr(loss_module.torch, "mm", noted)
    ours = next_token_loss(model, rows)
    assert seen == [10, 10], "five tokens of each row, there and back"
    assert count_next_tokens(model, rows).tokens.tolist() == [5, 5]
    torch.testing.assert_close(ours, stock)
    torch.testing.assert_close(gradient_of(model, ours), gradient_of(model, stock))


def test_where_nothing_counts_the_loss_is_zero_with_zero_gradients() -> None:
    model, rows = make_model("Llama"), whole_rows(draw_tokens(1, 8))
    rows.counted[:] = False
    for head_trains in (False, True):
        model.lm_head.weight.requires_grad_(head_trains)
        value = next_token_loss(model, rows)
        assert float(value.detach()) == 0
        assert not gradient_of(model, value).any()
    found = count_next_tokens(model, rows)
    assert (found.nats.tolist(), found.right, found.tokens.tolist()) == ([0.0], 0, [0])


def test_a_head_that_is_trained_gets_its_gradient(
    bench: Workbench, base_folder: Path, spec: AdapterSpec
) -> None:
    base = bench.base(base_folder, "fp32", spec)
    whole = replace(spec, dense=(HEAD,))
    tokens = draw_tokens(2, CHUNK_TOKENS)
    ids = torch.from_numpy(tokens)
    with attached(base.model, whole, 2, alpha=16.0, trained=("up", "dense")) as model:
        grads = []
        for value in (next_token_loss(model, whole_rows(tokens)),
                      model(input_ids=ids, labels=ids).loss):  # fmt: skip
            model.zero_grad()
            value.backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert any(g.shape == (264, 64) for g in grads[0])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_a_head_that_something_hangs_on_is_called_as_a_module() -> None:
    """A side branch or an adapter on the head must not be passed by."""
    model, rows = make_model("Llama"), whole_rows(draw_tokens(1, 12))
    before = float(next_token_loss(model, rows).detach())
    handle = model.lm_head.register_forward_hook(lambda _m, _i, out: 3 * out)
    try:
        assert abs(float(next_token_loss(model, rows).detach()) - before) > 1e-3
    finally:
        handle.remove()
    assert float(next_token_loss(model, rows).detach()) == before


def test_confident_predictions_keep_their_precision() -> None:
    """Where the right token has nearly all the weight, its loss is small and not zero."""
    model, rows = make_model("Llama"), whole_rows(draw_tokens(1, 12))
    model.lm_head.weight.mul_(200)
    ids = torch.from_numpy(rows.tokens)
    stock = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(next_token_loss(model, rows), stock, rtol=1e-5, atol=1e-5)
    assert np.isfinite(count_next_tokens(model, rows).nats).all()


def test_micro_batches_weigh_as_many_tokens_as_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step over several is a step over all of their rows at once."""
    model, rows = make_model("Llama"), whole_rows(draw_tokens(4, 20))
    rows.counted[1:3, :15] = False
    monkeypatch.setattr(steps, "CLIP_NORM", 1e9)
    found = []
    for batches in ([rows], [rows.take(slice(0, 1)), rows.take(slice(1, 4))]):
        optimizer = torch.optim.SGD([trained(model)], lr=0.0)
        value = steps.train_step(model, optimizer, batches)
        grad = trained(model).grad
        assert grad is not None
        found.append((value, grad.clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-7)
