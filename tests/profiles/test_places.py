"""Standard places of settings and state."""

from __future__ import annotations

from pathlib import Path

import pytest

from profiles.places import config_places, find_config, state_folder, system_config


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_settings_are_looked_for_here_then_with_the_user_then_with_the_system(home):
    assert config_places("a.toml", {}) == (
        Path("a.toml"), home / ".config/sketchfleet/a.toml", Path("/etc/sketchfleet/a.toml")
    )  # fmt: skip
    assert config_places("a.toml", {"XDG_CONFIG_HOME": "/x"})[1] == Path("/x/sketchfleet/a.toml")
    assert config_places("a.toml", {"XDG_CONFIG_HOME": "not/absolute"})[1].is_absolute()
    assert find_config("a.toml", {}) is None
    own = home / ".config/sketchfleet/a.toml"
    own.parent.mkdir(parents=True)
    own.touch()
    assert find_config("a.toml", {}) == own
    Path("a.toml").touch()
    assert find_config("a.toml", {}) == Path("a.toml")


@pytest.mark.parametrize(
    "config, environ, state",
    [
        ("/etc/sketchfleet/agent.toml", {}, "/var/lib/sketchfleet/agent"),
        ("/root2/etc/sketchfleet/agent.toml", {}, "/root2/var/lib/sketchfleet/agent"),
        ("/srv/here/agent.toml", {}, "/srv/here/beside"),
        ("/srv/here/agent.toml", {"STATE_DIRECTORY": "/run/a:/run/b"}, "/run/a"),
        ("/x/sketchfleet/agent.toml", {"XDG_CONFIG_HOME": "/x", "XDG_STATE_HOME": "/y"},
         "/y/sketchfleet/agent"),
        (None, {"XDG_STATE_HOME": "/y"}, "/y/sketchfleet/agent"),
    ],
)  # fmt: skip
def test_state_lies_in_the_standard_place_of_its_settings(home, config, environ, state):
    found, source = state_folder("agent", config and Path(config), "beside", environ)
    assert found == Path(state)
    assert source == ("STATE_DIRECTORY" if "STATE_DIRECTORY" in environ else "default")


def test_a_users_state_is_in_the_home_folder(home):
    config = home / ".config/sketchfleet/agent.toml"
    assert state_folder("agent", config, "beside", {})[0] == home / ".local/state/sketchfleet/agent"


@pytest.mark.parametrize(
    "prefix, found",
    [
        ("/opt/sketchfleet/agent/versions/1", "/etc/sketchfleet"),
        ("/srv/a/opt/sketchfleet/agent/versions/1", "/srv/a/etc/sketchfleet"),
        ("/usr", "/etc/sketchfleet"),
    ],
)
def test_an_installation_below_another_root_has_its_settings_there(prefix, found):
    assert system_config(Path(prefix)) == Path(found)
