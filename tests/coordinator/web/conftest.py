"""A run in a database as a coordinator would have left it, with all that goes wrong in one."""

from __future__ import annotations

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from coordinator.config import RunConfig
from coordinator.ledger_types import Contribution
from coordinator.rounds import RunState
from coordinator.store.records import Records
from coordinator.web.facts import FactReader, Live
from profiles.device import ComputeProfile, DeviceProfile, GpuProfile, PowerProfile
from profiles.link import LinkProfile
from profiles.model import ModuleShape
from protos.contract import (
    AdapterSpec,
    Assignment,
    BlobRef,
    Evaluation,
    LocalReport,
    Payload,
    Progress,
)

RANK = 32
DATABASE = "coordinator.sqlite"
NOW = 1_780_000_000.0
ROUND_S = 60.0
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>&{{ 7*7 }}'
LONG = "a-device-whose-name-is-as-long-as-a-name-may-be-sixty-three-chr"
FLEET = (  # name, board, known board, rank, up Mbit/s, language, how hard its code is
    ("field-board", "Jetson Orin Nano 8GB", "orin-nano-8gb", 8, 0.4, "c-header", 2.6),
    ("lab-board", "Jetson Orin Nano 8GB", "orin-nano-8gb", 8, 0.8, "c", 2.3),
    ("laptop", "laptop, 16 GB", "", 24, 16.0, "python", 1.8),
    ("workstation", "RTX 4090", "rtx-4090", 32, 50.0, "python", 1.6),
    ("workstation-2", "RTX 4090", "rtx-4090", 32, 40.0, "typescript", 1.7),
    (LONG, "Raspberry Pi 5 with a board name that goes on and on", "pi-5", 4, 2.0, "shell", 2.1),
)


def spec(run_id="demo"):
    modules = tuple(
        ModuleShape(f"model.layers.{layer}.self_attn.{name}", 64, 64)
        for layer in range(4) for name in ("q_proj", "k_proj", "v_proj")
    )  # fmt: skip
    return AdapterSpec(run_id, "nano-code", "", "0" * 64, RANK, 64.0, False, 7, modules)


def config(state, rounds=10, **sections):
    return RunConfig.model_validate({
        "run": {"name": "demo", "rounds": rounds}, "model": {"base": "nano-code"},
        "adapter": {"rank": RANK}, "server": {"state": str(state)}, **sections,
    })  # fmt: skip


def profile(board="", known="", up=1.0, *, measured=True, gpu=None):
    compute = ComputeProfile("0" * 64, "nf4", 1234.0, 3700.0, 3 * 10**8, 5 * 10**8, 8, 128, 4)
    return DeviceProfile(
        board=board, cpu="ARM Cortex-A78AE", cores=6, memory_total_bytes=8 * 10**9,
        memory_available_bytes=6 * 10**9, disk_free_bytes=40 * 10**9, agent_version="0.1.0",
        known_board=known, gpu=gpu, compute=compute if measured else None,
        link=LinkProfile(up * 1e6, 4 * up * 1e6, 0.045) if measured else None,
        power=PowerProfile("25W", temperature_c=51.0) if measured else None,
    )  # fmt: skip


def assignment(device, number, rank, *, trains=True, run_id="demo"):
    payload = Payload(rank=rank, encoding="int8")
    return Assignment(
        assignment_id=f"{run_id}.{number}.{device}", run_id=run_id, round=number,
        device_id=device, method="fslora", rank=rank, rows="stratified", sketch_offset=0,
        alpha=64.0, trained=("up", "down"), personal=(), keeps_basis=True, keeps_state=False,
        error_feedback=False, fresh=False, precision="nf4", sequence_tokens=128, micro_batch=4,
        accumulation=1, checkpointing=False, local_steps=20 if trains else 0, learning_rate=1e-3,
        optimizer="adamw", update=payload, evaluation_sequences=24, held_out_share=0.2,
        evaluates_global=True, seed=1, deadline_s=ROUND_S,
        reason=f"k = {rank} of {RANK}: its link sends that much in the {ROUND_S:.0f} s of a round",
        slice=(BlobRef("f" * 64, 1000 * rank, payload),),
    )  # fmt: skip


def report(device, number, loss, *, outcome="done", message="", draw=None):
    spread = np.random.default_rng(abs(hash((device, number))) % 2**32) if draw is None else draw
    tokens = tuple(int(t) for t in spread.integers(90, 128, 12))
    nats = tuple(round(1000 * n * loss * w)
                 for n, w in zip(tokens, spread.normal(1, 0.1, 12), strict=True))  # fmt: skip
    evaluations = (
        Evaluation("global", "received", sum(nats) / sum(tokens) / 1000, 0.5, sum(tokens),
                   example_millinats=nats, example_tokens=tokens),
        Evaluation("slice", "trained", loss - 0.1, 0.52, 1300),
    ) if outcome == "done" else ()  # fmt: skip
    return LocalReport(
        f"demo.{number}.{device}", outcome, message, evaluations, train_examples=400,
        fetch_s=2.0, train_s=20.0, evaluate_s=4.0, push_s=3.0, pack_s=0.2, wait_s=1.0,
        fetched_bytes=400_000, pushed_bytes=90_000, main_language="python",
        joules=250.0, temperature_c=61.5,
    )  # fmt: skip


