"""The product's own path, with real processes: init, a token, enrolling, rounds over mutual TLS."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from coordinator.store.records import Records
from tests.e2e.conftest import SECTIONS, logs
from trials.fleet import LocalFleet, environment, write_toml

pytestmark = pytest.mark.e2e


def command(module, *arguments):
    """Runs a command; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True,
        env=environment(), timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_device_joins_works_renews_and_is_shut_out(yard, tmp_path):
    sections = {**SECTIONS, "model": {"base": str(yard.base)},
                "run": {**SECTIONS["run"], "rounds": 40},
                "round": {**SECTIONS["round"], "min_devices": 1, "round_s": 20},
                "server": {"credential_days": 20 / 86400}}  # fmt: skip
    desk = yard.device("desk")
    with LocalFleet(tmp_path / "fleet", sections, [desk], secured=True) as fleet:
        fleet.start_coordinator()
        fleet.await_token()
        word = command("coordinator.cli", "token", "create", "--state", fleet.state,
                       "--address", f"127.0.0.1:{fleet.joining_port}").strip()  # fmt: skip
        folder = fleet.folder / "desk"
        folder.mkdir()
        write_toml(folder / "agent.toml", {
            "device": {"name": "desk"}, "state": {"folder": "state"},
            "data": {"include": list(desk.include)},
        })  # fmt: skip
        said = command("edge_agent.cli", "enroll", word, "--config", folder / "agent.toml")
        assert said == f"desk has joined the fleet at 127.0.0.1:{fleet.port}\n"
        fleet.start_agent(desk)
        records, until = Records(fleet.state / "coordinator.sqlite"), time.monotonic() + 120
        while time.monotonic() < until and not (
            any(r.phase == "merged" for r in records.all_rounds("yard"))
            and "certificate renewed" in fleet.log("desk").read_text()
        ):
            fleet.check("coordinator")
            fleet.check("desk")
            time.sleep(0.1)
        records.close()
        assert "certificate renewed" in fleet.log("desk").read_text(), logs(fleet)
        (device,) = json.loads(command("coordinator.cli", "devices", "--state", fleet.state,
                                       "--json"))  # fmt: skip
        assert device["state"] == "active" and device["profile"]
        command("coordinator.cli", "revoke", "desk", "--state", fleet.state)
        fleet.processes["desk"].wait(60)
    last = fleet.log("desk").read_text().splitlines()[-1]
    assert last.startswith("sketchfleet-agent: this certificate is not one of the fleet's"), logs(
        fleet
    )
    secret = word.partition("@")[0].partition(".")[2]
    written = [fleet.log("desk"), fleet.log("coordinator"), *fleet.state.rglob("*.sqlite*")]
    assert not any(secret.encode() in path.read_bytes() for path in written)
