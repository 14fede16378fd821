"""The endpoint over the real engine: OpenAI's client, and rounds that come while it answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

openai = pytest.importorskip("openai")

from edge_agent.held import keep
from edge_agent.serving_adapter import NewestAdapter
from profiles.model import base_digest, dense_tensors, read_shape
from protos.contract import AdapterSpec, BlobRef, Payload
from protos.packing import pack
from protos.transfer import sha256_of
from tests.coordinator.test_downlink import a_task
from tests.edge_agent.serving.conftest import Endpoint

ROOT = Path(__file__).parents[3]
PROMPTS = [f"def f{i}(x):\n    return" for i in range(8)]
TOKENS = 12


@pytest.fixture
def spec(base_folder):
    return AdapterSpec(
        run_id="team", base=str(base_folder), base_revision="",
        base_digest=base_digest(base_folder), rank=4, alpha=8.0, use_rslora=False, seed=7,
        modules=read_shape(base_folder).modules(()),
    )  # fmt: skip


def bring(state: Path, spec: AdapterSpec, round_: int) -> None:
    """What the agent does when a round's whole adapter has come."""
    draw = np.random.default_rng(round_)
    parts = {
        m.name: {
            "up": draw.normal(size=(spec.rank, m.out_features)).astype(np.float32) * 0.3,
            "down": draw.normal(size=(spec.rank, m.in_features)).astype(np.float32) * 0.3,
        }
        for m in spec.modules
    }
    parts |= {t.name: {"dense": np.ones((t.out_features, t.in_features), np.float32)}
              for t in spec.dense}  # fmt: skip
    payload = Payload(spec.rank, "float32", ("up", "down", "dense") if spec.dense else
                      ("up", "down"))  # fmt: skip
    (state / "blobs").mkdir(parents=True, exist_ok=True)
    path = state / "blobs" / "new"
    path.write_bytes(pack(spec, payload, parts))
    blob = BlobRef(sha256_of(path), path.stat().st_size, payload)
    path.rename(state / "blobs" / blob.digest)
    keep(state, spec, a_task(round_, evaluates_global=True, global_adapter=(blob,)), None)


@pytest.fixture
def newest(engine, tmp_path):
    (tmp_path / "files").mkdir()
    return NewestAdapter(engine, tmp_path / "state", tmp_path / "files")


@pytest.fixture
def client(engine, newest):
    endpoint = Endpoint(engine, at_once=4, waiting=50, serving=newest.serving)
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0) as made:
        yield made
    endpoint.stop()


def asked(client, prompt, **options):
    facts = {"model": "sketchfleet", "max_tokens": TOKENS, "temperature": 0, **options}
    return client.completions.create(prompt=prompt, **facts)


def written(engine, prompt, **options):
    ids = engine.encode(prompt, suffix=options.pop("suffix", None))
    return "".join(p.text for p in engine.generate(ids, max_tokens=TOKENS, **options))


def test_the_client_gets_what_the_engine_writes(client, engine) -> None:
    want = written(engine, PROMPTS[0])
    found = asked(client, PROMPTS[0])
    assert found.choices[0].text == want and found.system_fingerprint == "base"
    assert found.usage.prompt_tokens == len(engine.encode(PROMPTS[0]))
    stream = asked(client, PROMPTS[0], stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == want
    by_tokens = asked(client, engine.encode(PROMPTS[0]))
    assert by_tokens.choices[0].text == want


def test_a_suffix_and_a_seed_reach_it(client, engine) -> None:
    want = written(engine, "a = ", suffix="\nprint(a)")
    assert asked(client, "a = ", suffix="\nprint(a)").choices[0].text == want
    assert want != written(engine, "a = ")
    drawn = [asked(client, "a", temperature=1, seed=5, n=2) for _ in range(2)]
    texts = [[choice.text for choice in found.choices] for found in drawn]
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]
    long = "word = 1\n" * 200
    assert asked(client, long, suffix=long).choices[0].finish_reason is not None, "cut to fit"
    with pytest.raises(openai.BadRequestError) as refused:
        asked(client, long)
    assert refused.value.code == "context_length_exceeded"


