"""A stand-in for the package and for Python's venv, so that installing takes a second."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pip
import pytest

INSTALLER = Path(__file__).parents[2] / "deploy" / "install.sh"
PLACE = "opt/sketchfleet/agent"

# What the installer asks of the program: help, whether settings are in order, to enrol.
PROGRAM = """
import pathlib, sys
def main():
    words = sys.argv[1:]
    if words[:1] == ["enroll"]:
        root = pathlib.Path(sys.prefix).parents[4]
        identity = root / "var/lib/sketchfleet/agent/identity"
        identity.mkdir()
        (identity / "pair.json").write_text(sys.stdin.read())
        (identity / "words").write_text(" ".join(words))
    return RETURNS.get(words[0], 0)
RETURNS = {returns}
"""


def make_wheel(folder, version="1.0.0", returns=None):
    """A wheel named sketchfleet whose commands return these numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    about = f"sketchfleet-{version}.dist-info"
    files = {
        "stand_in.py": PROGRAM.replace("{returns}", repr(returns or {})),
        f"{about}/METADATA": "Metadata-Version: 2.1\nName: sketchfleet\n"
        f"Version: {version}\nProvides-Extra: agent\nProvides-Extra: serve\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/entry_points.txt": "[console_scripts]\nsketchfleet-agent = stand_in:main\n",
    }
    listed = ""
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        listed += f"{name},sha256={digest.decode()},{len(text)}\n"
    wheel = folder / f"sketchfleet-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in {**files, f"{about}/RECORD": f"{listed}{about}/RECORD,,\n"}.items():
            archive.writestr(name, text)
    return wheel


def make_bundle(folder, **facts):
    """A bundle as `sketchfleet-agent bundle` lays it out, for this machine and Python."""
    make_wheel(folder / "wheels")
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    told = {"MACHINE": os.uname().machine, "PYTHON": python, "EXTRAS": "agent", **facts}
    for name, text in told.items():
        (folder / name).write_text(f"{text}\n")
    (folder / "manifest.json").write_text("{}")
    (folder / "constraints.txt").write_text("")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    sums(folder)
    return folder


def sums(folder):
    listed = folder / "SHA256SUMS"
    listed.unlink(missing_ok=True)
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    listed.write_text("".join(
        f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder)}\n" for p in found
    ))  # fmt: skip


def program(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def tree(folder):
    """Every path below, with what makes it what it is."""
    return {
        str(p.relative_to(folder)): str(p.readlink()) if p.is_symlink()
        else p.read_bytes() if p.is_file() else p.stat().st_mode
        for p in sorted(folder.rglob("*"))
    }  # fmt: skip


@pytest.fixture
def bin_folder(tmp_path):
    """Comes first on the PATH: commands put there stand in for the system's."""
    folder = tmp_path / "bin"
    # As `python -m venv`, which unpacks pip for seconds; this one links to the pip at hand.
    (folder / "pip").mkdir(parents=True)
    (folder / "pip" / "pip").symlink_to(Path(pip.__file__).parent)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    program(
        folder / "python",
        f'case "$1 $2" in "-m venv") shift 2; {sys.executable} -m venv --without-pip "$@"; '
        f"for last; do :; done; "
        f'echo {folder}/pip >"$last/lib/python{version}/site-packages/pip.pth";; '
        f'*) exec {sys.executable} "$@";; esac',
    )
    return folder


@pytest.fixture
def install(tmp_path, bin_folder):
    """Runs install.sh below an own root; returns the process, or fails where it should not fail."""

    def go(*words, fails=False, python=True, root=tmp_path / "root", **environ):
        chosen = (
            ["--python", bin_folder / "python"] if python and "--uninstall" not in words else []
        )
        done = subprocess.run(
            ["sh", INSTALLER, "--root", root, *chosen, *words],
            capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False,
            env={**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}",
                 "TMPDIR": str(tmp_path), **environ},
        )  # fmt: skip
        assert (done.returncode != 0) == fails, f"{done.stdout}{done.stderr}"
        return done

    return go
