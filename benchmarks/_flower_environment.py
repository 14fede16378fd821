"""Flower in an environment of its own, made when it is first needed.

Flower pins most of what it needs to one minor version, so it shares no environment with ours. What
it does not bring (the trainer's contract needs zstandard) is read from ours, after its own.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from profiles.errors import SketchfleetError

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv-flower"
PINS = Path(__file__).resolve().parent / "peers" / "flower" / "requirements.txt"
OURS = "sketchfleet.pth"


class PeerError(SketchfleetError):
    """The peer cannot be installed or does not run here."""


def flower_commands(folder: Path = FOLDER) -> Path:
    """The folder of Flower's commands; installs them into `folder` first where they are missing.

    Raises `PeerError`.
    """
    ready = folder / f"{PINS.parent.name}-{_digest()}"
    if not ready.exists():
        print(f"installing Flower into {folder} ...", flush=True)
        try:
            venv.create(folder, with_pip=True, clear=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise PeerError(f"no environment can be made in {folder}: {error}") from error
        _install(folder / "bin" / "python")
        # Read after Flower's own packages, so that its versions win.
        (_packages(folder) / OURS).write_text(f"{sysconfig.get_paths()['purelib']}\n{ROOT}\n")
        ready.touch()
    return folder / "bin"


def _install(python: Path) -> None:
    done = subprocess.run(
        [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--retries", "1",
         "-r", str(PINS)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = lines[-1].removeprefix("ERROR: ") if lines else done.stderr.strip()[-300:]
        raise PeerError(
            f"Flower could not be installed ({why}); this comparison needs a package index that "
            f"has what {PINS.name} pins"
        )


def _packages(folder: Path) -> Path:
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return folder / "lib" / name / "site-packages"


def _digest() -> str:
    import hashlib

    return hashlib.sha256(PINS.read_bytes()).hexdigest()[:12]
