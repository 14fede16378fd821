"""What holds for the repository as a whole: pins, wire code, import rules, and tidy files."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2 as pb
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from protos.sketchfleet.v1 import fleet_pb2
from tools import proto_floor, proto_style

ROOT = Path(__file__).resolve().parent.parent
LARGEST_FILE_BYTES = 6_000_000
MOST_IGNORES = 20


@cache
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@cache
def tracked() -> tuple[Path, ...]:
    """Every file under version control; the test is skipped outside a checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return tuple(ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file())


def texts(*, suffixes: tuple[str, ...] = (), but: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """(name, content) of tracked text files that people wrote."""
    found: list[tuple[str, str]] = []
    for path in tracked():
        name = path.relative_to(ROOT).as_posix()
        generated = "_pb2" in path.name or name.startswith(
            ("trials/nano_code/", "tests/fuzz/corpus/")
        )
        if generated or path == Path(__file__).resolve() or path.suffix in but:
            continue
        if suffixes and path.suffix not in suffixes:
            continue
        try:
            found.append((name, path.read_bytes().decode()))
        except UnicodeDecodeError:
            continue
    return found


def requirements() -> list[Requirement]:
    project = pyproject()["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    found = [Requirement(line) for group in groups for line in group]
    return [requirement for requirement in found if requirement.name != "sketchfleet"]


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(package): Version(pin) for package, pin in pairs}


# --- versions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_dependency_is_pinned_to_a_version_that_pyproject_admits(
    requirement: Requirement,
) -> None:
    pin = pins("constraints.txt").get(canonicalize_name(requirement.name))
    assert pin is not None, f"{requirement.name} has no pin in constraints.txt"
    assert requirement.specifier.contains(pin), f"{requirement} does not admit the pinned {pin}"


def test_the_wire_code_is_checked_at_the_floors_of_pyproject() -> None:
    checked = pins("tools/proto-requirements.txt")
    for requirement in requirements():
        if requirement.name in ("protobuf", "grpcio"):
            floor = next(s.version for s in requirement.specifier if s.operator == ">=")
            found = checked[requirement.name]
            assert found.release[:2] == Version(floor).release[:2], requirement


def test_the_wire_code_runs_on_the_installed_protobuf_and_grpcio() -> None:
    assert proto_floor.main() == 0


def test_every_version_that_is_written_down_is_the_one_of_pyproject() -> None:
    expected = pyproject()["project"]["version"]
    written = re.compile(
        r"""(?:__version__\s*=\s*["']|sketchfleet(?:==|[- ]v?))(\d+\.\d+\.\d+)""", re.IGNORECASE
    )
    stale = [
        f"{name}: {found}"
        for name, text in texts(suffixes=(".py", ".md", ".cff", ".yaml"))
        for found in written.findall(text)
        if found != expected
    ]
    assert not stale


# --- the wire contract's style ------------------------------------------------------------------


def proto_file(**parts: Any) -> pb.FileDescriptorProto:
    whole = {"name": "protos/fleet/v1/fleet.proto", "package": "fleet.v1"} | parts
    return pb.FileDescriptorProto(**whole)


def service(name: str, rpc: str, request: str, response: str) -> pb.ServiceDescriptorProto:
    method = pb.MethodDescriptorProto(
        name=rpc, input_type=f".fleet.v1.{request}", output_type=f".fleet.v1.{response}"
    )
    return pb.ServiceDescriptorProto(name=name, method=[method])


def enum(name: str, *values: str) -> pb.EnumDescriptorProto:
    numbered = [pb.EnumValueDescriptorProto(name=v, number=i) for i, v in enumerate(values)]
    return pb.EnumDescriptorProto(name=name, value=numbered)


def message(name: str, *fields: str) -> pb.DescriptorProto:
    return pb.DescriptorProto(name=name, field=[pb.FieldDescriptorProto(name=f) for f in fields])


