"""Settings in layers: a file, the environment above it, `--set` above both."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, SecretStr, model_validator

from profiles.errors import SketchfleetError
from profiles.layers import Layered, load_layered, settings_in_force, settings_text
from profiles.settings import Section, parse_toml


class RefusedError(SketchfleetError):
    pass


class Limits(Section):
    threads: Annotated[int, Field(ge=1)] = 1
    memory_mb: int | None = None
    on_battery: str | int = "never"
    share: float = 0.5
    plain: bool = False


class Data(Section):
    include: tuple[str, ...] = ()
    place: Path = Path("here")
    kind: Literal["text", "code"] = "text"
    address: str = ""
    secret: SecretStr = SecretStr("hush")
    git: str = ""
    cutoff: str = ""

    @model_validator(mode="after")
    def _together(self):
        if bool(self.git) != bool(self.cutoff):
            raise ValueError("git and cutoff go together")
        return self


class Settings(Section):
    data: Data
    limits: Limits = Limits()
    pki: Limits | None = None


@pytest.fixture
def load(tmp_path):
    def with_these(text="[data]\n", given=(), **environ):
        path = tmp_path / "agent.toml"
        path.write_text(text)
        named = {name.replace("X__", "FLEET_X__"): value for name, value in environ.items()}
        return load_layered(path, Settings, RefusedError, "FLEET_X", given, named)

    return with_these


def test_set_beats_the_environment_beats_the_file_beats_the_default(load, tmp_path):
    file = "[data]\n[limits]\nthreads = 2\nmemory_mb = 100\nshare = 0.1\n"
    found = load(file, ["limits.threads=4"], X__LIMITS__THREADS="3", X__LIMITS__MEMORY_MB="200")
    limits = found.settings.limits
    assert (limits.threads, limits.memory_mb, limits.share, limits.plain) == (4, 200, 0.1, False)
    assert found.sources == {
        "limits.threads": "--set",
        "limits.memory_mb": "FLEET_X__LIMITS__MEMORY_MB",
        "limits.share": str(tmp_path / "agent.toml"),
    }


@pytest.mark.parametrize(
    "section, key, text, value",
    [
        ("data", "include", "/srv/code", ("/srv/code",)),
        ("data", "include", '["a,b", "c"]', ("a,b", "c")),
        ("data", "place", "/x", Path("/x")),
        ("data", "address", "127", "127"),
        ("limits", "plain", "true", True),
        ("limits", "on_battery", "30", 30),
        ("limits", "on_battery", "always", "always"),
        ("pki", "threads", "7", 7),
    ],
)
def test_text_becomes_what_the_key_takes(load, section, key, text, value):
    found = load(**{f"X__{section.upper()}__{key.upper()}": text})
    assert getattr(getattr(found.settings, section), key) == value


def test_without_a_file_the_environment_suffices():
    found = load_layered(None, Settings, RefusedError, "X", (), {"X__DATA__INCLUDE": "/srv"})
    assert found.settings.data.include == ("/srv",)


@pytest.mark.parametrize(
    "given, environ, told",
    [
        ((), {"X__LIMITS__THREDS": "2"},
         "FLEET_X__LIMITS__THREDS names unknown key 'threds' in [limits]; did you mean "
         "FLEET_X__LIMITS__THREADS?"),
        ((), {"X__LIMIT__THREADS": "2"}, "did you mean FLEET_X__LIMITS__THREADS?"),
        ((), {"X__LIMITS__QQ": "2"}, "known keys of [limits]: memory_mb, on_battery"),
        ((), {"X__THREADS": "2"}, "FLEET_X__THREADS names no setting; write FLEET_X__SECTION__KEY"),
        ((), {"X__LIMITS__THREADS": "many"}, "FLEET_X__LIMITS__THREADS: [limits] threads: Input "),
        ((), {"X__DATA__INCLUDE": "[1"}, "FLEET_X__DATA__INCLUDE is not valid TOML"),
        ((), {"X__DATA__GIT": "."}, "agent.toml with FLEET_X__DATA__GIT: [data] git and cutoff"),
        (["threads"], {}, "--set threads is not understood; write --set section.key=value"),
        (["limits.threads=0"], {}, "--set limits.threads: [limits] threads: Input should be"),
        (["limits.thread=1"], {}, "did you mean --set limits.threads?"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_the_name_of_the_variable(load, given, environ, told):
    with pytest.raises(RefusedError) as refused:
        load(given=given, **environ)
    assert told in str(refused.value)


def test_a_mistake_in_the_file_is_told_with_its_name_though_variables_are_set(load):
    with pytest.raises(RefusedError, match=r"agent.toml: \[limits\] share"):
        load('[data]\n[limits]\nshare = "x"\n', X__LIMITS__THREADS="2")


def test_what_is_in_force_is_shown_with_its_source_and_can_be_read_again(load):
    found = load(X__DATA__INCLUDE='["a\\"b"]', X__LIMITS__MEMORY_MB="9")
    rows = settings_in_force(found, everything=False)
    assert [(r.key, r.source) for r in rows] == [
        ("include", "FLEET_X__DATA__INCLUDE"), ("memory_mb", "FLEET_X__LIMITS__MEMORY_MB")
    ]  # fmt: skip
    text = settings_text(settings_in_force(found, everything=True))
    plain = parse_toml(text, "shown", RefusedError)
    assert plain["data"]["include"] == ['a"b']
    assert plain["limits"]["threads"] == 1
    assert "# default" in text


def test_secrets_are_not_shown(load):
    found = load(X__DATA__ADDRESS="https://me:hunter2@hub/x", X__DATA__SECRET="hunter2")
    shown = settings_text(settings_in_force(Layered(found.settings, found.sources), True))
    assert "hunter2" not in shown
    assert "https://**********@hub/x" in shown
