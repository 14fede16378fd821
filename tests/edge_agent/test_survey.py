"""What `probe` shows of each kind of machine, to people and to programs."""

from __future__ import annotations

import dataclasses
import json

import pytest

from edge_agent import survey as module
from edge_agent.config import AgentConfig
from edge_agent.survey import Wanted, describe, survey
from edge_agent.trainer_process import TrainerError
from profiles.device import ComputeProfile
from profiles.errors import SketchfleetError
from profiles.link import LinkProfile
from protos.contract import to_plain


@pytest.fixture
def config(tmp_path):
    return AgentConfig.model_validate({
        "data": {"include": [str(tmp_path)]}, "state": {"folder": str(tmp_path / "state")},
        "network": {"metered": "yes"}, "limits": {"memory_mb": 4000},
    })  # fmt: skip


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("orin nano", ("known as orin-nano-super-8gb", "L4T 36.4.3 (JetPack 6.2)", "CUDA 12.6.11",
                       "zram 0.7", "compute capability 8.7, shares the memory", "6.0 W now",
                       "54 °C, 44 °C below", "capped at 4.00")),
        ("agx orin", ("known as agx-orin", "JetPack 7.2")),
        ("thor", ("JetPack 7.0", "compute capability 11.0")),
        ("laptop", ("on battery at 63 %", "14.5 W now", "none seen")),
        ("pi 5", ("Raspberry Pi 5 Model B Rev 1.0, known as raspberry-pi-5", "62 °C")),
        ("vm", ("GPU        none seen", "metered")),
    ],
)  # fmt: skip
async def test_people_read_what_there_is_and_nothing_that_is_not(machines, config, name, words):
    text = describe(await survey(config, None, machines(name)))
    for word in words:
        assert word in text, f"{word!r} is not in:\n{text}"
    assert "None" not in text
    assert "link       not measured: this device has not joined a fleet yet" in text


async def test_programs_read_the_profile_and_more(machines, config):
    found = await survey(config, None, machines("orin nano"))
    plain = json.loads(json.dumps(found.plain))
    assert plain["known_board"] == "orin-nano-super-8gb" and plain["metered"] is True
    assert plain["board_facts"]["jetpack"] == "6.2" and plain["readings"]["watts"] == 6.0
    assert plain["gpu_seen"]["unified_memory"] is True and "gpu" not in plain


def test_a_link_and_compute_are_shown_when_they_were_measured(machines, config):
    import asyncio

    found = asyncio.run(survey(config, None, machines("vm")))
    compute = ComputeProfile("b" * 64, "nf4", 812.0, 2400.0, 1, 2_500_000_000, 8, 512, 2)
    profile = dataclasses.replace(found.profile, link=LinkProfile(5e5, 8e6, 0.04), compute=compute)
    text = describe(dataclasses.replace(found, profile=profile))
    assert "0.50 Mbit/s up, 8.00 down, 40 ms round trip, metered" in text
    assert "812 tokens/s trained, 2400 evaluated, nf4, 2 x 512 tokens, rank 8; peak 2.50 GB" in text


class Trainer:
    """In the place of the trainer process."""

    jobs, answer = [], None

    def __init__(self, python, threads, log):
        self.stopped = False

    async def run(self, job):
        type(self).jobs.append(job)
        if isinstance(type(self).answer, Exception):
            raise type(self).answer
        return type(self).answer

    async def stop(self):
        self.stopped = True


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    plain = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16,
             "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(plain))
    (folder / "model.safetensors").write_bytes(b"w")
    return str(folder)


async def test_compute_is_measured_for_a_base_that_is_named(machines, config, base, monkeypatch):
    monkeypatch.setattr(module, "TrainerProcess", Trainer)
    compute = ComputeProfile("b" * 64, "nf4", 812.0, 2400.0, 1, 2, 8, 512, 1)
    Trainer.jobs, Trainer.answer = [], {"compute": to_plain(compute), "gpu": None}
    wanted = Wanted(base, "nf4", 512, 1, 8)
    assert (await survey(config, wanted, machines("vm"))).profile.compute == compute
    (job,) = Trainer.jobs
    assert (job["job"], job["memory_cap_bytes"]) == ("profile", 4_000_000_000)
    assert job["request"]["sequence_tokens"] == 512 and job["spec"]["rank"] == 8
    Trainer.answer = TrainerError("out_of_memory", "no room")
    with pytest.raises(SketchfleetError, match=r"cannot train .*: no room; run .*doctor"):
        await survey(config, wanted, machines("vm"))