def test_rounds_come_under_load_and_no_request_is_lost_or_mixed(
    client, engine, newest, spec, tmp_path
) -> None:
    """8 clients ask all the time; every answer is that of the one round it says it is of."""
    rounds, found, ended = 5, [], threading.Event()

    def ask(prompt: str) -> None:
        while not ended.is_set():
            raw = client.completions.with_raw_response.create(
                model="sketchfleet", prompt=prompt, max_tokens=TOKENS, temperature=0
            )
            answer = raw.parse()
            assert answer.choices[0].finish_reason in ("length", "stop")
            round_ = raw.headers.get("x-sketchfleet-rounds", "none")
            found.append((prompt, round_, answer.choices[0].text))

    clients = [threading.Thread(target=ask, args=(prompt,)) for prompt in PROMPTS]
    for one in clients:
        one.start()
    try:
        for round_ in range(rounds):
            since = len(found)
            while len(found) < since + len(PROMPTS):
                time.sleep(0.002)
            bring(tmp_path / "state", spec, round_)
            assert newest.refresh() and not newest.problem
            assert not newest.refresh(), "nothing new"
        since = len(found)
        while len(found) < since + len(PROMPTS):
            time.sleep(0.002)
    finally:
        ended.set()
        for one in clients:
            one.join()
    names = [str(r) for r in range(rounds)]
    assert {told for _, told, _ in found} == {"none", *names}
    assert len(list((tmp_path / "files").iterdir())) <= 2, "old files go"
    engine.swap(None)
    right = {("none", prompt): written(engine, prompt) for prompt in PROMPTS}
    for round_ in range(rounds):
        bring(tmp_path / "state", spec, round_)
        newest.refresh()
        right |= {(str(round_), prompt): written(engine, prompt) for prompt in PROMPTS}
    assert len({right[told, PROMPTS[0]] for told in ("none", *names)}) == rounds + 1
    for prompt, told, text in found:
        assert text == right[told, prompt], told


def test_an_adapter_of_no_use_is_told_and_the_last_one_stays(
    newest, engine, spec, base_folder, tmp_path, caplog
) -> None:
    assert not newest.refresh() and engine.adapter == "" and newest.serving("").whose == "none"
    bring(tmp_path / "state", spec, 1)
    assert newest.refresh()
    name = engine.adapter
    assert newest.serving(name).fingerprint == f"team-r1-fleet-{name[:8]}"
    bring(tmp_path / "state", replace(spec, base_digest="c" * 64), 2)
    assert not newest.refresh() and "trains another base" in newest.problem
    dense = dense_tensors(base_folder, ["model.norm"])
    bring(tmp_path / "state", replace(spec, dense=dense), 3)
    assert not newest.refresh() and "whole, which cannot be swapped in" in newest.problem
    assert engine.adapter == name and len(caplog.records) == 2
    bring(tmp_path / "state", spec, 4)
    assert newest.refresh() and not newest.problem and engine.adapter != name


@pytest.mark.e2e
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_command_serves_and_ends_what_it_began(exported, spec, tmp_path, sent, code) -> None:
    bring(tmp_path / "state", spec, 6)
    settings = tmp_path / "agent.toml"
    settings.write_text(
        f'[data]\ninclude = ["code"]\n[state]\nfolder = "state"\n[serve]\nmodel = "{exported}"\n'
        'listen = "127.0.0.1:0"\nthreads = 1\n[log]\nformat = "json"\n'
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "edge_agent.cli", "serve", "--config", str(settings)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:  # fmt: skip
        try:
            lines = iter(process.stderr.readline, "")
            facts = next(f for f in map(json.loads, lines) if f["event"] == "serving completions")
            with openai.OpenAI(base_url=facts["address"], api_key="none") as client:
                stream = asked(client, "x = ", stream=True, max_tokens=140)
                first = next(stream)
                assert first.system_fingerprint.startswith("team-r6-fleet-")
                process.send_signal(sent)
                chunks = list(stream)
                assert chunks[-1].choices[0].finish_reason in ("length", "stop"), "not broken off"
            assert process.wait(15) == code
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()
