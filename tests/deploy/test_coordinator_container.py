"""The coordinator's image and compose file: accepted by their tools, and true to what is installed.

No container is built here: there may be no Docker. What the image's steps do is done without it in
`test_the_steps_of_the_image_give_a_coordinator_that_answers`, which installs from an index.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

from coordinator.cli import make_parser
from coordinator.config import RunConfig
from profiles.settings import fields_of
from trials.fleet import free_port

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = DEPLOY / "container" / "coordinator.Dockerfile"
SETTING = re.compile(r"SKETCHFLEET_COORDINATOR__([A-Z_]+?)__([A-Z_]+)")


def tool(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (it comes with the extra 'dev')")
    return found


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) with continued lines joined."""
    text = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [
        (word.upper(), rest) for word, _, rest in (line.strip().partition(" ") for line in lines)
    ]


def last(name: str) -> str:
    return [rest for word, rest in instructions() if word == name][-1]


def compose() -> dict:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def mounts(service: dict) -> list[tuple[str, str]]:
    """(source, target) of its volumes, short or long."""
    return [
        (one["source"], one["target"]) if isinstance(one, dict) else tuple(one.split(":")[:2])
        for one in service["volumes"]
    ]


def test_hadolint_accepts_the_container_file():
    done = subprocess.run([tool("hadolint"), "--no-color", str(DOCKERFILE)], check=False,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_the_compose_file_keeps_the_compose_specification():
    done = subprocess.run(
        [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec",
         str(DEPLOY / "compose.yaml")], check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_the_image_runs_as_nobody_in_particular_and_is_told_to_stop_in_order():
    assert last("USER") == "10001:10001" and last("STOPSIGNAL") == "SIGTERM"
    froms = [rest for word, rest in instructions() if word == "FROM"]
    assert len(froms) == 2 and froms[0].endswith(" AS build")
    assert "COPY --from=build" in DOCKERFILE.read_text()


def test_what_the_image_runs_are_commands_of_the_program_it_installs():
    entry = json.loads(last("ENTRYPOINT"))
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert entry[0] in scripts
    health = json.loads(last("HEALTHCHECK").partition("CMD ")[2])
    assert health[0] == entry[0]
    for words in (json.loads(last("CMD")), health[1:]):
        assert str(make_parser().parse_args(words).config) == "/etc/sketchfleet/run.toml"


def test_every_setting_that_image_and_compose_file_name_exists():
    text = DOCKERFILE.read_text() + (DEPLOY / "compose.yaml").read_text()
    named = {tuple(part.lower() for part in found) for found in SETTING.findall(text)}
    assert len(named) >= 4
    for section, key in named:
        assert key in fields_of(fields_of(RunConfig)[section]), (section, key)


def test_only_what_a_wheel_is_made_of_reaches_the_build():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines()
             if line and not line.startswith("#")]  # fmt: skip
    assert rules[0] == "*"
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = {*packages, project["project"]["readme"], *project["project"]["license-files"]}
    needed |= {"pyproject.toml", "constraints.txt"}
    assert needed <= let_in
    for secret in ("state", "deploy", ".git", "authority", "run.toml", "web-token", ".venv"):
        assert not any(fnmatch.fnmatch(secret, name) for name in let_in), secret


def test_every_service_is_confined():
    services = compose()["services"]
    assert set(services) == {"coordinator", "prometheus", "grafana"}
    for name, service in services.items():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "cap_add", "network_mode"} & set(service), name
        for port in service.get("ports", ()):
            told = str(port).rpartition(":")[2]
            assert told in ("8470", "8471") or str(port).startswith("127.0.0.1:"), port


def test_everything_that_is_mounted_is_there_or_is_told_of_as_to_be_made():
    whole = compose()
    page = (ROOT / "docs" / "containers.md").read_text()
    volumes = set(whole["volumes"])
    for service in whole["services"].values():
        for source, target in mounts(service):
            if source.startswith("./"):
                assert (DEPLOY / source).exists() or f"deploy/{source[2:]}" in page, source
            else:
                assert source in volumes, source
            assert target.startswith("/")
        assert set(service.get("secrets", ())) <= set(whole["secrets"])
    for secret in whole["secrets"].values():
        assert f"deploy/{secret['file'][2:]}" in page


def test_what_is_written_in_the_image_lies_on_volumes():
    volumes = json.loads(last("VOLUME"))
    environment = last("ENV")
    state = re.search(r"SERVER__STATE=(\S+)", environment)
    hub = re.search(r"HF_HOME=(\S+)", environment)
    assert state and hub
    for path in (state[1], hub[1]):
        assert any(path.startswith(f"{volume}/") for volume in volumes), path
    mounted = {target for _, target in mounts(compose()["services"]["coordinator"])}
    assert set(volumes) <= mounted


