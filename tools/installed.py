"""Sketchfleet as it is installed: the wheel of this source tree in environments of their own."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OTHERS_PACKAGES = ("pip", "setuptools", "_distutils_hack", "pkg_resources")  # of the environment
INSTALL_S = 1800.0


class CheckError(Exception):
    """Something that an installation has to do did not come about."""


@dataclasses.dataclass
class Environment:
    """A virtual environment that holds Sketchfleet and nothing of the source tree."""

    folder: Path

    def program(self, name: str) -> str:
        """One of its programs, by path."""
        return str(self.folder / "bin" / name)

    @property
    def packages(self) -> Path:
        """Where its packages lie."""
        return next(self.folder.glob("lib/python3.*/site-packages"))

    @property
    def megabytes(self) -> float:
        """Of everything installed, without pip and setuptools, MB (10^6 bytes)."""
        files = (
            path
            for top in self.packages.iterdir()
            if top.name.split("-")[0] not in OTHERS_PACKAGES
            for path in ([top] if top.is_file() else top.rglob("*"))
        )
        return sum(path.stat().st_size for path in files if path.is_file()) / 1e6

    def run(self, name: str, *words: str, code: int = 0, patience_s: float = 120.0) -> str:
        """What a program says, both ways. Raises `CheckError` unless it ends with `code`."""
        done = subprocess.run(
            [self.program(name), *words], capture_output=True, text=True, check=False,
            timeout=patience_s, cwd=self.folder, env=bare(),
        )  # fmt: skip
        if done.returncode != code:
            told = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise CheckError(f"{name} {words[0]} ended with {done.returncode}: {told[-1:]}")
        return done.stdout + done.stderr


def bare() -> dict[str, str]:
    """The variables that programs get: none that point at the source tree."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def build(out: Path) -> Path:
    """The wheel, made of this source tree. Raises `CheckError`."""
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise CheckError(f"the wheel was not built: {done.stderr.strip()}")
    return next(out.glob("sketchfleet-*.whl"))


def interpreter(version: str) -> str | None:
    """The interpreter of that version on the PATH that can be started; its name alone may lie."""
    name = f"python{version}"
    test = ["-c", "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"]
    try:
        told = subprocess.run([name, *test], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found, executable = told.split()
    return executable if found == version else None


def install(
    python: str, folder: Path, wheel: Path, extras: str, pins: Path | None = None
) -> Environment:
    """A fresh environment with the wheel and these extras, by pip. Raises `CheckError`."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([python, "-m", "venv", str(folder)], check=True, env=bare())
    made = Environment(folder)
    pinned = ["--constraint", str(pins)] if pins else []
    made.run(
        "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        "--only-binary", ":all:", *pinned, f"{wheel}[{extras}]", patience_s=INSTALL_S,
    )  # fmt: skip
    place = made.run("python", "-I", "-c", "import edge_agent; print(edge_agent.__file__)")
    if not Path(place.strip()).is_relative_to(made.packages):
        raise CheckError(f"edge_agent is imported from {place.strip()}")
    return made


def check_alone(environment: Environment, extras: str) -> None:
    """Every program answers, or says which extra it lacks. Raises `CheckError`."""
    there = {*extras.split(","), *(["agent"] if extras == "train" else [])}
    for program, extra, words in (
        ("sketchfleet-agent", "agent", ("probe", "--json")),
        ("sketchfleet-coordinator", "coordinator", ("runs", "--state", "none")),
    ):
        environment.run(program, "--help")
        config = environment.folder / "agent.toml"
        config.write_text('[data]\ninclude = ["."]\n')
        if extra == "agent" and extra in there:
            json.loads(environment.run(program, *words, "--config", str(config)))
        elif extra not in there:
            told = environment.run(program, *words, code=1)
            if f"sketchfleet[{extra}]" not in told:
                raise CheckError(f"{program} does not name the extra it lacks: {told.strip()}")
    if "train" not in there and (environment.packages / "torch").exists():
        raise CheckError("torch is installed, which none of these extras asks for")
