"""What a device keeps: one file, whole or not at all, and never in the way of a round."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from edge_agent.training.home import Home, HomeError, load_home, read_home, write_home
from protos.contract import AdapterSpec, Payload, canonical_json
from tests.edge_agent.training.rounds import (
    HEAD,
    Device,
    K,
    assert_same,
    make_adapter,
    make_assignment,
    only,
    report_of,
    run,
)

ROOT = Path(__file__).parents[3]


def full_home(spec: AdapterSpec) -> Home:
    whole = replace(spec, dense=(HEAD,))
    adapter = make_adapter(whole, 3, parts=("up", "down", "core", "dense"))
    steps = {n: {p: np.array(5, np.float32) for p in parts} for n, parts in adapter.items()}
    return Home(
        round=4,
        alpha=12.0,
        rows={m.name: np.array([0, 2, 5]) for m in spec.modules},
        slice=adapter,
        personal=make_adapter(spec, 3, seed=4),
        side=make_adapter(spec, 5, seed=5),
        moments={"exp_avg": make_adapter(spec, 3, seed=6), "step": steps},
        residual=make_adapter(spec, 8, seed=7),
    )


def test_a_home_comes_back_as_it_was_written(spec: AdapterSpec, tmp_path: Path) -> None:
    home = full_home(spec)
    write_home(tmp_path / "home", home, spec)
    found = load_home(tmp_path / "home", spec)
    assert (found.round, found.alpha) == (4, 12.0)
    for group in ("slice", "personal", "side", "residual"):
        assert_same(getattr(found, group), getattr(home, group))
    assert found.moments.keys() == {"exp_avg", "step"}
    for kind, adapter in home.moments.items():
        assert_same(found.moments[kind], adapter)
        assert all(v.shape == found.moments[kind][n][p].shape for n, x in adapter.items()
                   for p, v in x.items())  # fmt: skip
    assert all(np.array_equal(found.rows[n], rows) for n, rows in home.rows.items())
    assert not list(tmp_path.glob("*.tmp"))
    assert (tmp_path / "home").stat().st_mode & 0o077 == 0, "for its owner only"


def test_the_same_home_has_the_same_bytes_in_every_process(
    spec: AdapterSpec, tmp_path: Path
) -> None:
    """safetensors orders what is said beside the arrays by a seed of the process."""
    code = (
        "import sys; from pathlib import Path; from edge_agent.training.home import *;"
        "from protos.contract import AdapterSpec, from_json;"
        "spec = from_json(AdapterSpec, sys.argv[1]);"
        "write_home(Path(sys.argv[2]), Home(round=4, alpha=2.0), spec)"
    )
    for i in range(4):
        words = [sys.executable, "-c", code, canonical_json(spec), str(tmp_path / str(i))]
        subprocess.run(words, cwd=ROOT, check=True)
    assert len({(tmp_path / str(i)).read_bytes() for i in range(4)}) == 1


def test_what_belongs_to_other_rows_is_left_behind(spec: AdapterSpec) -> None:
    home = full_home(spec)
    first = spec.modules[0].name
    here = home.at(dict(home.rows) | {first: np.array([0, 2, 6])})
    for adapter in (here.slice, here.personal, *here.moments.values()):
        assert first not in adapter and spec.modules[1].name in adapter
    assert HEAD.name in here.slice, "tensors trained whole have no rows"
    assert first in here.residual, "by global row, whatever the slice"


def test_a_home_of_another_run_is_ignored_with_a_line(
    spec: AdapterSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_home(tmp_path / "home", full_home(spec), spec)
    other = replace(spec, run_id="next")
    with caplog.at_level(logging.WARNING):
        assert read_home(tmp_path / "home", other).is_empty
    assert "belongs to run run" in caplog.text
    with pytest.raises(HomeError, match="belongs to run run"):
        load_home(tmp_path / "home", other)


@pytest.mark.parametrize("damage", ["empty", "rot", "cut", "text", "nan", "foreign"])
def test_a_damaged_home_costs_what_it_held_and_no_more(
    device: Device, spec: AdapterSpec, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    task = make_assignment(keeps_state=True)
    device.round(spec, task, make_adapter(spec, K))
    whole = device.home.read_bytes()
    if damage == "nan":
        home = load_home(device.home, spec)
        next(iter(home.moments["exp_avg"].values()))["up"][0, 0] = np.nan
        write_home(device.home, home, spec)
    elif damage == "foreign":
        save_file({"x": np.zeros(3, np.float32)}, device.home)
    else:
        rot = {"empty": b"", "rot": whole[:8] + b"\xff" * 64 + whole[72:], "cut": whole[:-9],
               "text": b"no home"}  # fmt: skip
        device.home.write_bytes(rot[damage])
    with caplog.at_level(logging.WARNING):
        _, sent = device.round(spec, task, make_adapter(spec, K))
    assert "begins anew" in caplog.text
    device.home.unlink()
    _, anew = device.round(spec, task, make_adapter(spec, K))
    assert_same(sent, anew)


def test_a_home_that_is_absent_is_no_fault(
    spec: AdapterSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert read_home(None, spec).is_empty and read_home(tmp_path / "none", spec).is_empty
    assert not caplog.text


def test_the_old_home_is_never_written_to(device: Device, spec: AdapterSpec) -> None:
    task = make_assignment(keeps_state=True)
    device.round(spec, task, make_adapter(spec, K))
    device.home.chmod(0o400)
    before = (device.home.read_bytes(), device.home.stat().st_mtime_ns)
    job = device.job(spec, task, make_adapter(spec, K))
    report_of(run(job, device.bench))
    assert (device.home.read_bytes(), device.home.stat().st_mtime_ns) == before
    assert (device.folder / "home.new").read_bytes() != before[0]


def test_nothing_is_left_by_a_job_that_fails_or_only_evaluates(
    device: Device, spec: AdapterSpec
) -> None:
    task = make_assignment(keeps_state=True, optimizer="sgd", learning_rate=1e30)
    event = run(device.job(spec, task, make_adapter(spec, K), personal_weight=0.1), device.bench)
    assert event[-1]["event"] == "error"
    device.round(spec, make_assignment(local_steps=0, evaluates_global=True, keeps_state=True))
    assert not (device.folder / "home.new").exists() and not device.home.exists()


def test_a_home_holds_arrays_and_identifiers_and_no_code(
    device: Device, spec: AdapterSpec, code_folder: Path
) -> None:
    task = make_assignment(
        personal=("up",), keeps_state=True, error_feedback=True,
        update=Payload(K, "int8", ("down",)),
    )  # fmt: skip
    device.round(spec, task, only(make_adapter(spec, K), "down"), personal_weight=0.1)
    with safe_open(device.home, framework="numpy") as file:
        names = {m.name for m in spec.modules}
        for key in file.keys():  # noqa: SIM118
            assert key.rpartition("/")[2] in names
        facts = json.loads(file.metadata()["home"])
    assert facts.keys() == {"version", "spec_digest", "run_id", "round", "alpha"}
    raw = device.home.read_bytes()
    assert b"weigh_" not in raw and b"values" not in raw and str(code_folder).encode() not in raw
