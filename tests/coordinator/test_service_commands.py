"""The coordinator as a service: its settings from outside, where its state is, its health."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from coordinator.cli import main
from coordinator.config import ConfigError, load_config, load_layers
from coordinator.server_config import ENVIRONMENT, load_service, usual_state
from coordinator.store.records import Records

RUN = '[run]\nname = "a"\n[model]\nbase = "x/y"\n'


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch) -> Path:
    """A folder of its own to be in, and no settings of whoever runs the tests."""
    for name in ("STATE_DIRECTORY", "XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_toml(nowhere) -> Path:
    path = nowhere / "run.toml"
    path.write_text(RUN)
    return path


def setting(monkeypatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"{ENVIRONMENT}__{name}", value)


# --- settings -------------------------------------------------------------------------------------


def test_options_stand_above_the_environment_above_the_file(run_toml, monkeypatch):
    run_toml.write_text(RUN + "[round]\nquorum = 0.9\nmin_devices = 3\n")
    assert load_config(run_toml).round.quorum == 0.9
    setting(monkeypatch, "ROUND__QUORUM", "0.7")
    found = load_layers(run_toml)
    assert (found.settings.round.quorum, found.settings.round.min_devices) == (0.7, 3)
    assert found.sources["round.quorum"] == f"{ENVIRONMENT}__ROUND__QUORUM"
    assert load_layers(run_toml, ["round.quorum=0.5"]).settings.round.quorum == 0.5


def test_what_does_not_fit_together_names_the_variable(run_toml, monkeypatch):
    setting(monkeypatch, "WEB__LISTEN", "0.0.0.0:9464")
    with pytest.raises(ConfigError, match=r"WEB__LISTEN.*needs a token_file"):
        load_config(run_toml)
    setting(monkeypatch, "WEB__LISTEN", "here")
    with pytest.raises(ConfigError, match=r'WEB__LISTEN.*must be "address:port"'):
        load_service(run_toml)


def test_paths_from_outside_are_relative_to_the_file(nowhere, monkeypatch):
    (nowhere / "etc").mkdir()
    path = nowhere / "etc" / "run.toml"
    path.write_text(RUN)
    setting(monkeypatch, "SERVER__STATE", "kept")
    setting(monkeypatch, "WEB__TOKEN_FILE", "token")
    config = load_config(path)
    assert config.server.state == nowhere / "etc" / "kept"
    assert config.web.token_file == nowhere / "etc" / "token"


def test_config_says_of_every_key_where_it_comes_from(run_toml, monkeypatch, capsys):
    setting(monkeypatch, "ROUND__QUORUM", "0.7")
    assert main(["config", "--json", "--set", "adapter.rank=8"]) == 0
    rows = {(r["section"], r["key"]): r for r in json.loads(capsys.readouterr().out)}
    assert rows["run", "name"]["source"] == "run.toml"
    assert rows["round", "quorum"] == {"section": "round", "key": "quorum", "value": 0.7,
                                       "source": f"{ENVIRONMENT}__ROUND__QUORUM"}  # fmt: skip
    assert rows["adapter", "rank"]["source"] == "--set" and ("web", "listen") not in rows
    assert main(["config", "--effective"]) == 0
    text = capsys.readouterr().out
    assert 'listen = "127.0.0.1:9464"' in text and "# default" in text


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("ROUND__QUORM", "1", "did you mean SKETCHFLEET_COORDINATOR__ROUND__QUORUM?"),
        ("ROUND__QUORUM", "2", "SKETCHFLEET_COORDINATOR__ROUND__QUORUM"),
        ("ROUND", "1", "names no setting"),
    ],
)
def test_a_wrong_variable_ends_with_78_and_names_it(
    run_toml, monkeypatch, capsys, name, value, sentence
):
    setting(monkeypatch, name, value)
    assert main(["config"]) == 78
    assert sentence in capsys.readouterr().err


# --- where the state is ---------------------------------------------------------------------------


def test_the_state_is_that_of_the_run_toml_that_would_be_served(run_toml, nowhere, monkeypatch):
    assert usual_state() == nowhere / "state"
    run_toml.write_text(RUN + '[server]\nstate = "kept"\n')
    assert usual_state() == nowhere / "kept"
    monkeypatch.setenv("STATE_DIRECTORY", str(nowhere / "systemd"))
    assert usual_state() == nowhere / "kept"
    run_toml.write_text(RUN)
    assert usual_state() == nowhere / "systemd" == load_config(run_toml).server.state
    setting(monkeypatch, "SERVER__STATE", str(nowhere / "told"))
    assert usual_state() == nowhere / "told" == load_config(run_toml).server.state


def test_without_a_run_toml_the_state_is_here(nowhere):
    assert usual_state() == nowhere / "state"


def test_commands_find_the_state_by_themselves(run_toml, nowhere, capsys):
    (nowhere / "kept").mkdir()
    run_toml.write_text(RUN + '[server]\nstate = "kept"\n[round]\nquorum = "not looked at"\n')
    Records(nowhere / "kept" / "coordinator.sqlite").close()
    assert main(["devices", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_a_variable_of_another_section_does_not_trouble_them(run_toml, monkeypatch, nowhere):
    setting(monkeypatch, "ROUND__QUORUM", "0.5")
    assert usual_state() == nowhere / "state"


# --- health ---------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch) -> Iterator[HTTPServer]:
    """A web server in place of a coordinator's; its `answer` is (status, body)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = self.server.answer if self.path == "/healthz" else (404, b"")
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        setting(monkeypatch, "WEB__LISTEN", f"127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()


def test_a_coordinator_that_is_well_ends_the_check_with_0(run_toml, asked, capsys):
    asked.answer = (200, b'{"status": "ok"}')
    assert main(["healthcheck"]) == 0
    assert json.loads(capsys.readouterr().out) == {"status": "ok"}


def test_one_whose_database_is_gone_ends_it_with_1_and_why(run_toml, asked, capsys):
    asked.answer = (503, b'{"status": "unavailable", "database": false}')
    assert main(["healthcheck"]) == 1
    said = capsys.readouterr()
    assert "is not well" in said.err and '"database": false' in said.err and not said.out


def test_one_that_listens_everywhere_is_asked_here(run_toml, asked, monkeypatch, nowhere):
    (nowhere / "token").write_text("t" * 32)
    asked.answer = (200, b"{}")
    setting(monkeypatch, "WEB__LISTEN", f"0.0.0.0:{asked.server_port}")
    setting(monkeypatch, "WEB__TOKEN_FILE", "token")
    assert main(["healthcheck"]) == 0


def test_nobody_there_ends_it_with_1_and_says_where(run_toml, monkeypatch, capsys):
    setting(monkeypatch, "WEB__LISTEN", "127.0.0.1:1")
    assert main(["healthcheck", "--timeout", "0.5"]) == 1
    assert "no coordinator answers at 127.0.0.1:1" in capsys.readouterr().err
    setting(monkeypatch, "WEB__LISTEN", "")
    assert main(["healthcheck"]) == 1
    assert "nobody can be asked" in capsys.readouterr().err


def test_the_check_loads_nothing_that_it_does_not_need(run_toml):
    import subprocess
    import sys

    root = Path(__file__).resolve().parents[2]
    script = (
        "import sys\nfrom coordinator.cli import main\n"
        "main(['healthcheck', '--set', 'web.listen=127.0.0.1:1'])\n"
        "print(*{'numpy', 'sqlalchemy', 'grpc', 'uvicorn', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          check=True, env={"PYTHONPATH": str(root)})  # fmt: skip
    assert done.stdout.split() == []
