from pathlib import Path

import numpy as np
import pytest
import torch

from edge_agent.training.backbone import load_base
from edge_agent.training.batches import whole_rows
from edge_agent.training.evaluation import evaluate, measure, spread
from edge_agent.training.loss import CHUNK_TOKENS, next_token_loss
from edge_agent.training.rows import Rows
from edge_agent.training.slice import attached
from edge_agent.training.workbench import Workbench
from protos.contract import MOST_EXAMPLES, AdapterSpec


@pytest.fixture
def base(bench: Workbench, base_folder: Path, spec: AdapterSpec):
    return bench.base(base_folder, "fp32", spec)


def make_rows(sequences: int, tokens: int) -> Rows:
    drawn = np.random.default_rng(0).integers(0, 250, size=(sequences, tokens), dtype=np.int64)
    return whole_rows(drawn)


@pytest.mark.parametrize("shape", [(1, 2), (3, 40), (3, 200)])
def test_the_chunked_loss_is_the_stock_loss(base, spec: AdapterSpec, shape) -> None:
    rows = make_rows(*shape)
    whole = torch.from_numpy(rows.tokens)
    with attached(base.model, spec, 2, alpha=spec.alpha) as model:
        model.train()
        stock = model(input_ids=whole, labels=whole).loss
        stock.backward()
        wanted = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        chunked = next_token_loss(model, rows)
        chunked.backward()
        got = [p.grad for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(chunked, stock)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_checkpointed_layers_give_the_same_gradients(base, spec: AdapterSpec) -> None:
    rows = make_rows(2, 64)
    grads = []
    with attached(base.model, spec, 2, alpha=spec.alpha) as model:
        for checkpointing in (False, True, False):
            base.checkpointing(checkpointing)
            model.train()
            model.zero_grad()
            next_token_loss(model, rows).backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for a, b, c in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(a, c)


def test_evaluation_equals_the_stock_loss_and_counts_right_tokens(base) -> None:
    rows = make_rows(5, 2 * CHUNK_TOKENS // 3)
    whole = torch.from_numpy(rows.tokens)
    with torch.no_grad():
        logits = base.model(input_ids=whole).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), whole[:, 1:].reshape(-1)
        )
        right = (logits.argmax(-1) == whole[:, 1:]).float().mean()
    got = evaluate(base.model, rows, micro_batch=2)
    assert got.tokens == 5 * (rows.length - 1)
    assert got.loss == pytest.approx(float(loss), rel=1e-5)
    assert got.token_accuracy == pytest.approx(float(right), abs=1e-6)


def test_evaluation_does_not_depend_on_the_micro_batch(base) -> None:
    rows = make_rows(5, 30)
    one, many = evaluate(base.model, rows, 1), evaluate(base.model, rows, 8)
    assert one.loss == pytest.approx(many.loss, rel=1e-6)
    assert one.tokens == many.tokens


def test_each_row_has_the_loss_it_has_alone(base) -> None:
    rows = make_rows(3, 30)
    rows.counted[1, 20:] = False
    found = evaluate(base.model, rows, micro_batch=2)
    for i in range(3):
        alone = evaluate(base.model, rows.take(slice(i, i + 1)), 1)
        assert found.row_nats[i] == pytest.approx(alone.loss * alone.tokens, rel=1e-5)
        assert found.row_tokens[i] == alone.tokens == (19 if i == 1 else 29)


def test_losses_of_rows_are_told_of_the_adapter_that_all_devices_share(base) -> None:
    asked = {"micro_batch": 64, "completions": 0, "problems": None, "seed": 1}
    rows = make_rows(MOST_EXAMPLES + 60, 4)
    told = measure(base, base.model, rows, "global", "received", **asked)
    assert len(told.example_millinats) == len(told.example_tokens) == MOST_EXAMPLES
    few = measure(base, base.model, rows.take(slice(5)), "global", "received", **asked)
    total = sum(few.example_millinats) / 1000
    assert total / sum(few.example_tokens) == pytest.approx(few.loss, abs=1e-3)
    own = measure(base, base.model, rows, "slice", "received", **asked)
    assert own.example_millinats == own.example_tokens == ()


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_gradients_on_a_quantised_base_are_the_same_after_an_evaluation(
    base_folder: Path, spec: AdapterSpec, precision
) -> None:
    """bitsandbytes repacks 4-bit weights in evaluation, and no gradient passes packed ones."""
    quantised = load_base(base_folder, precision, torch.device("cpu"))
    rows, grads = make_rows(2, 32), []
    with attached(quantised.model, spec, 2, alpha=spec.alpha) as model:
        torch.manual_seed(0)
        for p in model.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.1)
        for _ in range(2):
            model.train()
            model.zero_grad()
            next_token_loss(model, rows).backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
            evaluate(model, rows, 2)
    for before, after in zip(*grads, strict=True):
        assert torch.equal(before, after)


def test_nothing_to_predict_is_refused(base) -> None:
    with pytest.raises(ValueError, match="no held-out"):
        evaluate(base.model, whole_rows(np.empty((0, 8), dtype=np.int64)), 1)


def test_spread_takes_rows_from_end_to_end() -> None:
    rows = whole_rows(np.arange(20).reshape(10, 2))
    assert spread(rows, 3).tokens[:, 0].tolist() == [0, 8, 18]
    assert len(spread(rows, 99)) == 10


def test_logits_of_a_batch_never_exist(base, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    head = base.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _m, _i, out: sizes.append(out.shape[0]))
    try:
        evaluate(base.model, make_rows(8, 200), micro_batch=8)
    finally:
        handle.remove()
    assert max(sizes) <= CHUNK_TOKENS
