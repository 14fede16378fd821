"""The commands as a person meets them: help that is quick, and one clear sentence for bad input."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from trials.fleet import free_port, write_toml

ROOT = Path(__file__).resolve().parent.parent
HELP_CPU_S = 0.3
HEAVY = ("torch", "transformers", "grpc", "sqlalchemy", "matplotlib", "rich", "numpy", "psutil",
         "pydantic")  # fmt: skip
PROGRAMS = ("coordinator.cli", "edge_agent.cli", "trials.cli")
EVERY_HELP = """
import argparse, contextlib, io, sys
from {module} import main, make_parser
def ways(parser, words=()):
    yield words
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            told = {{choice.dest for choice in action._choices_actions if choice.help}}
            assert told == set(action.choices), f"without a word of help: {{words}}"
            for name, inner in action.choices.items():
                yield from ways(inner, (*words, name))
for words in ways(make_parser()):
    said = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(said):
        main([*words, "--help"])
    assert said.getvalue().startswith("usage: sketchfleet-"), words
print(*sorted(set(sys.modules) & set({heavy})))
"""
LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 32,
}


@dataclass(frozen=True)
class Said:
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line on standard error."""
        lines = self.err.strip().splitlines()
        return lines[-1] if lines else ""


def run(module: str, *arguments: str, timeout_s: float = 60) -> Said:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True, text=True, timeout=timeout_s, cwd=ROOT, check=False,
    )  # fmt: skip
    return Said(done.returncode, done.stdout, done.stderr)


def assert_one_sentence(said: Said, *words: str, logs_first: bool = False) -> None:
    """Non-zero exit and one line for a person that holds these words; never a traceback."""
    assert said.code not in (0, 130), f"ended well: {said}"
    assert "traceback" not in (said.out + said.err).lower(), said.err
    assert said.last.startswith("sketchfleet-"), said.err
    for word in words:
        assert word in said.last, f"{word!r} is not in: {said.last}"
    for line in said.err.strip().splitlines()[:-1]:
        assert logs_first and "event" in json.loads(line), f"more than the sentence: {said.err}"


# --- help -------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", PROGRAMS)
def test_help_takes_under_a_third_of_a_second(module: str) -> None:
    best = min(_help_cpu_s(module) for _ in range(2))  # other work on the machine only adds
    assert best < HELP_CPU_S, f"{best:.2f} s of processor time"


