"""The completions endpoint while rounds come: eight clients, and no request lost or mixed.

    python -m benchmarks.serving [--quick] [--precision int8|float32|int4]

The nano code model, exported once, behind `sketchfleet-agent serve` in a process of its own; the
official openai client in eight threads here, which ask without a pause, every other one streamed.
Meanwhile an adapter of rank 8 is stored as the agent stores a round's, again and again. An
answer is right if it is word for word what the adapter that it names writes when nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from edge_agent.held import FOLDER, NAME, VERSION
from edge_agent.inference import Engine
from edge_agent.inference_adapter import write_whole
from profiles.model import base_digest, read_shape
from protos.contract import AdapterSpec, BlobRef, Payload, to_plain
from protos.packing import pack
from protos.transfer import sha256_of, write_durably
from protos.whole_adapter import WholeAdapter

if TYPE_CHECKING:
    from openai import OpenAI

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "trials" / "nano_code"
CLIENTS, TOKENS, RANK = 8, 24, 8
PROMPTS = [f"def part_{i}(values):\n    " for i in range(CLIENTS)]
BASE = "base"  # the round of an answer without an adapter


@dataclass
class Answers:
    """What one client saw."""

    texts: list[tuple[str, str]] = field(default_factory=list)  # (round, text)
    whole_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def spec_of(run: str) -> AdapterSpec:
    """A run on the nano code model."""
    return AdapterSpec(run, str(NANO), "", base_digest(NANO), RANK, 16.0, False, 1,
                       read_shape(NANO).modules(()))  # fmt: skip


def adapter_of(spec: AdapterSpec, round_: int) -> dict[str, Any]:
    """Factors by module that change what is written."""
    draw = np.random.default_rng(round_)
    return {
        m.name: {
            "up": (0.02 * draw.normal(size=(RANK, m.out_features))).astype(np.float32),
            "down": (0.1 * draw.normal(size=(RANK, m.in_features))).astype(np.float32),
        }
        for m in spec.modules
    }


def store(state: Path, spec: AdapterSpec, round_: int) -> None:
    """As `edge_agent.held.keep` leaves it."""
    folder, payload = state / FOLDER, Payload(RANK, "float32")
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / "draft"
    draft.write_bytes(pack(spec, payload, adapter_of(spec, round_)))
    blob = BlobRef(sha256_of(draft), draft.stat().st_size, payload)
    draft.rename(folder / blob.digest)
    plain = {"version": VERSION, "spec": to_plain(spec), "round": round_, "personal": [],
             "files": [to_plain(blob)], "side": None}  # fmt: skip
    write_durably(folder / NAME, json.dumps(plain).encode())


def ask(client: OpenAI, prompt: str, found: Answers, ended: threading.Event) -> None:
    """One client: asks without a pause until it is told to end."""
    while not ended.is_set():
        streamed = len(found.texts) % 2 == 0
        began = time.perf_counter()
        try:
            if streamed:
                text, round_, finish, first = "", "", None, None
                for chunk in client.completions.create(
                    model="sketchfleet", prompt=prompt, max_tokens=TOKENS, temperature=0,
                    stream=True,
                ):  # fmt: skip
                    first = first or time.perf_counter() - began
                    round_ = _round(chunk.system_fingerprint)
                    text += chunk.choices[0].text
                    finish = chunk.choices[0].finish_reason
                found.first_s.append(first or 0.0)
            else:
                whole = client.completions.create(
                    model="sketchfleet", prompt=prompt, max_tokens=TOKENS, temperature=0
                )
                text, round_ = whole.choices[0].text, _round(whole.system_fingerprint)
                finish = whole.choices[0].finish_reason
            if finish not in ("length", "stop"):
                raise RuntimeError(f"ended by {finish}")
            found.texts.append((round_, text))
            found.whole_s.append(time.perf_counter() - began)
        except Exception as error:  # noqa: BLE001 - whatever it is, a request was lost
            found.dropped.append(f"{type(error).__name__}: {error}")


def _round(fingerprint: str | None) -> str:
    """The round in "RUN-rROUND-WHOSE-DIGEST"."""
    return BASE if fingerprint in (None, "base") else str(fingerprint).split("-r")[1].split("-")[0]


def read_log(stream: IO[str], events: list[dict[str, Any]]) -> None:
    """What the server tells, line by line."""
    events.extend(json.loads(line) for line in stream)


def main() -> int:
    """Prints the figures; 1 if a request was lost or mixed."""
    parser = argparse.ArgumentParser(prog="benchmarks.serving")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--precision", choices=("float32", "int8", "int4"), default="int8")
    parser.add_argument("--exported", type=Path, help="the nano code model, exported before")
    args = parser.parse_args()
    logging.disable(logging.INFO)  # the client tells of every request
    rounds = 3 if args.quick else 10
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        exported = args.exported or folder / "exported"
        if args.exported is None:
            from edge_agent.training.export import export_base

            export_base(str(NANO), exported, args.precision)
        spec = spec_of("bench")
        answers, events = measure(folder, exported, spec, rounds)
        right = reference(folder, exported, spec, rounds)
    mixed = sum(text != right[round_, prompt] for prompt, one in zip(PROMPTS, answers, strict=True)
                for round_, text in one.texts)  # fmt: skip
    dropped = [word for one in answers for word in one.dropped]
    whole = np.array([s for one in answers for s in one.whole_s])
    first = np.array([s for one in answers for s in one.first_s])
    swaps = [e["swap_ms"] for e in events if e["event"] == "serving a new adapter"]
    seen = {round_ for one in answers for round_, _ in one.texts}
    print(f"{CLIENTS} clients, {len(whole)} requests of {TOKENS} tokens, {args.precision}: "
          f"{len(dropped)} lost, {mixed} mixed")  # fmt: skip
    texts = {right[round_, PROMPTS[0]] for round_ in seen}
    print(f"answers of the bare base and of {len(seen - {BASE})} of {rounds} rounds; distinct "
          f"texts of one prompt: {len(texts)}")  # fmt: skip
    for word in dropped[:5]:
        print(f"lost: {word}")
    if dropped or len(seen) != rounds + 1:
        return 1
    figures: dict[str, Any] = {
        "requests": len(whole), "lost": len(dropped), "mixed": mixed, "rounds": rounds,
        "swap_ms": {"median": float(np.median(swaps)), "most": max(swaps)},
    }  # fmt: skip
    print(f"swap: {np.median(swaps):.1f} ms median, {max(swaps):.1f} ms at most")
    for what, times in (("first token", first), ("whole answer", whole)):
        p50, p95 = 1e3 * np.percentile(times, [50, 95])
        print(f"{what}: {p50:.0f} ms median, {p95:.0f} ms 95th percentile")
        figures[f"{what}_ms".replace(" ", "_")] = {"median": float(p50), "p95": float(p95)}
    print(json.dumps({"benchmark": "serving", "results": figures}))
    return 1 if mixed else 0


def measure(
    folder: Path, exported: Path, spec: AdapterSpec, rounds: int
) -> tuple[list[Answers], list[dict[str, Any]]]:
    """What every client saw, and what the server told."""
    from openai import OpenAI

    (folder / "agent.toml").write_text(
        '[data]\ninclude = ["code"]\n[state]\nfolder = "state"\n[log]\nformat = "json"\n'
        f'[serve]\nmodel = "{exported}"\nlisten = "127.0.0.1:0"\nat_once = {CLIENTS}\n'
    )
    command = [sys.executable, "-m", "edge_agent.cli", "serve", "--config",
               str(folder / "agent.toml")]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answers = [Answers() for _ in PROMPTS]
    events: list[dict[str, Any]] = []
    ended = threading.Event()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stderr is not None
        events.append(json.loads(server.stderr.readline()))
        log = threading.Thread(target=read_log, args=(server.stderr, events))
        log.start()
        client = OpenAI(base_url=events[0]["address"], api_key="none", max_retries=0, timeout=180)
        clients = [threading.Thread(target=ask, args=(client, prompt, found, ended))
                   for prompt, found in zip(PROMPTS, answers, strict=True)]  # fmt: skip
        try:
            for one in clients:
                one.start()
            for round_ in range(rounds):
                _await_answers(answers, BASE if round_ == 0 else str(round_ - 1))
                store(folder / "state", spec, round_)
            _await_answers(answers, str(rounds - 1))
        finally:
            ended.set()
            for one in clients:
                one.join()
            server.terminate()
            log.join()
    return answers, events


def _await_answers(answers: list[Answers], round_: str, patience_s: float = 180.0) -> None:
    """Until every client has two answers of this round."""
    until = time.monotonic() + patience_s
    while any(sum(told == round_ for told, _ in one.texts) < 2 for one in answers):
        if time.monotonic() > until or any(one.dropped for one in answers):
            return  # which the figures tell
        time.sleep(0.02)


def reference(
    folder: Path, exported: Path, spec: AdapterSpec, rounds: int
) -> dict[tuple[str, str], str]:
    """(round, prompt) -> what is right."""
    engine = Engine.open(exported)

    def written(prompt: str) -> str:
        pieces = engine.generate(engine.encode(prompt), max_tokens=TOKENS)
        return "".join(piece.text for piece in pieces)

    found = {(BASE, prompt): written(prompt) for prompt in PROMPTS}
    for round_ in range(rounds):
        factors = {n: (p["up"], p["down"]) for n, p in adapter_of(spec, round_).items()}
        engine.swap(write_whole(WholeAdapter(spec, RANK, factors), folder / "files"))
        found |= {(str(round_), prompt): written(prompt) for prompt in PROMPTS}
    engine.close()
    return found


if __name__ == "__main__":
    sys.exit(main())
