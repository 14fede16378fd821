"""Devices that cannot take part are told why in one sentence, and their agent ends."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import SECTIONS, Yard, logs
from trials.fleet import DeviceSetup, LocalFleet

pytestmark = pytest.mark.e2e


def last_words(fleet: LocalFleet, name: str) -> str:
    """The sentence an agent ended with; all lines before it are events, none a traceback."""
    *before, last = fleet.log(name).read_text().splitlines()
    assert last.startswith("sketchfleet-agent: "), logs(fleet)
    for line in before:
        assert "traceback" not in json.loads(line), line
    return last


def lonely(yard: Yard, name: str, device: DeviceSetup, base: Path) -> LocalFleet:
    """A fleet that one device is enough for."""
    sections: dict[str, Any] = {
        **SECTIONS,
        "model": {"base": str(base)},
        "round": {**SECTIONS["round"], "min_devices": 1},
    }
    return LocalFleet(yard.folder / name, sections, [device])


def test_a_device_on_which_the_model_does_not_fit_is_told_the_numbers(yard: Yard) -> None:
    tiny = dataclasses.replace(yard.device("lab"), memory_mb=64)
    with lonely(yard, "too-small", tiny, yard.base) as fleet:
        fleet.start()
        yard.await_(fleet, lambda: not fleet.running("lab"), "lab to be refused", ignore="lab")
        assert fleet.processes["lab"].returncode == 1, logs(fleet)
        said = last_words(fleet, "lab")
        assert fleet.running("coordinator"), "one device too small must not end the run"
    assert "cannot train" in said and "more than the 0.06 GB its owner allows" in said
    assert "Traceback" not in logs(fleet, lines=1000)


def test_weights_that_cannot_be_loaded_are_named(yard: Yard) -> None:
    broken = yard.folder / "broken-base"
    shutil.copytree(yard.base, broken)
    (broken / "model.safetensors").write_bytes(b"no tensors")
    with lonely(yard, "broken", yard.device("lab"), broken) as fleet:
        fleet.start()
        yard.await_(fleet, lambda: not fleet.running("lab"), "lab to give up", ignore="lab")
        assert fleet.processes["lab"].returncode == 1, logs(fleet)
        said = last_words(fleet, "lab")
    assert "cannot train" in said and "broken-base cannot be loaded" in said
    assert "Traceback" not in logs(fleet, lines=1000)
