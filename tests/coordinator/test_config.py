"""run.toml: what is right is taken as meant, what is wrong is named in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from coordinator.config import ConfigError, RunConfig, load_config

LEAST = '[run]\nname = "trial"\n[model]\nbase = "org/base"\n'


@pytest.fixture
def load(tmp_path):
    """Loads this text as run.toml."""

    def from_text(text):
        path = tmp_path / "run.toml"
        path.write_text(text)
        return load_config(path)

    return from_text


def refused(load, text, sentence):
    """The text is refused, with the file, that sentence, and on one line."""
    with pytest.raises(ConfigError, match=sentence) as told:
        load(text)
    assert "run.toml" in str(told.value) and "\n" not in str(told.value)


def test_the_least_file_takes_the_defaults(load, tmp_path):
    config = load(LEAST)
    assert (config.run.name, config.model.base) == ("trial", "org/base")
    assert (config.adapter.rank, config.wire.update, config.round.quorum) == (32, "int8", 0.8)
    assert config.server.state == tmp_path / "state"


def test_every_value_of_a_full_file_is_taken(load):
    config = load(
        LEAST
        + """
        [adapter]
        rank = 16
        alpha = 8
        rslora = true
        [training]
        precision = "auto"
        checkpointing = false
        optimizer = "sgd"
        [round]
        quorum = 1
        round_s = 30
        [wire]
        update = "bfloat16"
        [server]
        listen = "[::1]:9000"
        """
    )
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.rslora) == (16, 8.0, True)
    assert config.training.checkpointing is False and config.training.optimizer == "sgd"
    assert (config.round.quorum, config.round.round_s) == (1.0, 30.0)
    assert (config.wire.update, config.server.listen) == ("bfloat16", "[::1]:9000")


def test_relative_folders_are_relative_to_the_file(load, tmp_path, monkeypatch):
    (tmp_path / "nano").mkdir()
    monkeypatch.chdir("/")
    config = load(LEAST.replace("org/base", "nano") + '[server]\nstate = "here/state"\n')
    assert config.model.base == str(tmp_path / "nano")
    assert config.server.state == tmp_path / "here" / "state"
    config = load(LEAST + '[server]\nstate = "/elsewhere"\n')
    assert config.server.state == Path("/elsewhere")
    assert config.model.base == "org/base", "no such folder, so it is a hub id"


def test_the_home_folder_is_understood(load, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = load(LEAST + '[server]\nstate = "~/state"\n')
    assert config.server.state == tmp_path / "home" / "state"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[rnu]\nname = 1\n" + LEAST, r"unknown key 'rnu' in the top level; did you mean 'run'\?"),
        (LEAST + "[round]\nquorom = 1\n", r"unknown key 'quorom' in \[round\]; did you mean 'quor"),
        (LEAST + "[adapter]\nzzz = 1\n", r"'zzz' in \[adapter\]; known keys: alpha, rank, rslora"),
        ('[run]\nname = "x"\n', r"\[model\] is missing"),
        ("[run]\nseed = 1\n[model]\nbase = 'b'\n", r"\[run\] lacks 'name'"),
        (LEAST + "[adapter]\nrank = 'many'\n", r"\[adapter\] rank: .*integer"),
        (LEAST + "[adapter]\nrank = 0\n", r"\[adapter\] rank: .*greater than or equal to 1"),
        (LEAST + "[adapter]\nalpha = nan\n", r"\[adapter\] alpha"),
        (LEAST + "[round]\nmax_round_s = inf\n", r"\[round\] max_round_s: .*finite"),
        (LEAST + "[round]\nquorum = 1.5\n", r"\[round\] quorum: .*less than or equal to 1"),
        (LEAST + "[wire]\nupdate = 'int4'\n", r"\[wire\] update: .*'float32', 'bfloat16' or 'int8"),
        (LEAST + "[training]\nprecision = 'fp8'\n", r"\[training\] precision: .*'nf4', 'int8'"),
        (LEAST + "run2 = 1\n[adapter]\n", r"unknown key 'run2' in \[model\]"),
        (LEAST.replace("trial", "Big Trial"), r"\[run\] name: .*pattern"),
        ("model = 3\n[run]\nname = 'x'\n", r"\[model\] .*: .*valid dictionary"),
        (LEAST + "[adapter]\nrank = 4\n[round]\nmin_rank = 8\n", "min_rank 8 exceeds .* rank 4"),
        (LEAST + "[training]\nlocal_steps = 2\nmin_local_steps = 3\n", "min_local_steps exceeds"),
        (LEAST + "[round]\nround_s = 90\nmax_round_s = 60\n", "round_s exceeds max_round_s"),
        ("[run\n", "is not valid TOML"),
        (LEAST + "[run]\n", "is not valid TOML"),
    ],
)
def test_what_is_wrong_is_named(load, text, sentence):
    refused(load, text, sentence)


@pytest.mark.parametrize("listen", ["0.0.0.0:8470", "192.168.1.5:8470", "[::]:8470", "host:8470"])
def test_an_address_beyond_this_machine_is_refused(load, listen):
    refused(load, LEAST + f'[server]\nlisten = "{listen}"\n', "not a loopback address.*TLS tunnel")


@pytest.mark.parametrize("listen", ["8470", "127.0.0.1", "127.0.0.1:port", "127.0.0.1:70000", ":1"])
def test_an_address_that_is_none_is_refused(load, listen):
    refused(load, LEAST + f'[server]\nlisten = "{listen}"\n', 'must be "address:port"')


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read: No such file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_config(tmp_path / "binary.toml")


def test_the_environment_changes_nothing(load, monkeypatch):
    monkeypatch.setenv("RUN_NAME", "other")
    monkeypatch.setenv("NAME", "other")
    assert load(LEAST).run.name == "trial"


def test_a_configuration_cannot_be_changed_after_reading(load):
    with pytest.raises(ValidationError, match="frozen"):
        load(LEAST).run.name = "other"


def test_a_configuration_survives_the_database(load):
    config = load(LEAST)
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
