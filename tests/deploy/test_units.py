"""systemd's own tools on the units."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from coordinator.config import RunConfig
from edge_agent.config import AgentConfig
from profiles.settings import fields_of

from .conftest import INSTALLER

UNITS = INSTALLER.parent / "systemd"
MOST_EXPOSURE = 3.0
ROLES = ("agent", "coordinator")


@pytest.fixture
def unit(tmp_path, request):
    """The unit of a role, with a program that is there in place of the one it starts."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not on this machine")
    name = f"sketchfleet-{request.param}.service"
    text = (UNITS / name).read_text()
    placed = tmp_path / name
    placed.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE))
    return placed


def analyze(*words):
    return subprocess.run(
        ["systemd-analyze", *words], capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.parametrize("unit", ROLES, indirect=True)
def test_systemd_finds_nothing_wrong(unit):
    done = analyze("verify", "--man=no", unit)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unit", ROLES, indirect=True)
def test_the_drop_ins_fit_their_unit_and_name_settings_that_are_there(unit):
    role = unit.stem.removeprefix("sketchfleet-")
    given = UNITS / f"credentials-{role}.conf"
    folder = unit.with_name(f"{unit.name}.d")
    folder.mkdir()
    shutil.copy(given, folder / "credentials.conf")
    done = analyze("verify", "--man=no", unit)
    assert (done.returncode, done.stderr) == (0, "")
    (folder / "credentials.conf").write_text("[Service]\nNonsense=1\n")
    assert "Nonsense" in analyze("verify", "--man=no", unit).stderr, "drop-ins are not looked at"
    section, key = re.findall(r"__([A-Z]+)__([A-Z_]+)=", given.read_text())[0]
    config = AgentConfig if role == "agent" else RunConfig
    assert key.lower() in fields_of(fields_of(config)[section.lower()])


@pytest.mark.parametrize("unit", ROLES, indirect=True)
def test_little_of_the_system_is_exposed(unit):
    done = analyze("security", "--offline=true", "--no-pager", unit)
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze cannot look at a unit that is not installed")
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found is not None, done.stderr
    assert float(found[1]) < MOST_EXPOSURE


@pytest.mark.parametrize("role", ROLES)
def test_units_start_what_the_installer_puts_there(role):
    text = (UNITS / f"sketchfleet-{role}.service").read_text()
    script = INSTALLER.read_text()
    assert f"ExecStart=/opt/sketchfleet/{role}/current/bin/sketchfleet-{role} " in text
    assert "home=$root/opt/sketchfleet/$role" in script and "$home/current/bin/$program" in script
    assert f"User=sketchfleet-{role}" in text and "user=sketchfleet-$role" in script
    assert "Type=notify" in text and "WatchdogSec=" in text


@pytest.mark.parametrize("hidden", ["PrivateDevices=", "MemoryDenyWriteExecute=", "DevicePolicy="])
def test_the_agent_can_reach_its_gpu(hidden):
    lines = (UNITS / "sketchfleet-agent.service").read_text().splitlines()
    assert not [line for line in lines if line.startswith(hidden)]