def _help_cpu_s(module: str) -> float:
    with subprocess.Popen(
        [sys.executable, "-m", module, "--help"], stdout=subprocess.PIPE, cwd=ROOT
    ) as child:
        assert child.stdout is not None
        text = child.stdout.read().decode()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0 and text.startswith("usage: sketchfleet-"), text
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("module", PROGRAMS)
def test_the_help_of_every_command_imports_nothing_heavy(module: str) -> None:
    script = EVERY_HELP.format(module=module, heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


# --- run.toml ---------------------------------------------------------------------------------


def model_folder(folder: Path, config: Mapping[str, Any] = LLAMA, weights: bytes = b"w") -> Path:
    """What a coordinator reads of a base: dimensions, and bytes to take a digest of."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def run_toml(folder: Path, **changes: Mapping[str, Any]) -> Path:
    """A run.toml over a base beside it; `changes` are merged into its sections."""
    base = folder / "base"
    if not base.exists():
        model_folder(base)
    sections: dict[str, dict[str, Any]] = {
        "run": {"name": "cli"},
        "model": {"base": "base"},
        "adapter": {"rank": 4},
        "server": {"listen": f"127.0.0.1:{free_port()}", "state": "state", "plain_text": True},
        "web": {"listen": ""},
    }
    for name, change in changes.items():
        sections[name] = sections.get(name, {}) | dict(change)
    write_toml(folder / "run.toml", sections)
    return folder / "run.toml"


def serve(config: Path, *arguments: str) -> Said:
    return run("coordinator.cli", "serve", "--config", str(config), *arguments)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[run\nname = 1", ["not valid TOML", "line 1"]),
        ("\xff\xfe", ["not valid TOML"]),
        ("", ["[run] is missing"]),
        ("[run]\nname = 'a'\n", ["[model] is missing"]),
        ("[run]\nseed = 1\n[model]\nbase = 'b'\n", ["[run] lacks 'name'"]),
        ("[run]\nname = 'a'\nround = 3\n[model]\nbase = 'b'\n", ["'round'", "mean 'rounds'"]),
        ("[run]\nname = 'a'\n[modle]\nbase = 'b'\n", ["'modle'", "mean 'model'"]),
        ("[run]\nname = 'a'\nrounds = 'x'\n[model]\nbase = 'b'\n", ["[run] rounds", "integer"]),
        ("[run]\nname = 'A b'\n[model]\nbase = 'b'\n", ["[run] name"]),
        ("run = 3\n[model]\nbase = 'b'\n", ["[run]"]),
        ("[run]\nname = 'a'\n[model]\nbase = 'b'\n[round]\nmin_rank = 99\n", ["min_rank 99"]),
    ],
    ids=[
        "bad TOML", "not text", "empty", "no model", "no name", "unknown key", "unknown section",
        "wrong type", "bad name", "not a section", "inconsistent",
    ],
)  # fmt: skip
def test_a_corrupt_run_toml_is_explained(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(text.encode("latin-1"))
    said = serve(path)
    assert_one_sentence(said, "run.toml", *words)
    assert said.code == 78, "starting it again does not help"


def test_a_missing_run_toml_is_named(tmp_path: Path) -> None:
    assert_one_sentence(serve(tmp_path / "run.toml"), "run.toml cannot be read", "No such file")


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:8470", "192.168.1.4:8470", "[::]:8470", "example.org:1"]
)
def test_an_address_others_can_reach_is_refused(tmp_path: Path, listen: str) -> None:
    said = serve(run_toml(tmp_path, server={"listen": listen}))
    assert_one_sentence(said, "not a loopback address")


@pytest.mark.parametrize("listen", ["8470", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:99999"])
def test_an_address_that_is_none_is_explained(tmp_path: Path, listen: str) -> None:
    said = serve(run_toml(tmp_path, server={"listen": listen}))
    assert_one_sentence(said, 'must be "address:port"')


# --- the base model ---------------------------------------------------------------------------


def test_a_base_that_does_not_exist_is_named(tmp_path: Path) -> None:
    said = serve(run_toml(tmp_path, model={"base": str(tmp_path / "nowhere")}))
    assert_one_sentence(said, "nowhere does not exist", "[model] base")


def test_a_base_without_a_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    assert_one_sentence(serve(run_toml(tmp_path)), "has no config.json")


def test_a_base_without_safetensors_is_refused(tmp_path: Path) -> None:
    (model_folder(tmp_path / "base") / "model.safetensors").unlink()
    assert_one_sentence(serve(run_toml(tmp_path)), "no .safetensors weights")


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({**LLAMA, "model_type": "mamba"}, "'mamba' is not supported"),
        ({"model_type": "llama"}, "num_attention_heads"),
        ({**LLAMA, "hidden_size": "wide"}, "wide"),
    ],
    ids=["unknown type", "no dimensions", "a word for a number"],
)
def test_a_base_of_another_kind_is_refused(
    tmp_path: Path, config: dict[str, Any], word: str
) -> None:
    model_folder(tmp_path / "base", config)
    assert_one_sentence(serve(run_toml(tmp_path)), word)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_corrupt_model_config_is_named(tmp_path: Path, text: str) -> None:
    (model_folder(tmp_path / "base") / "config.json").write_text(text)
    assert_one_sentence(serve(run_toml(tmp_path)), "config.json cannot be read")


def test_target_modules_that_do_not_exist_are_named(tmp_path: Path) -> None:
    said = serve(run_toml(tmp_path, model={"targets": ["c_fc"]}))
    assert_one_sentence(said, "c_fc", "q_proj")


def test_an_unknown_method_is_named(tmp_path: Path) -> None:
    assert_one_sentence(serve(run_toml(tmp_path, method={"name": "fedsgd"})), "fedsgd", "fslora")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": {"name": "fedit", "energy": 0.5}}, ["energy is not for fedit", "no options"]),
        ({"method": {"name": "flexlora"}, "server_optimizer": {"name": "adam"}},
         ["adam cannot be used with flexlora", "leave the section out"]),
        ({"method": {"name": "flora"}, "training": {"keep_optimizer": True}},
         ["keep_optimizer cannot be used with flora", "set it to false"]),
        ({"fairness": {"weights": "fair"}}, ["'fair' do not exist", "samples"]),
        ({"fairness": {"loss": "propfair"}}, ["propfair_ceiling", "1.5 times"]),
    ],
    ids=["foreign key", "server optimiser", "kept moments", "unknown weights", "no ceiling"],
)  # fmt: skip
def test_what_a_method_cannot_use_is_named(
    tmp_path: Path, changes: dict[str, dict[str, Any]], words: list[str]
) -> None:
    assert_one_sentence(serve(run_toml(tmp_path, **changes)), "run.toml", *words)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("lm_head", ["'lm_head'", "no weights of its own", "tied"]),
        ("model.layers.0.conv", ["has shape [2, 2, 2]", "vectors and matrices"]),
    ],
)
def test_modules_that_cannot_be_trained_whole_are_named(
    tmp_path: Path, module: str, words: list[str]
) -> None:
    base = model_folder(tmp_path / "base")
    save_file({"model.layers.0.conv.weight": np.zeros((2, 2, 2), np.float32)},
              base / "model.safetensors")  # fmt: skip
    said = serve(run_toml(tmp_path, model={"base": "base", "modules_to_save": [module]}))
    assert_one_sentence(said, *words)


def test_a_module_that_is_adapted_and_trained_whole_is_named(tmp_path: Path) -> None:
    both = "model.layers.0.self_attn.q_proj"
    for named in (both, "model.layers.0.self_attn", "model"):
        said = serve(run_toml(tmp_path, model={"base": "base", "modules_to_save": [named]}))
        assert_one_sentence(said, both, "both adapted and trained whole", named, "smaller modules")


def test_a_module_that_the_base_quantises_cannot_be_trained_whole(tmp_path: Path) -> None:
    chosen = {"targets": ["v_proj"], "modules_to_save": ["model.layers.0.self_attn.q_proj"]}
    said = serve(run_toml(tmp_path, model={"base": "base", **chosen}))
    assert_one_sentence(said, "q_proj", "nf4", "quantises", "use bf16 or fp32")


def test_weights_that_are_none_are_named_when_some_are_trained_whole(tmp_path: Path) -> None:
    model_folder(tmp_path / "base")
    said = serve(run_toml(tmp_path, model={"base": "base", "modules_to_save": ["lm_head"]}))
    assert_one_sentence(said, "model.safetensors is no safetensors file")


# --- ports, folders and runs ------------------------------------------------------------------


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        said = serve(run_toml(tmp_path, server={"listen": listen}))
    assert_one_sentence(
        said, f"{listen} cannot be listened on: the port is in use", "[server] listen"
    )


def test_a_state_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = serve(run_toml(tmp_path, server={"state": "file/state"}))
    assert_one_sentence(said, "state folder", "[server] state")


def test_a_state_folder_with_a_broken_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "coordinator.sqlite").write_text("not a database, " * 100)
    assert_one_sentence(serve(run_toml(tmp_path)), "coordinator.sqlite")


def test_recorded_plans_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "plans.json").write_text('[{"round": 0}]')
    said = serve(run_toml(tmp_path), "--replay", str(tmp_path / "plans.json"))
    assert_one_sentence(said, "plans.json cannot be used")
    said = serve(run_toml(tmp_path), "--replay", str(tmp_path / "none.json"))
    assert_one_sentence(said, "none.json cannot be used")


@dataclass(frozen=True)
class Serving:
    """A coordinator that waits for devices."""

    folder: Path
    config: Path
    address: str

    @property
    def state(self) -> Path:
        """Its state folder."""
        return self.folder / "state"


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Serving]:
    config = run_toml(folder)
    port = next(line for line in config.read_text().splitlines() if "listen" in line)
    address = json.loads(port.partition("= ")[2])
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "coordinator.cli", "serve", "--config", str(config)],
            stdout=log, stderr=log, cwd=ROOT,
        )  # fmt: skip
    try:
        until = time.monotonic() + 30
        while '"serving"' not in (folder / "log").read_text():
            assert process.poll() is None and time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.05)
        yield Serving(folder, config, address)
    finally:
        process.terminate()
        process.wait(15)
    said = (folder / "log").read_text()
    assert process.returncode == 0 and "traceback" not in said.lower(), said


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("serving")) as running:
        yield running


def test_a_second_coordinator_on_one_state_folder_is_refused(coordinator: Serving) -> None:
    said = serve(coordinator.config)
    assert_one_sentence(said, "another coordinator already serves", str(coordinator.state))
    assert said.code == 75, "not now; the same again later may do"


def test_a_run_of_the_same_name_but_another_adapter_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path):
        pass
    for change in ({"adapter": {"rank": 8}}, {"run": {"name": "cli", "seed": 2}}):
        said = serve(run_toml(tmp_path, **change))
        assert_one_sentence(said, "'cli' was started with another", "new [run] name")
    said = serve(run_toml(tmp_path, method={"name": "fedit"}))
    assert_one_sentence(said, "'cli' was started with method fslora", "now says fedit")


def test_a_state_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    for command in (["devices"], ["runs"], ["report", "cli"], ["export", "cli", "--out", "x"]):
        said = run("coordinator.cli", *command, "--state", str(tmp_path))
        assert_one_sentence(said, "not a coordinator's state folder", "--state")


def test_an_unknown_run_is_named(coordinator: Serving, tmp_path: Path) -> None:
    state = ("--state", str(coordinator.state))
    for command in (["runs", "other"], ["report", "other"]):
        assert_one_sentence(run("coordinator.cli", *command, *state), "no run 'other'", "cli")
    out = ("--out", str(tmp_path / "adapter"))
    said = run("coordinator.cli", "export", "other", *out, *state)
    assert_one_sentence(said, "no adapter of run other")
    said = run("coordinator.cli", "export", "cli", "--round", "7", *out, *state)
    assert_one_sentence(said, "no adapter of run cli after 7 rounds")


def test_an_export_never_overwrites(coordinator: Serving, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    command = ("export", "cli", "--state", str(coordinator.state), "--out", str(out))
    assert run("coordinator.cli", *command).code == 0
    before = _digests(out)
    assert_one_sentence(run("coordinator.cli", *command), f"{out} already exists")
    assert _digests(out) == before


def test_an_export_to_an_impossible_place_is_refused(coordinator: Serving, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "adapter")
    said = run("coordinator.cli", "export", "cli", "--state", str(coordinator.state), "--out", out)
    assert_one_sentence(said, "adapter cannot be made")


def _digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


# --- agent.toml and what it points at ---------------------------------------------------------


def agent_toml(folder: Path, **changes: Mapping[str, Any]) -> Path:
    """An agent.toml with one source file to train on; `changes` are merged into its sections."""
    code = folder / "code"
    if not code.exists():
        code.mkdir()
        (code / "a.py").write_text("print('a')\n" * 20)
    sections: dict[str, dict[str, Any]] = {
        "device": {"name": "cli-device"},
        "coordinator": {
            "address": f"127.0.0.1:{free_port()}",
            "token_file": "token",
            "plain_text": True,
        },
        "data": {"include": ["code"]},
        "state": {"folder": "state"},
    }
    for name, change in changes.items():
        sections[name] = sections.get(name, {}) | dict(change)
    write_toml(folder / "agent.toml", sections)
    return folder / "agent.toml"


def agent(config: Path) -> Said:
    return run("edge_agent.cli", "run", "--config", str(config))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[data", ["not valid TOML"]),
        ("", ["[data] is missing"]),
        ("[data]\n", ["[data] names no data", "give include"]),
        ("[data]\ninclude = []\n", ["[data] names no data", "give include"]),
        ("[data]\ninclude = ['a']\nexlude = ['b']\n", ["exlude", "mean 'exclude'"]),
        ("[data]\ninclude = ['a']\n[limit]\nthreads = 1\n", ["limit", "mean 'limits'"]),
        ("[data]\ninclude = ['a']\n[limits]\nmemory_mb = 'all'\n", ["[limits] memory_mb"]),
        ("[data]\ninclude = ['a']\n[device]\nname = 'My PC'\n", ["[device] name"]),
        ("data = 1\n", ["[data]"]),
    ],
    ids=[
        "bad TOML", "empty", "no folders", "empty list", "unknown key", "unknown section",
        "wrong type", "bad name", "not a section",
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["run", "status"])
def test_a_corrupt_agent_toml_is_explained(
    tmp_path: Path, command: str, text: str, words: list[str]
) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(text)
    said = run("edge_agent.cli", command, "--config", str(path))
    assert_one_sentence(said, "agent.toml", *words)
    assert said.code == 78, "starting it again does not help"


def test_a_missing_agent_toml_is_named(tmp_path: Path) -> None:
    assert_one_sentence(agent(tmp_path / "agent.toml"), "agent.toml cannot be read")


def test_a_data_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    said = agent(agent_toml(tmp_path, data={"include": ["code", "gone"]}))
    assert_one_sentence(said, "gone does not exist", "[data]", logs_first=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_data_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = agent_toml(tmp_path)
    (tmp_path / "code").chmod(0)
    try:
        assert_one_sentence(agent(path), "cannot be read", "permission", logs_first=True)
    finally:
        (tmp_path / "code").chmod(0o700)


def test_folders_without_source_code_are_explained_by_what_was_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "odds"
    folder.mkdir()
    (folder / "picture.py").write_bytes(b"\x89\0\0\0" * 9)
    (folder / "empty.py").write_text(" \n")
    (folder / "notes.txt").write_text("no code")
    said = agent(agent_toml(tmp_path, data={"include": ["odds"]}))
    assert_one_sentence(
        said, "no usable code", "1 binary", "1 empty", "1 not source code", logs_first=True
    )
    (tmp_path / "nothing").mkdir()
    said = agent(agent_toml(tmp_path, data={"include": ["nothing"]}))
    assert_one_sentence(said, "no usable code", "no files", logs_first=True)


def test_a_state_folder_the_agent_cannot_use_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = agent(agent_toml(tmp_path, state={"folder": "file/state"}))
    assert_one_sentence(said, "state folder", "[state] folder")


def test_a_missing_join_token_is_named(tmp_path: Path) -> None:
    said = agent(agent_toml(tmp_path))
    assert_one_sentence(said, "join token", "token_file", logs_first=True)


def test_a_wrong_join_token_is_explained(coordinator: Serving, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("wrong\n")
    said = agent(agent_toml(tmp_path, coordinator={"address": coordinator.address}))
    assert_one_sentence(said, "join token is wrong", logs_first=True)


def test_a_join_token_that_is_no_text_is_explained(coordinator: Serving, tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\xff\xfe\x00")
    said = agent(agent_toml(tmp_path, coordinator={"address": coordinator.address}))
    assert_one_sentence(said, "join token", logs_first=True)


def test_a_base_that_differs_from_the_runs_is_refused(coordinator: Serving, tmp_path: Path) -> None:
    model_folder(tmp_path / "base", weights=b"other")
    where = {"address": coordinator.address, "token_file": str(coordinator.state / "join-token")}
    said = agent(agent_toml(tmp_path, coordinator=where, model={"base": "base"}))
    assert_one_sentence(said, "has digest", "[model] base", logs_first=True)
    said = agent(agent_toml(tmp_path, coordinator=where, model={"base": str(tmp_path / "gone")}))
    assert_one_sentence(said, "gone does not exist", logs_first=True)


def test_status_before_any_run_says_so(tmp_path: Path) -> None:
    said = run("edge_agent.cli", "status", "--config", str(agent_toml(tmp_path)))
    assert_one_sentence(said, "no agent has run with this configuration")


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
@pytest.mark.parametrize("command", ["run", "probe", "status"])
def test_damaged_files_of_the_agent_give_no_traceback(
    tmp_path: Path, command: str, text: str
) -> None:
    path = agent_toml(tmp_path)
    (tmp_path / "state").mkdir()
    for name in ("status.json", "credential.json"):
        (tmp_path / "state" / name).write_text(text)
    said = run("edge_agent.cli", command, "--config", str(path))
    if command == "probe":  # the link is left out, the rest is measured
        assert said.code == 0 and "credential.json is damaged" in said.out, said
    else:
        word = "join token" if command == "run" else "status.json is damaged"
        assert_one_sentence(said, word, logs_first=True)


def test_probe_works_without_a_coordinator(tmp_path: Path) -> None:
    said = run("edge_agent.cli", "probe", "--json", "--config", str(agent_toml(tmp_path)))
    assert said.code == 0, said.err
    assert json.loads(said.out)["memory_total_bytes"] > 0


def test_doctor_names_what_is_wrong_and_ends_with_one(tmp_path: Path) -> None:
    path = agent_toml(tmp_path, trainer={"python": "/no/such/python"})
    said = run("edge_agent.cli", "doctor", "--config", str(path))
    assert said.code == 1 and said.err == "", said
    assert "fail trainer" in said.out and "[trainer] python" in said.out
    said = run("edge_agent.cli", "doctor", "--json", "--config", str(path))
    found = {finding["name"]: finding for finding in json.loads(said.out)}
    assert said.code == 1 and found["trainer"]["state"] == "fail" and found["trainer"]["mend"]
    assert found["python"]["state"] == "ok"


# --- trials -----------------------------------------------------------------------------------

both_trials = pytest.mark.parametrize("trial", ["demo", "compare"])


@both_trials
def test_a_trial_keeps_a_folder_that_is_not_its_own(tmp_path: Path, trial: str) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    said = run("trials.cli", trial, "--out", str(tmp_path))
    assert_one_sentence(said, "holds other files", "--out")
    assert (tmp_path / "thesis.tex").exists()


@both_trials
def test_a_trial_does_not_replace_a_file(tmp_path: Path, trial: str) -> None:
    (tmp_path / "out").write_text("years of work")
    assert_one_sentence(run("trials.cli", trial, "--out", str(tmp_path / "out")), "is a file")


@both_trials
def test_a_trial_names_the_devices_it_has(tmp_path: Path, trial: str) -> None:
    said = run("trials.cli", trial, "--out", str(tmp_path / "out"), "--data", "toaster=/tmp")
    assert_one_sentence(said, "toaster", "laptop")


def test_a_comparison_knows_its_methods_before_it_begins(tmp_path: Path) -> None:
    said = run("trials.cli", "compare", "--out", str(tmp_path / "out"), "--methods", "fedit,fedsgd")
    assert_one_sentence(said, "'fedsgd' does not exist", "fslora")
    assert not (tmp_path / "out").exists()
