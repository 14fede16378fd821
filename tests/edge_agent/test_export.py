"""The adapter that a device holds comes out as a folder or file, or one sentence says why not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file

from edge_agent.cli import main
from edge_agent.held import keep as keep_held
from edge_agent.journal import Journal
from edge_agent.training.home import Home, write_home
from profiles.model import base_digest
from protos.contract import AdapterSpec, BlobRef, LocalReport, Payload
from protos.packing import pack
from protos.transfer import sha256_of
from tests.edge_agent.training.rounds import make_assignment
from tests.tiny_base import write_base

RANK = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"), hidden=32, intermediate=48)


@pytest.fixture
def spec(base):
    from profiles.model import read_shape

    return AdapterSpec(
        run_id="team-code", base=str(base), base_revision="", base_digest=base_digest(base),
        rank=RANK, alpha=8.0, use_rslora=False, seed=7, modules=read_shape(base).modules(()),
    )  # fmt: skip


def factors(spec, seed):
    draw = np.random.default_rng(seed)
    return {
        m.name: {
            "up": draw.normal(size=(RANK, m.out_features)).astype(np.float32),
            "down": draw.normal(size=(RANK, m.in_features)).astype(np.float32),
        }
        for m in spec.modules
    }


@pytest.fixture
def own(tmp_path, spec):
    """Leaves a home of this run in the state folder."""

    def of_run(spec=spec, seed=1):
        journal = Journal(tmp_path / "state")
        path = tmp_path / "new"
        write_home(path, Home(round=2, alpha=8.0, personal=factors(spec, seed)), spec)
        journal.add(LocalReport("a", "done"), None, (spec, path))
        path = journal.home_path(spec)
        journal.close()
        return path

    return of_run


@pytest.fixture
def fleet(tmp_path, spec):
    """Has the agent keep a whole adapter of the fleet."""

    def of_run(spec=spec, seed=2, round_=5, **task):
        blobs = tmp_path / "state" / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        payload = Payload(RANK, "float32")
        (blobs / "new").write_bytes(pack(spec, payload, factors(spec, seed)))
        digest = sha256_of(blobs / "new")
        blob = BlobRef(digest, (blobs / "new").stat().st_size, payload)
        (blobs / "new").rename(blobs / digest)
        facts = {"round": round_, "evaluates_global": True, "global_adapter": (blob,)}
        keep_held(tmp_path / "state", spec, make_assignment(**(facts | task)), None)

    return of_run


@pytest.fixture
def export(tmp_path, capsys):
    """The command on this device: (exit code, what it said)."""

    def with_words(*words, out="adapter"):
        config = tmp_path / "agent.toml"
        config.write_text('[data]\ninclude = ["code"]\n[state]\nfolder = "state"\n')
        code = main(["export", "--config", str(config), "--out", str(tmp_path / out), *words])
        said = capsys.readouterr()
        return code, (said.out + said.err).strip()

    return with_words


def refused(said, *words):
    code, text = said
    assert code == 1 and text.startswith("sketchfleet-agent: ") and "\n" not in text, text
    for word in words:
        assert word in text


def written(folder, spec):
    """The products of a PEFT folder by module."""
    tensors = load_file(folder / "adapter_model.safetensors")
    get = {x: [tensors[f"base_model.model.{m.name}.lora_{x}.weight"] for m in spec.modules]
           for x in "AB"}  # fmt: skip
    return [spec.scale(len(a)) * b @ a for a, b in zip(get["A"], get["B"], strict=True)]


def products(spec, seed):
    return [spec.scale(RANK) * p["up"].T @ p["down"] for p in factors(spec, seed).values()]


def same(got, want):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_the_fleets_adapter_comes_out_where_the_device_has_none_of_its_own(
    export, fleet, spec, tmp_path
) -> None:
    fleet()
    code, said = export()
    assert code == 0 and said.endswith("(the fleet's adapter of run team-code after 5 rounds)")
    same(written(tmp_path / "adapter", spec), products(spec, 2))


def test_its_own_goes_before_the_fleets_unless_that_is_asked_for(
    export, fleet, own, spec, tmp_path
) -> None:
    fleet()
    own()
    assert "this device's own adapter of run team-code after 3 rounds" in export()[1]
    same(written(tmp_path / "adapter", spec), products(spec, 1))
    assert export("--whose", "fleet", out="theirs")[0] == 0
    same(written(tmp_path / "theirs", spec), products(spec, 2))


def test_llama_cpp_and_merged_forms_come_from_the_same_adapter(export, fleet, tmp_path) -> None:
    pytest.importorskip("gguf")
    fleet()
    assert export("--format", "gguf", out="a.gguf")[0] == 0
    assert (tmp_path / "a.gguf").read_bytes().startswith(b"GGUF")
    code, said = export("--format", "merged", "--dtype", "float32", out="whole")
    assert code == 0 and "14 tensors changed" in said
    refused(export("--dtype", "float32"), "--dtype is for --format merged")


def test_what_this_device_does_not_hold_is_told(export, own, spec, tmp_path) -> None:
    refused(export(), "no adapter of the fleet yet", "first round that measures")
    refused(export("--whose", "own"), "only methods with personal parts and [personal] ditto")
    assert not (tmp_path / "state").exists(), "asking makes no state folder"
    own()
    refused(export("--run", "other"), "of a run 'other'")
    refused(export("--whose", "fleet"), "no adapter of the fleet yet")
    assert not (tmp_path / "adapter").exists()


def test_a_home_that_is_damaged_is_told_unless_the_fleets_adapter_serves(
    export, own, fleet
) -> None:
    own().write_bytes(b"rot")
    refused(export(), "'team-code' is damaged or gone")
    fleet()
    assert "the fleet's adapter" in export()[1]
    refused(export("--whose", "own", out="b"), "'team-code' is damaged or gone")


def test_a_folder_that_is_there_is_left_alone(export, fleet, tmp_path) -> None:
    fleet()
    (tmp_path / "adapter").mkdir()
    refused(export(), "adapter already exists")
    assert list((tmp_path / "adapter").iterdir()) == []


def test_the_last_run_is_meant_where_none_is_named(export, own, fleet, spec) -> None:
    own()
    fleet(dataclasses.replace(spec, run_id="newer"))
    assert "the fleet's adapter of run newer" in export()[1]
    assert "own adapter of run team-code" in export("--run", "team-code", out="old")[1]
