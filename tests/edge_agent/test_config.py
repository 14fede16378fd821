"""agent.toml: what is right is taken as meant, what is wrong is named in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_agent.cli import main
from edge_agent.config import AgentConfigError, load_agent_config, read_agent_config
from edge_agent.training.connectors import DataSelection
from edge_agent.training.git_history import GitRange
from protos.contract import from_plain, to_plain

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
    assert config.coordinator.address == "", "as enrolling told"
    assert not config.coordinator.plain_text
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


def test_policy_and_network_are_taken_and_their_defaults_forbid_little(load):
    least = load(LEAST)
    assert (least.policy.owner, least.policy.on_battery) == ("dedicated", "never")
    assert least.policy.hours == () and least.policy.pause_above_c is None
    assert (least.network.metered, least.network.daily_mb) == ("auto", None)
    full = load(
        LEAST
        + """
        [policy]
        hours = ["22:00-06:30", "12:00-13:00"]
        on_battery = 60
        pause_above_c = 85
        resume_below_c = 70
        owner = "idle-only"
        leave_memory_mb = 2000
        [network]
        metered = "yes"
        daily_mb = 500
        """
    )
    assert full.policy.on_battery == 60 and full.policy.hours[0] == "22:00-06:30"
    assert (full.network.metered, full.network.daily_mb) == ("yes", 500)


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


def test_the_sources_and_tests_of_a_device_reach_the_trainer_with_absolute_paths(load, tmp_path):
    (tmp_path / "set").mkdir()
    config = load(
        '[data]\njsonl = ["a.jsonl"]\nparquet = ["/p/*.parquet"]\ndataset = "set"\n'
        'prompt_key = "q"\ncompletion_key = "a"\nmax_mb = 2\n'
        '[evaluation]\nproblems = "he.jsonl.gz"\nsamples = 5\n'
    )
    chosen = config.selection
    assert chosen.jsonl == (str(tmp_path / "a.jsonl"),) and chosen.parquet == ("/p/*.parquet",)
    assert (chosen.dataset, chosen.max_bytes) == (str(tmp_path / "set"), 2_000_000)
    assert chosen.keys.wanted == ("q", "a") and chosen.git is None
    assert chosen.problems is not None and chosen.problems.samples == 5
    assert chosen.problems.path == str(tmp_path / "he.jsonl.gz")
    assert from_plain(DataSelection, json.loads(json.dumps(to_plain(chosen)))) == chosen
    assert load(LEAST).selection.problems is None, "no program runs unless the owner asks"

    git = load('[data]\ngit = "repo"\ngit_cutoff = "2026-01-31"\n').selection.git
    assert git == GitRange(str(tmp_path / "repo"), "2026-01-31")
    assert load('[data]\ndataset = "org/name"\n').selection.dataset == "org/name"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            LEAST + "[limits]\nmemory_mp = 1\n",
            r"'memory_mp' in \[limits\]; did you mean 'memory_mb'\?",
        ),
        (LEAST + "[devise]\nname = 'x'\n", r"'devise' in the top level; did you mean 'device'\?"),
        (
            LEAST + "zzz = 1\n",
            r"unknown key 'zzz' in \[data\]; known keys: completion_key, dataset,",
        ),
        ("[device]\nname = 'x'\n", r"\[data\] is missing"),
        (
            "[data]\n",
            r"\[data\].* names no data; give include, jsonl, parquet, dataset, git or labelled",
        ),
        ("[data]\ninclude = []\n", r"\[data\].* names no data"),
        (LEAST + "git = '.'\ngit_cutoff = 'v1'\n", r"git stands alone, but include is named too"),
        ("[data]\ngit = '.'\n", r"git and git_cutoff go together"),
        (LEAST + "git_since = 'v1'\n", r"git_since needs git"),
        ("[data]\njsonl = ['a']\nprompt_key = 'q'\n", r"prompt_key and completion_key go together"),
        ("[data]\njsonl = ['a']\nlanguages = ['c']\n", r"languages needs language_key"),
        (LEAST + "max_mb = 0\n", r"\[data\] max_mb: .*greater than or equal to 1"),
        (LEAST + "[evaluation]\nsamples = 0\n", r"\[evaluation\] samples: .*greater than or equal"),
        (LEAST + "[evaluation]\nproblem = 'x'\n", r"in \[evaluation\]; did you mean 'problems'"),
        ("[data]\ninclude = 'code'\n", r"\[data\] include: .*valid tuple"),
        (
            LEAST + "[limits]\nmemory_mb = 10\n",
            r"\[limits\] memory_mb: .*greater than or equal to 64",
        ),
        (LEAST + "[limits]\nthreads = 'all'\n", r"\[limits\] threads: .*integer"),
        (LEAST + "[trainer]\nidle_s = inf\n", r"\[trainer\] idle_s: .*finite number"),
        (
            LEAST + "[policy]\nhours = ['9 to 5']\n",
            r"\[policy\] hours: '9 to 5' must be a range of local times, for example",
        ),
        (LEAST + "[policy]\non_battery = 0\n", r'\[policy\] on_battery: must be "never", "alw'),
        (LEAST + "[policy]\nowner = 'me'\n", r"\[policy\] owner: .*'background' or 'idle-only'"),
        (
            LEAST + "[policy]\nresume_below_c = 60\n",
            r"\[policy\] .*resume_below_c must be below pause_above_c",
        ),
        (LEAST + "[network]\ndaily_mb = 0\n", r"\[network\] daily_mb: .*greater than or equal"),
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
    ["8470", "coordinator", "host:", ":8470", "host:port", "host:70000", "::1:8470",
     "http://host:8470", "ho st:8470", "host:8470 "],
)  # fmt: skip
def test_an_address_that_is_none_is_told_with_an_example(load, address):
    with pytest.raises(AgentConfigError, match=r"\[coordinator\] address: must be .*127\.0\.0\.1:"):
        load(LEAST + f'[coordinator]\naddress = "{address}"\n')


@pytest.mark.parametrize("address", ["fleet.lab:8470", "10.0.0.7:1", "[::1]:65535", "my_pc:80"])
def test_hosts_by_name_and_number_are_taken(load, address):
    config = load(LEAST + f'[coordinator]\naddress = "{address}"\n')
    assert config.coordinator.address == address


def test_plain_text_stays_within_one_machine(load):
    text = LEAST + "[coordinator]\nplain_text = true\n"
    assert load(text).coordinator.plain_text
    load(text + 'address = "[::1]:8470"\n')
    for address in ("fleet.lab:8470", "10.0.0.7:8470"):
        with pytest.raises(AgentConfigError, match="another; join with `sketchfleet-agent enroll`"):
            load(text + f'address = "{address}"\n')


def test_certificates_of_the_owners_pki_come_together(load, tmp_path):
    text = LEAST + '[coordinator]\naddress = "fleet.lab:8470"\nca = "ca.pem"\n'
    with pytest.raises(AgentConfigError, match="needs ca, certificate and key together"):
        load(text)
    found = load(text + 'certificate = "a.pem"\nkey = "a.key"\n').coordinator.own_pki
    assert found == tuple(tmp_path / name for name in ("ca.pem", "a.pem", "a.key"))


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(AgentConfigError, match=r"none\.toml cannot be read: No such file"):
        load_agent_config(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(AgentConfigError, match="is not valid TOML"):
        load_agent_config(tmp_path / "binary.toml")


def test_settings_come_from_flags_environment_file_and_defaults_in_this_order(tmp_path):
    path = tmp_path / "agent.toml"
    path.write_text(LEAST + "[limits]\nthreads = 2\nmemory_mb = 100\n[trainer]\nidle_s = 7\n")
    environ = {"SKETCHFLEET_AGENT__LIMITS__THREADS": "3",
               "SKETCHFLEET_AGENT__LIMITS__MEMORY_MB": "200"}  # fmt: skip
    found = read_agent_config(path, ["limits.threads=4"], environ)
    config = found.settings
    assert (config.limits.threads, config.limits.memory_mb, config.trainer.idle_s) == (4, 200, 7)
    assert config.data.max_mb == 64
    assert found.sources["limits.memory_mb"] == "SKETCHFLEET_AGENT__LIMITS__MEMORY_MB"


def test_a_container_needs_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    environ = {"SKETCHFLEET_AGENT__DATA__INCLUDE": "code", "STATE_DIRECTORY": "/state"}
    found = read_agent_config(None, (), environ)
    assert found.settings.data.include == (str(tmp_path / "code"),)
    assert found.settings.state.folder == Path("/state")
    assert found.sources["state.folder"] == "STATE_DIRECTORY"
    with pytest.raises(AgentConfigError, match=r"no agent.toml in the standard places"):
        read_agent_config(None, (), {})


def test_a_state_folder_of_the_settings_stands_above_the_standard_place(load, monkeypatch):
    monkeypatch.setenv("STATE_DIRECTORY", "/state")
    assert load(LEAST + '[state]\nfolder = "/mine"\n').state.folder == Path("/mine")


def test_the_settings_that_are_shown_can_be_read_again(tmp_path, capsys):
    path = tmp_path / "agent.toml"
    path.write_text(LEAST)
    assert main(["config", "--effective", "--config", str(path), "--set", "limits.threads=3"]) == 0
    shown = capsys.readouterr().out
    assert "threads = 3" in shown and "# --set" in shown and "# default" in shown
    again = tmp_path / "again.toml"
    again.write_text(shown)
    first = load_agent_config(path, ["limits.threads=3"])
    assert load_agent_config(again).model_dump() == first.model_dump()