def test_grafana_is_given_the_data_source_and_the_dashboard():
    services = compose()["services"]
    provisioning = DEPLOY / "grafana" / "provisioning"
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    board = json.loads((DEPLOY / "grafana" / "sketchfleet.json").read_text())
    chosen = board["templating"]["list"][0]
    assert chosen["type"] == "datasource" and chosen["query"] == source["datasources"][0]["type"]
    folder = yaml.safe_load((provisioning / "dashboards" / "sketchfleet.yml").read_text())
    path = folder["providers"][0]["options"]["path"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    placed = dict(mounts(services["grafana"]))
    assert placed["./grafana/sketchfleet.json"] == home and home.startswith(f"{path}/")


def test_prometheus_scrapes_the_coordinator_with_the_token_it_wants():
    scrape = yaml.safe_load((DEPLOY / "prometheus" / "compose.yml").read_text())["scrape_configs"][
        0
    ]
    coordinator = compose()["services"]["coordinator"]
    listen = coordinator["environment"]["SKETCHFLEET_COORDINATOR__WEB__LISTEN"]
    assert scrape["static_configs"][0]["targets"] == [f"coordinator:{listen.rpartition(':')[2]}"]
    token = coordinator["environment"]["SKETCHFLEET_COORDINATOR__WEB__TOKEN_FILE"]
    assert scrape["authorization"]["credentials_file"] == token
    alone = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert alone["rule_files"] and alone["scrape_configs"][0]["job_name"] == scrape["job_name"]


@pytest.mark.slow
def test_the_steps_of_the_image_give_a_coordinator_that_answers(tmp_path):
    """Installs what the image installs, from the files that the build sees, and serves with it."""
    source, prefix = tmp_path / "source", tmp_path / "opt"
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines()
              if line.startswith("!")]  # fmt: skip
    for name in let_in:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    steps = next(rest for word, rest in instructions() if word == "RUN")
    for step in steps.replace("/opt/sketchfleet", str(prefix)).split("&&"):
        words = shlex.split(step)
        if words[0] == "python":
            words[0] = sys.executable
        done = subprocess.run(words, cwd=source, capture_output=True, text=True, check=False)
        if "No matching distribution" in done.stderr or "Could not find a version" in done.stderr:
            pytest.skip("no package index can be reached")
        assert done.returncode == 0, done.stderr[-2000:]
    shutil.rmtree(source)
    program = prefix / "bin" / json.loads(last("ENTRYPOINT"))[0]
    where = [prefix / "bin" / "python", "-c", "import trials; print(trials.__path__[0])"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    found = subprocess.run(where, capture_output=True, text=True, check=True, env=environment,
                           cwd=tmp_path)  # fmt: skip
    fleet, web = free_port(), free_port()
    (tmp_path / "run.toml").write_text(
        f'[run]\nname = "image"\n[model]\nbase = "{found.stdout.strip()}/nano_code"\n'
        "[server]\nplain_text = true\n"
    )
    environment |= {
        "SKETCHFLEET_COORDINATOR__SERVER__STATE": str(tmp_path / "state"),
        "SKETCHFLEET_COORDINATOR__SERVER__LISTEN": f"127.0.0.1:{fleet}",
        "SKETCHFLEET_COORDINATOR__WEB__LISTEN": f"127.0.0.1:{web}",
    }

    def words_of(name):
        words = json.loads(last(name).partition("CMD ")[2] or last(name))
        words = words[1:] if words[0] == program.name else words
        return [program, *(str(tmp_path / "run.toml") if "/" in word else word for word in words)]

    with subprocess.Popen(words_of("CMD"), env=environment, cwd=tmp_path,
                          stderr=subprocess.PIPE, text=True) as serving:  # fmt: skip
        try:
            until = time.monotonic() + 60
            while True:
                done = subprocess.run(words_of("HEALTHCHECK"), capture_output=True, text=True,
                                      check=False, env=environment, cwd=tmp_path)  # fmt: skip
                if done.returncode == 0 or time.monotonic() > until:
                    break
                assert serving.poll() is None, serving.stderr.read()
            assert done.returncode == 0, done.stderr
        finally:
            serving.terminate()
        assert serving.wait(30) == 0
    listed = subprocess.run([prefix / "bin" / "python", "-c", "import torch"], check=False,
                            capture_output=True, env=environment, cwd=tmp_path)  # fmt: skip
    assert listed.returncode != 0, "the coordinator's image holds torch"
