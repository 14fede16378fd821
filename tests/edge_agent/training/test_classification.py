"""A sequence classifier in the trainer: its examples, loss, head and whole local round."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from coordinator.config import RunConfig
from coordinator.export import whole_adapter
from coordinator.lowrank import Bundle
from coordinator.serve import build_spec
from edge_agent.training.backbone import BackboneError, load_base
from edge_agent.training.classification import count_labels, encode_examples, label_loss, macro_f1
from edge_agent.training.documents import CorpusError, Document
from edge_agent.training.slice import attached, read_parts, write_parts
from protos.contract import to_plain
from protos.head import head_tensors, initial_head
from protos.peft_folder import write_peft
from tests.edge_agent.training.rounds import (
    Device,
    at_start,
    make_adapter,
    make_assignment,
    moved,
    run,
)
from tests.tiny_base import write_base, write_encoder

LABELS = ("entailment", "not_entailment")
CPU = torch.device("cpu")


def config_of(folder, labels=LABELS, **model):
    return RunConfig.model_validate({
        "run": {"name": "run", "seed": 5},
        "model": {"base": str(folder), "task": "sequence-classification", "labels": labels} | model,
        "adapter": {"rank": 4, "alpha": 8.0},
        "training": {"precision": "fp32"},
    })  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("decoder"), hidden=32, intermediate=64)


@pytest.fixture(scope="module", params=["encoder", "decoder"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def spec(folder):
    return build_spec(config_of(folder), folder)[0]


@pytest.fixture(scope="module")
def base(folder, spec):
    return load_base(folder, "fp32", CPU, spec)


def pair(first, second, label="entailment"):
    parts = ((first, False), (second, False)) if second else ((first, False),)
    return Document(parts, "", "0" * 64, "train", "here line 2", together=True, label=label)


TEXTS = [("a cat sat", "cats sit"), ("one two three four", "five"), ("alone and short", "")]


def test_examples_are_what_the_stock_tokenizer_makes_of_pairs(encoder):
    spec = build_spec(config_of(encoder), encoder)[0]
    base = load_base(encoder, "fp32", CPU, spec)
    found = encode_examples([pair(*t) for t in TEXTS], LABELS, base, 20)
    stock = AutoTokenizer.from_pretrained(encoder)
    for i, (first, second) in enumerate(TEXTS):
        want = stock(first, second or None, padding="max_length", max_length=20, truncation=True)
        np.testing.assert_array_equal(found.tokens[i], want["input_ids"])
        np.testing.assert_array_equal(found.segments[i], want["token_type_ids"])
        np.testing.assert_array_equal(found.real[i], want["attention_mask"])


@pytest.mark.parametrize("most", [3, 8, 9, 12, 40])
def test_a_decoder_reads_both_texts_of_a_pair_and_ends_with_the_second(decoder, most):
    spec = build_spec(config_of(decoder), decoder)[0]
    base = load_base(decoder, "fp32", CPU, spec)
    first, second = "abcdefgh", "uvw"
    ((ids, _),) = base.encode_joined([(first, second)], most)
    text = base.tokenizer.decode(ids).replace("<|end|>", "|")
    kept, other = text.split("|")
    assert first.startswith(kept) and second.startswith(other) and kept and other
    assert len(ids) == min(most, len(first) + 1 + len(second))


def test_loss_and_verdicts_are_those_of_the_stock_classifier(folder, spec):
    base = load_base(folder, "fp32", CPU, spec)
    torch.manual_seed(1)
    with torch.no_grad():  # a head as trained, so that labels differ
        for tensor in head_tensors(spec):
            base.model.get_parameter(tensor.name).normal_()
    documents = [pair(*t, label=LABELS[i % 2]) for i, t in enumerate(TEXTS)]
    examples = encode_examples(documents, LABELS, base, 48)
    losses, right = [], 0
    for i in range(len(examples)):  # one at a time and without padding
        ids = torch.tensor(examples.tokens[i][examples.real[i]])[None]
        given = {"input_ids": ids}
        if base.model.config.model_type == "bert":
            given["token_type_ids"] = torch.tensor(examples.segments[i][examples.real[i]])[None]
        with torch.no_grad():
            out = base.model(**given, labels=torch.tensor([int(examples.labels[i])]))
        losses.append(float(out.loss))
        right += int(out.logits.argmax()) == examples.labels[i]
    found = count_labels(base.model, examples)
    np.testing.assert_allclose(found.nats, losses, rtol=1e-4, atol=1e-6)
    assert (found.right, found.tokens.tolist()) == (right, [1, 1, 1])
    assert float(label_loss(base.model, examples)) == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.parametrize(
    ("labels", "said"), [([0, 1, 1, 0], [0, 1, 0, 0]), ([0, 0], [1, 1]), ([2, 2, 1], [2, 2, 2])]
)
def test_macro_f1_agrees_with_precision_and_recall_label_by_label(labels, said):
    scores = []
    for label in set(labels) | set(said):
        hits = sum(a == b == label for a, b in zip(labels, said, strict=True))
        precision = hits / said.count(label) if label in said else 0
        recall = hits / labels.count(label) if label in labels else 0
        scores.append(2 * precision * recall / (precision + recall) if hits else 0)
    assert macro_f1(np.array(labels), np.array(said)) == pytest.approx(np.mean(scores))


def test_the_head_is_the_same_wherever_torch_stands_and_another_for_another_seed(folder, spec):
    heads = []
    for torch_seed, run_seed in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(torch_seed)
        model = load_base(folder, "fp32", CPU, dataclasses.replace(spec, seed=run_seed)).model
        name = next(t.name for t in head_tensors(spec) if t.name.endswith("weight"))
        heads.append(model.get_parameter(name).detach().numpy().copy())
    np.testing.assert_array_equal(heads[0], heads[1])
    assert not np.array_equal(heads[0], heads[2])
    np.testing.assert_allclose(heads[0].std(), 0.02, rtol=0.25)


def test_what_transformers_names_the_head_is_what_the_run_trains(folder, spec):
    stock = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    assert spec.classification is not None
    own = {n: p.shape for n, p in stock.named_parameters()
           if n.startswith(f"{spec.classification.head}.")}  # fmt: skip
    assert {t.name for t in spec.dense} == set(own)
    for tensor in spec.dense:
        assert initial_head(5, tensor).shape == tuple(own[tensor.name])
    for module in spec.modules:
        layer = stock.get_submodule(module.name)
        assert (layer.out_features, layer.in_features) == (module.out_features, module.in_features)


def write_pairs(path, count=60):
    """Pairs whose label shows in the second text."""
    rows = ["index\tsentence1\tsentence2\tlabel"]
    for i in range(count):
        second = "aaaa bbbb" if i % 2 else "zzzz yyyy"
        rows.append(f'{i}\tit said "word {i}\t{second} {i}\t{LABELS[i % 2]}')
    path.write_text("\n".join(rows) + "\n")
    return path


def test_a_round_trains_adapter_and_head_and_learns(tmp_path, folder, spec, bench):
    data = write_pairs(tmp_path / "train.tsv")
    device = Device(tmp_path, folder, tmp_path, bench)
    start = at_start(spec, 4)
    for tensor in spec.dense:
        start[tensor.name] = {"dense": np.zeros((tensor.out_features, tensor.in_features), "f4")}
    task = make_assignment(
        rank=4, alpha=8.0, trained=("up", "down", "dense"), local_steps=12, learning_rate=3e-2,
        micro_batch=4, accumulation=2, evaluates_global=True, evaluation_sequences=64,
    )  # fmt: skip
    task = dataclasses.replace(
        task, update=dataclasses.replace(task.update, parts=("up", "down", "dense"))
    )
    data = {"labelled": {"train": [str(data)]}}
    report, delta = device.round(spec, task, start, whole=(start,), data=data)
    before, after = (report.evaluation("slice", stage) for stage in ("received", "trained"))
    first = report.evaluation("global", "received")
    assert before is not None and after is not None and first is not None
    assert after.loss < before.loss / 2 and after.token_accuracy > 0.9
    assert after.macro_f1 is not None and after.macro_f1 > 0.9
    assert set(first.example_tokens) == {1} and len(first.example_tokens) == first.tokens
    assert sum(first.example_millinats) / 1000 == pytest.approx(first.loss * first.tokens, abs=0.05)
    for tensor in spec.dense:
        assert np.abs(delta[tensor.name]["dense"]).max() > 1e-3, f"{tensor.name} was not trained"
    again, same = device.round(spec, task, start, whole=(start,), data=data)
    assert moved(delta, same) == 0 and again.train_loss == report.train_loss


def test_an_exported_adapter_classifies_in_stock_peft_as_it_does_here(tmp_path, folder, spec, base):
    from peft import PeftModel

    adapter = make_adapter(spec, 4, parts=("up", "down", "dense"))
    examples = encode_examples([pair(*t) for t in TEXTS], LABELS, base, 48)
    fresh = load_base(folder, "fp32", CPU, spec)
    with attached(fresh.model, spec, 4, alpha=spec.alpha, trained=()) as model:
        write_parts(model, adapter)
        ours = count_labels(model, examples)
        assert read_parts(model).keys() == adapter.keys()
    bundles = {
        m.name: Bundle(adapter[m.name]["up"], adapter[m.name]["down"], spec.scale(4))
        for m in spec.modules
    }
    dense = {t.name: adapter[t.name]["dense"] for t in spec.dense}
    out = write_peft(whole_adapter(spec, bundles, dense), tmp_path / "adapter", str(folder), folder)
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    torch.manual_seed(99)  # whatever head stock draws, the adapter brings its own
    stock = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    stock.config.pad_token_id = base.padding_id
    loaded = PeftModel.from_pretrained(stock, str(out)).eval()
    theirs = count_labels(loaded, examples)
    np.testing.assert_allclose(ours.nats, theirs.nats, rtol=1e-4, atol=1e-5)


def test_a_label_that_the_run_does_not_know_is_told_with_its_line(base):
    with pytest.raises(CorpusError, match=r"here line 2 has label 'neutral'.*entailment"):
        encode_examples([pair("a", "b", "neutral")], LABELS, base, 32)


def test_rows_longer_than_the_positions_are_refused(encoder):
    base = load_base(encoder, "fp32", CPU, build_spec(config_of(encoder), encoder)[0])
    with pytest.raises(BackboneError, match=r"lower \[training\] sequence_tokens"):
        encode_examples([], LABELS, base, 65)


def test_labelled_files_in_a_run_that_predicts_text_are_refused(tmp_path, device, spec_of_text):
    data = write_pairs(tmp_path / "train.tsv")
    job = device.job(spec_of_text, make_assignment(), at_start(spec_of_text, 2),
                     data={"labelled": {"train": [str(data)]}})  # fmt: skip
    event = run(job, device.bench)[-1]
    assert event["outcome"] == "no_data" and "this run predicts text" in event["message"]


def test_code_in_a_run_that_classifies_is_refused(tmp_path, folder, spec, bench, code_folder):
    device = Device(tmp_path, folder, code_folder, bench)
    task = make_assignment(rank=4)
    event = run(device.job(spec, task, at_start(spec, 4)), bench)[-1]
    assert event["outcome"] == "no_data" and "has no label" in event["message"]


def test_a_device_measures_what_training_a_classifier_costs(folder, spec, bench):
    request = {"precision": "fp32", "sequence_tokens": 16, "micro_batch": 2, "rank": 2}
    events = run({"job": "profile", "base_folder": str(folder), "spec": to_plain(spec),
                  "request": request}, bench)  # fmt: skip
    assert events[-1]["event"] == "result", events[-1]
    assert events[-1]["compute"]["tokens_per_s"] > 0


@pytest.fixture
def spec_of_text(base_folder):
    config = RunConfig.model_validate({
        "run": {"name": "run"}, "model": {"base": str(base_folder)}, "adapter": {"rank": 8},
        "training": {"precision": "fp32"},
    })  # fmt: skip
    return build_spec(config, base_folder)[0]
