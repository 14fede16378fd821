"""Requests: the tokens torch would write, on the adapter that was current when each began."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from edge_agent.inference import Engine
from edge_agent.inference_folder import ContextLengthError, InferenceError
from tests.edge_agent.inference.conftest import text_of, tokens_of

PROMPTS = ("def main():\n", "import os", "class Café:\n    '''", "x = [1, 2, 3]\nfor i in x")
COUNT = 24


def test_greedy_tokens_are_those_of_torch(engine, backbone, torch_greedy):
    for prompt in PROMPTS:
        ids = engine.encode(prompt)
        got = tokens_of(engine.generate(ids, max_tokens=COUNT))
        assert got == torch_greedy(backbone.model, ids, COUNT)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 4},
        {"rank": 9, "targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")},
        {"rank": 2, "targets": ("o_proj",), "rslora": True},
    ],
)
def test_adapters_of_any_rank_and_modules_write_what_peft_writes(
    engine, adapters, torch_greedy, options
):
    bare = tokens_of(engine.generate(PROMPTS[0], max_tokens=COUNT))
    engine.swap(adapters.file(3, **options))
    model = adapters.model(3, **options)
    try:
        for prompt in PROMPTS[:2]:
            ids = engine.encode(prompt)
            got = tokens_of(engine.generate(ids, max_tokens=COUNT))
            assert got == torch_greedy(model, ids, COUNT)
    finally:
        model.unload()
    assert tokens_of(engine.generate(PROMPTS[0], max_tokens=COUNT)) != bare
    engine.swap(None)
    assert tokens_of(engine.generate(PROMPTS[0], max_tokens=COUNT)) == bare


def test_a_swap_drops_no_request_and_each_finishes_on_its_own_adapter(engine, adapters):
    files = [None, adapters.file(1), adapters.file(2, rank=9)]
    asked = [f"def f{i}(" for i in range(8)]
    alone = {}
    for file in files:
        engine.swap(file)
        for prompt in asked:
            alone[engine.adapter, prompt] = tokens_of(engine.generate(prompt, max_tokens=COUNT))
    names = ["" if file is None else file.stem for file in files]
    ended, swaps = [], []
    over = time.monotonic() + 1.5
    # Every client asks on, whatever adapter is current; the swaps come in between its tokens.

    def client(prompt):
        while time.monotonic() < over:
            pieces = engine.generate(prompt, max_tokens=COUNT)
            got = list(pieces)
            ended.append(got[-1].finish)
            which = [name for name in names if alone[name, prompt] == tokens_of(got)]
            assert which, "these tokens are of no one adapter"

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client, prompt) for prompt in asked]
        while time.monotonic() < over:
            swaps.append(engine.swap(files[len(swaps) % 3]))
            time.sleep(0.02)
        for one in clients:
            one.result()
    assert len(swaps) > 5
    assert set(ended) <= {"length", "stop"}
    assert len(ended) >= 8
    assert sorted(swaps)[len(swaps) // 2] < 0.1


def test_a_request_keeps_its_adapter_which_then_leaves_memory(engine, adapters):
    first, second = adapters.file(1), adapters.file(2)
    engine.swap(first)
    whole = tokens_of(engine.generate("a = ", max_tokens=8))
    pieces = engine.generate("a = ", max_tokens=8)
    begun = [next(pieces)]
    engine.swap(second)
    assert engine.adapter == second.stem
    assert set(engine.adapters) == {first.stem, second.stem}
    assert tokens_of([*begun, *pieces]) == whole
    del pieces
    gc.collect()
    assert engine.adapters == (second.stem,)


def test_a_stop_string_ends_the_text_before_it_wherever_pieces_fall(engine):
    whole = text_of(engine.generate(PROMPTS[0], max_tokens=40))
    stop = whole[10:13]
    got = list(engine.generate(PROMPTS[0], max_tokens=40, stop=["never", stop]))
    assert text_of(got) == whole[: whole.index(stop)]
    assert [piece.finish for piece in got] == [None] * (len(got) - 1) + ["stop"]


def test_pieces_are_whole_characters(engine):
    writer = engine._text.writer(engine.encode("x"), ())
    ids = engine.encode_bare(["naïve → 漢字 🙂 end"])[0]
    pieces = [writer.write(token) for token in ids]
    assert "".join(pieces) == "naïve → 漢字 🙂 end"
    assert "�" not in "".join(pieces)
    assert len(ids) > sum(bool(piece) for piece in pieces)  # some had to wait


def test_what_may_become_a_stop_string_is_held_back_and_then_given(engine):
    writer = engine._text.writer(engine.encode("x"), ("\n\ndef",))
    given = [writer.write(token) for token in engine.encode_bare(["a\n\nde"])[0]]
    assert given == ["a", "", "", "", ""]
    assert writer.rest() == "\n\nde"
    assert not writer.stopped


def test_a_text_ends_with_the_context(engine):
    room = engine.info.context_tokens
    ids = engine.encode("x" * (room - 5))  # and the separator
    assert len(ids) == room - 4
    got = list(engine.generate(ids, max_tokens=99, temperature=5.0, seed=1))
    assert got[-1].finish in ("length", "stop")
    assert len(tokens_of(got)) <= 4
    with pytest.raises(ContextLengthError, match=f"context of {room}"):
        engine.generate("x" * room, max_tokens=1)


def test_a_long_prompt_loses_its_beginning_and_a_long_suffix_its_end(engine):
    room = engine.info.context_tokens
    prompt, suffix = "p" * 300 + "HERE", "THERE" + "s" * 300
    plain = engine.encode(prompt, room=60)
    assert len(plain) == room - 60
    assert engine._text.tokenizer.decode(plain).endswith("pHERE")
    filled = engine.encode(prompt, suffix=suffix, room=60)
    assert len(filled) == room - 60
    words = engine._text.tokenizer.decode(filled, skip_special_tokens=False)
    assert words.startswith("<|end|><|fim_prefix|>pp")
    assert "pHERE<|fim_suffix|>THERE" in words
    assert words.endswith("s<|fim_middle|>")
    assert engine.encode("a", suffix="b", room=60) == engine.encode("a", suffix="b")
    with pytest.raises(ContextLengthError):
        engine.encode("a", room=room)


def test_nothing_is_written_where_nothing_is_asked_for(engine):
    assert [piece.finish for piece in engine.generate("x", max_tokens=0)] == ["length"]


def test_a_request_can_be_ended_from_another_thread(engine):
    cancel = threading.Event()
    pieces = engine.generate("x", max_tokens=100, cancel=cancel)
    next(pieces)
    cancel.set()
    assert [piece.finish for piece in pieces] == ["cancelled"]


def test_the_same_seed_draws_the_same_whatever_else_runs(engine):
    def draw(seed):
        return tokens_of(engine.generate("x", max_tokens=12, temperature=2.0, top_p=0.9, seed=seed))

    alone = draw(7)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(draw, [7] * 4)) == [alone] * 4
    assert draw(8) != alone


def test_a_known_beginning_is_not_read_again_and_changes_nothing(exported, adapters):
    fresh, used = Engine.open(exported, threads=1), Engine.open(exported, threads=1)
    steps = []
    run = used._session.run

    def counted(tokens, *rest):
        steps.append(tokens.shape[1])
        return run(tokens, *rest)

    used._session.run = counted
    text = "def weigh(values):\n    total = 0\n    for value in values:\n"
    for prompt in (text, text + "        tot", text + "        if", "import os\n" + text):
        steps.clear()
        got = tokens_of(used.generate(prompt, max_tokens=4))
        assert got == tokens_of(fresh.generate(prompt, max_tokens=4)), prompt
        known = prompt.startswith(text + " ")
        assert (steps[0] < len(text)) == known
    used.swap(adapters.file(1))  # the cache of another adapter is another cache
    fresh.swap(adapters.file(1))
    assert tokens_of(used.generate(text, max_tokens=4)) == tokens_of(
        fresh.generate(text, max_tokens=4)
    )


def test_remembered_beginnings_stay_within_their_memory(exported, monkeypatch):
    engine = Engine.open(exported, threads=1)
    for i in range(6):
        list(engine.generate(f"{i} " * 20, max_tokens=1))
    held = engine._prefixes._entries
    assert len(held) == 4
    size = held[0].cache.size_bytes
    assert size == 2 * 2 * 2 * 8 * 41 * 4  # sides, layers, heads, size, tokens, bytes
    monkeypatch.setattr("edge_agent.inference_prefixes.MOST_BYTES", 2 * size)
    list(engine.generate("x " * 20, max_tokens=1))
    assert len(engine._prefixes._entries) == 2
    monkeypatch.setattr("edge_agent.inference_prefixes.MOST_BYTES", size - 1)
    list(engine.generate("y " * 20, max_tokens=1))
    assert not engine._prefixes._entries


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5},
        {"seed": -1}, {"max_tokens": -1}, {"prompt": []}, {"prompt": [264]}, {"prompt": [-1]},
    ],
)  # fmt: skip
def test_bad_requests_are_refused_before_the_first_piece(engine, bad):
    with pytest.raises(InferenceError):
        engine.generate(**({"prompt": "x", "max_tokens": 4} | bad))


def test_a_closed_engine_finishes_what_runs_and_takes_no_more(exported):
    engine = Engine.open(exported, threads=1)
    pieces = engine.generate("x", max_tokens=3)
    next(pieces)
    engine.close()
    assert list(pieces)[-1].finish == "length"
    with pytest.raises(InferenceError, match="closed"):
        engine.generate("x", max_tokens=1)


def test_inference_needs_no_torch():
    code = (
        "import sys, edge_agent.inference, edge_agent.inference_commands; "
        "assert not {'torch', 'transformers', 'onnx'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_that_is_no_export_is_refused(tmp_path, exported):
    with pytest.raises(InferenceError, match="export-base"):
        Engine.open(tmp_path)
    for name in ("export.json", "tokenizer.json", "model.onnx"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    whole = (tmp_path / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InferenceError, match="cannot be loaded"):
        Engine.open(tmp_path)
    (tmp_path / "export.json").write_text('{"format": 1}')
    with pytest.raises(InferenceError, match="damaged"):
        Engine.open(tmp_path)
    (tmp_path / "export.json").write_text('{"format": 2}')
    with pytest.raises(InferenceError, match="format 2"):
        Engine.open(tmp_path)