def test_the_contract_keeps_the_style_rules() -> None:
    file = pb.FileDescriptorProto()
    fleet_pb2.DESCRIPTOR.CopyToProto(file)
    assert list(proto_style.findings(file)) == []


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"package": "fleet", "name": "protos/fleet/a.proto"}, "does not end in a version"),
        ({"name": "protos/elsewhere/v1/a.proto"}, "does not match its folder"),
        ({"service": [service("Fleet", "Get", "GetRequest", "GetResponse")]}, "ending in Service"),
        ({"service": [service("AService", "Get", "Ask", "GetResponse")]}, "be named GetRequest"),
        ({"service": [service("AService", "Get", "GetRequest", "Got")]}, "be named GetResponse"),
        ({"service": [service("AService", "get", "getRequest", "getResponse")]}, "not UpperCamel"),
        (
            {"service": [service("AService", "Get", "GetRequest", "GetResponse")] * 2},
            "already serves another rpc",
        ),
        ({"enum_type": [enum("TaskKind", "TASK_KIND_NONE")]}, "be TASK_KIND_UNSPECIFIED"),
        ({"enum_type": [enum("Kind", "KIND_UNSPECIFIED", "WAIT")]}, "starting with KIND_"),
        ({"message_type": [message("fleet_message")]}, "not UpperCamel"),
        ({"message_type": [message("Fleet", "deviceName")]}, "not lower_snake"),
    ],
)
def test_a_breach_of_style_is_named(parts: dict[str, Any], sentence: str) -> None:
    assert any(sentence in line for line in proto_style.findings(proto_file(**parts)))


# --- import rules -------------------------------------------------------------------------------


def test_every_agent_module_outside_the_training_room_is_kept_free_of_torch() -> None:
    contracts = pyproject()["tool"]["importlinter"]["contracts"]
    kept = next(c for c in contracts if "torch" in c.get("forbidden_modules", ()))
    present = {
        f"edge_agent.{path.stem}"
        for path in (ROOT / "edge_agent").iterdir()
        if path.stem not in ("__init__", "__pycache__", "training")
        and (path.suffix == ".py" or (path / "__init__.py").exists())
    }
    missing = present - set(kept["source_modules"])
    assert not missing, f"add to the contract in pyproject.toml: {sorted(missing)}"


@pytest.mark.parametrize("module", ["coordinator.cli", "edge_agent.cli", "trials.cli"])
def test_a_command_starts_without_the_heavy_packages(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "print(*({'torch', 'transformers', 'peft', 'matplotlib', 'sqlalchemy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split(), f"{module} loads {done.stdout.strip()} before it is needed"


# --- checks and make targets --------------------------------------------------------------------


def test_commit_hooks_run_what_make_lint_runs() -> None:
    lint = re.search(r"^lint:([^#]*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert lint is not None
    hooks = re.findall(
        r"entry: make --no-print-directory (\S+)", (ROOT / ".pre-commit-config.yaml").read_text()
    )
    assert hooks == lint[1].split()


def test_every_make_target_in_the_docs_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    unknown = [
        f"{name}: make {target}"
        for name, text in texts(suffixes=(".md",))
        for target in re.findall(r"(?:`|^ *\$? ?)make ([a-z][a-z-]*)", text, re.MULTILINE)
        if target not in targets
    ]
    assert not unknown


# --- files --------------------------------------------------------------------------------------


def test_text_files_are_clean() -> None:
    faults: list[str] = []
    for name, text in texts(but=(".svg", ".patch")):
        if text and not text.endswith("\n"):
            faults.append(f"{name}: no newline at its end")
        for number, line in enumerate(text.splitlines(), 1):
            if line != line.rstrip():
                faults.append(f"{name}:{number}: trailing whitespace")
            if line.startswith(("<<<<<<< ", ">>>>>>> ")):
                faults.append(f"{name}:{number}: conflict marker")
    assert not faults


def test_no_file_names_a_place_on_the_machine_it_was_written_on() -> None:
    places = [str(place) for place in (ROOT, Path.home()) if len(place.parts) > 1]
    pattern = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, places))})/")
    assert [name for name, text in texts() if pattern.search(text)] == []


def test_no_registry_is_named_so_that_pip_s_own_configuration_decides() -> None:
    named = re.compile(r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|--(?:extra-)?index-url")
    assert [name for name, text in texts(but=(".md",)) if named.search(text)] == []


def test_no_tracked_file_is_larger_than_the_model_may_be() -> None:
    assert [p.name for p in tracked() if p.stat().st_size > LARGEST_FILE_BYTES] == []


def test_type_ignores_stay_few_and_say_what_they_ignore() -> None:
    ignores = [
        (name, match)
        for name, text in texts(suffixes=(".py",))
        if not name.startswith("tests/")
        for match in re.findall(r"# type: ignore(\[[a-z-]+(?:, ?[a-z-]+)*\])?", text)
    ]
    assert [name for name, code in ignores if not code] == []
    assert len(ignores) <= MOST_IGNORES, "fix the types rather than raise this number"
