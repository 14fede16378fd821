"""agent.toml: what is right is taken as meant, what is wrong is named in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.config import AgentConfigError, load_agent_config

LEAST = '[data]\ninclude = ["code"]\n'


@pytest.fixture
def load(tmp_path):
    """Loads this text as agent.toml."""

    def from_text(text):
        path = tmp_path / "agent.toml"
        path.write_text(text)
        return load_agent_config(path)

    return from_text


def test_the_least_file_takes_the_defaults(load, tmp_path):
    config = load(LEAST)
    assert config.data.include == (str(tmp_path / "code"),)
    assert config.coordinator.address == "127.0.0.1:8470"
    assert (config.limits.memory_mb, config.limits.threads) == (None, 1)
    assert config.state.folder == tmp_path / "agent-state"
    assert config.personal.ditto == 0.0, "an adapter of its own is the owner's choice"


def test_every_value_of_a_full_file_is_taken(load):
    config = load(
        """
        [device]
        name = "pi-5.lab"
        board = "Raspberry Pi 5"
        [coordinator]
        address = "127.0.0.1:9000"
        [data]
        include = ["a", "b"]
        exclude = ["*/vendor/*"]
        languages = ["python"]
        max_files = 10
        [limits]
        memory_mb = 2000
        threads = 2
        [trainer]
        python = "/opt/python"
        idle_s = 5
        [personal]
        ditto = 0.1
        """
    )
    assert (config.device.name, config.device.board) == ("pi-5.lab", "Raspberry Pi 5")
    assert (config.data.exclude, config.data.languages) == (("*/vendor/*",), ("python",))
    assert (config.limits.memory_mb, config.trainer.idle_s) == (2000, 5.0)
    assert config.personal.ditto == 0.1


@pytest.mark.parametrize(
    ("host", "name"),
    [("Lab-PC", "lab-pc"), ("über host", "ber-host"), ("...", "device"), ("x" * 80, "x" * 63)],
)
def test_a_device_without_a_name_takes_its_host_name_made_usable(load, monkeypatch, host, name):
    monkeypatch.setattr("edge_agent.config.socket.gethostname", lambda: host)
    assert load(LEAST).device.name == name


def test_relative_folders_are_relative_to_the_file(load, tmp_path, monkeypatch):
    (tmp_path / "nano").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir("/")
    config = load(
        '[data]\ninclude = ["src/**/*.py", "/usr/include", "~/code"]\n'
        '[model]\nbase = "nano"\n[state]\nfolder = "mine"\n[coordinator]\ntoken_file = "t"\n'
    )
    assert config.data.include == (
        str(tmp_path / "src/**/*.py"), "/usr/include", str(tmp_path / "home" / "code")
    )  # fmt: skip
    assert config.model.base == str(tmp_path / "nano")
    assert config.state.folder == tmp_path / "mine"
    assert config.coordinator.token_file == tmp_path / "t"
    assert load(LEAST + '[model]\nbase = "org/base"\n').model.base == "org/base"
    assert load(LEAST + '[state]\nfolder = "/var/x"\n').state.folder == Path("/var/x")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            LEAST + "[limits]\nmemory_mp = 1\n",
            r"'memory_mp' in \[limits\]; did you mean 'memory_mb'\?",
        ),
        (LEAST + "[devise]\nname = 'x'\n", r"'devise' in the top level; did you mean 'device'\?"),
        (LEAST + "zzz = 1\n", r"unknown key 'zzz' in \[data\]; known keys: exclude, inc"),
        ("[device]\nname = 'x'\n", r"\[data\] is missing"),
        ("[data]\n", r"\[data\] lacks 'include'"),
        ("[data]\ninclude = []\n", r"\[data\] include: .*at least 1 item"),
        ("[data]\ninclude = 'code'\n", r"\[data\] include: .*valid tuple"),
        (
            LEAST + "[limits]\nmemory_mb = 10\n",
            r"\[limits\] memory_mb: .*greater than or equal to 64",
        ),
        (LEAST + "[limits]\nthreads = 'all'\n", r"\[limits\] threads: .*integer"),
        (LEAST + "[trainer]\nidle_s = inf\n", r"\[trainer\] idle_s: .*finite number"),
        (LEAST + "[personal]\nditto = -1\n", r"\[personal\] ditto: .*greater than or equal to 0"),
        (LEAST + "[personal]\nlambda = 1\n", r"'lambda' in \[personal\]; known keys: ditto"),
        (LEAST + "[device]\nname = 'My Board'\n", r"\[device\] name: .*pattern"),
        ("[data\n", "is not valid TOML"),
        (LEAST + LEAST, "is not valid TOML"),
    ],
)
def test_what_is_wrong_is_named(load, text, sentence):
    with pytest.raises(AgentConfigError, match=sentence) as told:
        load(text)
    assert "agent.toml" in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    "address",
    ["", "8470", "coordinator", "host:", ":8470", "host:port", "host:70000", "::1:8470",
     "http://host:8470", "ho st:8470", "host:8470 "],
)  # fmt: skip
def test_an_address_that_is_none_is_told_with_an_example(load, address):
    with pytest.raises(AgentConfigError, match=r"\[coordinator\] address: must be .*127\.0\.0\.1:"):
        load(LEAST + f'[coordinator]\naddress = "{address}"\n')


@pytest.mark.parametrize("address", ["fleet.lab:8470", "10.0.0.7:1", "[::1]:65535", "my_pc:80"])
def test_hosts_by_name_and_number_are_taken(load, address):
    config = load(LEAST + f'[coordinator]\naddress = "{address}"\n')
    assert config.coordinator.address == address


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(AgentConfigError, match=r"none\.toml cannot be read: No such file"):
        load_agent_config(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(AgentConfigError, match="is not valid TOML"):
        load_agent_config(tmp_path / "binary.toml")