def populate(records, *, rounds=6, fleet=FLEET, open_round=True, run_config=None):
    """A run of `rounds` merged rounds and, if wanted, an open one; returns its `Live`."""
    records.add_run(spec(), run_config.model_dump(mode="json"), {}, NOW - 3600)
    gpu = GpuProfile("NVIDIA GeForce RTX 4090", 24 * 10**9, 22 * 10**9, "8.9", False)
    for index, (name, board, known, _, up, _, _) in enumerate(fleet):
        records.put_device(name, "hash", NOW + 1e6, NOW - 4000 + index)
        records.seen(name, NOW - 4, profile(board, known, up, gpu=gpu if "RTX" in board else None))
    records.put_device("newcomer", "hash", NOW + 1e6, NOW - 3)  # no profile yet
    records.put_device("gone", "hash", NOW + 1e6, NOW - 90_000)
    records.seen("gone", NOW - 90_000, profile("old laptop", "", 1.0, measured=False))
    begun = NOW - rounds * (ROUND_S + 5) - 30
    for number in range(rounds):
        opened = begun + number * (ROUND_S + 5)
        planned = [(assignment(name, number, rank), {}) for name, _, _, rank, *_ in fleet]
        records.open_round("demo", number, False, opened, opened + ROUND_S, planned)
        merged, dropped, late = [], {}, []
        for index, (name, _, _, rank, _, language, hard) in enumerate(fleet):
            draw = np.random.default_rng([index, 5])
            loss = hard * (0.55 + 0.45 * math.exp(-number / (8 if rank < 10 else 4)))
            told = report(name, number, loss, draw=draw)
            told = LocalReport(**{**vars(told), "main_language": language})
            if name == "lab-board" and number == 2:
                records.put_report(
                    report(
                        name,
                        number,
                        loss,
                        outcome="out_of_memory",
                        message="CUDA out of memory while loading <the base>",
                    )
                )
                continue
            if name == LONG and number in (1, 3):
                continue  # nothing heard
            records.put_report(told)
            digest = f"{number:032x}{index:032x}"
            records.put_update(f"demo.{number}.{name}", digest, 1100 * rank, opened + 30 + index)
            if name == "laptop" and number == 4:
                dropped[f"demo.{number}.{name}"] = "layer 3 of the update holds a NaN"
                continue
            merged.append(f"demo.{number}.{name}")
        whole = sum(rank for name, _, _, rank, *_ in fleet if f"demo.{number}.{name}" in merged)
        shares = {name: rank / whole for name, _, _, rank, *_ in fleet
                  if f"demo.{number}.{name}" in merged}  # fmt: skip
        detail = {
            "on_time": list(shares), "late": late, "dropped": dropped,
            "weights": dict.fromkeys(merged, 400.0), "share": shares,
            "coverage": [0.0 if c > 29 and number == 5 else 2.0 + c % 3 for c in range(RANK)],
            "aggregation_error": 0.02 * (number + 1), "aggregation_error_exact": True,
            "aggregation_errors": {m.name: 0.01 * (i + 1) for i, m in enumerate(spec().modules)},
            "merge_s": 0.4 + 0.05 * number,
        }  # fmt: skip
        records.close_round("demo", number, detail, opened + 50)
        given = {f"demo.{number}.{name}": Contribution(400.0, share, 0.6, 1.0, b"")
                 for name, share in shares.items()}  # fmt: skip
        records.publish_round("demo", number, {}, merged, detail, opened + 51, given)
    if not open_round:
        return Live(RunState(round=rounds), {}, {})
    opened = NOW - 25
    names = [name for name, *_ in fleet]
    planned = [(assignment(name, rounds, rank), {}) for name, _, _, rank, *_ in fleet]
    records.open_round("demo", rounds, False, opened, opened + ROUND_S, planned)
    return Live(
        RunState(
            phase="open", round=rounds, ready=frozenset([*names, "newcomer"]),
            assigned=frozenset(names), arrived=frozenset(names[3:4]),
            failed=(("lab-board", "out_of_memory"),),
            opened_at_s=opened, deadline_at_s=opened + ROUND_S,
        ),
        {"laptop": Progress(12, 20, 1200.0, 10**9),
         "field-board": Progress(3, 20, 90.0, 10**9, paused="its owner is using it")},
        {"newcomer": "needs 1.9 GB for training, has 0.8 GB; close other programs"},
    )  # fmt: skip


@pytest.fixture(scope="session")
def populated(tmp_path_factory):
    """Databases by what is in them, each written once and copied: every write is synchronised."""
    kept = {}

    def find(choices):
        key = repr(sorted(choices.items()))
        if key not in kept:
            folder = tmp_path_factory.mktemp("run")
            records = Records(folder / DATABASE)
            live = populate(records, run_config=config(folder), **choices)
            records.close()
            kept[key] = (folder / DATABASE, live)
        return kept[key]

    return find


@pytest.fixture
def make_run(tmp_path, populated):
    """Builds a populated run; returns its records, live state and reader."""
    opened = []

    def build(**choices):
        database, live = populated(choices)
        shutil.copy(database, tmp_path / DATABASE)
        records = Records(tmp_path / DATABASE)
        opened.append(records)
        read = FactReader(records, "demo", lambda: live, lambda: NOW)
        return SimpleNamespace(records=records, live=live, read=read, config=config(tmp_path),
                               folder=tmp_path)  # fmt: skip

    yield build
    for records in opened:
        records.close()


@pytest.fixture
def hostile_fleet():
    """Devices whose names try to break out of a page."""
    names = (HOSTILE, "a/b?c#d%2e", "../../etc/passwd", "機器-é")
    return tuple((name, HOSTILE, "", 8, 1.0, HOSTILE, 2.0) for name in names)
