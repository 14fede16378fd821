"""Writes `constraints/*.txt` anew: what the resolver chooses for each platform's tags and Python.

    python -m tools.lock_platforms [PLATFORM ...]

Needs uv and an index; no board. The comment at the head of a file is kept. `HELD` says which
versions a platform cannot choose freely, and the heads of the files say why.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from edge_agent.platforms import PLATFORMS, Platform

ROOT = Path(__file__).parents[1]

DEVICE = ("agent", "data", "export", "serve", "train")
EXTRAS = {
    "jetpack6": DEVICE,
    "jetpack7": DEVICE,
    "x86-cuda": (*DEVICE, "coordinator", "trial"),
    "x86-cpu": (*DEVICE, "coordinator", "trial"),
}
HELD = {
    "jetpack6": ("torch==2.8.0", "bitsandbytes==0.49.2"),
    "jetpack7": ("torch==2.15.0",),
}
CUDA_OF_TORCH = ("cuda-", "nvidia-", "triton")  # what only a CUDA build of torch asks for


class LockError(Exception):
    """The resolver found nothing, or could not be asked."""


def resolve(platform: Platform, python: str, constraints: Path) -> dict[str, str]:
    """Package -> version for the platform under `constraints`. Raises `LockError`."""
    extras = [word for extra in EXTRAS[platform.name] for word in ("--extra", extra)]
    command = [
        sys.executable, "-m", "uv", "pip", "compile", str(ROOT / "pyproject.toml"), *extras,
        "--python-platform", f"{platform.machine}-manylinux_2_{platform.glibc}",
        "--python-version", python, "--only-binary", ":all:", "--constraints", str(constraints),
        "--quiet", "--no-header", "--no-annotate", "--no-python-downloads", "--no-progress",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LockError(done.stderr.strip())
    pins = dict(line.split("==") for line in done.stdout.split())
    if platform.name == "x86-cpu":
        pins = {name: version for name, version in pins.items()
                if not name.startswith(CUDA_OF_TORCH)}  # fmt: skip
    return pins


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("platforms", nargs="*", metavar="PLATFORM", help=", ".join(PLATFORMS))
    for name in parser.parse_args(argv).platforms or PLATFORMS:
        platform, file = PLATFORMS[name], ROOT / "constraints" / f"{name}.txt"
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as held:
            held.write("".join(f"{pin}\n" for pin in HELD.get(name, ())))
            if platform.machine == "x86_64":
                held.write((ROOT / "constraints.txt").read_text())  # what the checks run with
            held.flush()
            try:
                pins = resolve(platform, platform.pythons[0], Path(held.name))
            except LockError as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 1
        head = [line for line in file.read_text().splitlines() if line.startswith("#")]
        lines = [f"{package}=={version}" for package, version in sorted(pins.items())]
        file.write_text("\n".join([*head, *lines, ""]))
        print(f"{file.relative_to(ROOT)}: {len(pins)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
