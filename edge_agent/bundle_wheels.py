"""Every wheel that Sketchfleet and its extras need on a platform, fetched from pip's indexes.

What is needed follows from the metadata of the wheels themselves, with the platform's own
environment markers (pip would evaluate those of this machine), in the versions that
`constraints/PLATFORM.txt` pins. Nothing is resolved here, and nothing is built.
"""

from __future__ import annotations

import email
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from email.message import Message
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from edge_agent.platforms import Platform
from profiles.errors import SketchfleetError

NO_MATCH = re.compile(r"No matching distribution found for ([^\s;]+)")


class WheelError(SketchfleetError):
    """A wheel that a bundle needs cannot be had."""


def read_pins(path: Path) -> dict[str, str]:
    """Package -> version of a constraints file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line.strip() and not line.startswith("#"))
    return {canonicalize_name(name): version.strip() for name, version in pairs}


def requirements(
    wheel: Path, extras: Collection[str], environment: Mapping[str, str]
) -> list[Requirement]:
    """What a wheel with these extras needs there."""
    found = [Requirement(text) for text in metadata(wheel).get_all("Requires-Dist", [])]
    return [
        wanted for wanted in found
        if wanted.marker is None
        or any(wanted.marker.evaluate({**environment, "extra": extra}) for extra in ("", *extras))
    ]  # fmt: skip


def metadata(wheel: Path) -> Message:
    """The core metadata of a wheel. Raises `WheelError`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
            return email.message_from_bytes(archive.read(name))
    except (zipfile.BadZipFile, StopIteration) as error:
        raise WheelError(f"{wheel.name} is no wheel; clear pip's cache and try again") from error


def collect(
    own: Path, extras: Collection[str], platform: Platform, python: str, pins: Mapping[str, str],
    folder: Path, told: Callable[[str], None] = lambda what: None,
) -> list[Path]:  # fmt: skip
    """Fetches into `folder` what `own` with `extras` needs there; returns all but `own`.

    told: hears which packages are fetched. Raises `WheelError`.
    """
    environment = platform.environment(python)
    wheels: dict[str, Path] = {canonicalize_name(parse_wheel_filename(own.name)[0]): own}
    wanted: dict[str, set[str]] = {name: set(extras) for name in wheels}
    while True:
        known = {name: set(asked) for name, asked in wanted.items()}
        missing: dict[str, str] = {}
        for name, wheel in list(wheels.items()):
            for need in requirements(wheel, sorted(wanted[name]), environment):
                key = canonicalize_name(need.name)
                wanted.setdefault(key, set()).update(need.extras)
                if key not in wheels:
                    missing[key] = _pinned(need, key, name, pins, platform)
        if missing:
            told(", ".join(sorted(missing)))
            for tags in sorted({platform.tags(name) for name in missing}):
                specs = [missing[name] for name in sorted(missing) if platform.tags(name) == tags]
                download(specs, tags, platform, python, folder)
            wheels |= {
                canonicalize_name(parse_wheel_filename(path.name)[0]): path
                for path in folder.glob("*.whl")
            }
            if lost := sorted(missing.keys() - wheels.keys()):
                raise WheelError(f"pip fetched no wheel of {', '.join(lost)}")
        elif wanted == known:
            return [wheel for wheel in wheels.values() if wheel != own]


def _pinned(
    need: Requirement, key: str, asked_by: str, pins: Mapping[str, str], platform: Platform
) -> str:
    version = pins.get(key)
    file = f"constraints/{platform.name}.txt"
    if version is None or version not in need.specifier:
        raise WheelError(
            f"{asked_by} asks for {need.name}{need.specifier}, {file} pins "
            f"{version or 'none'}: the pins are out of date (tools/lock_platforms.py makes them "
            f"anew), or pip's index gave a build of {asked_by} for another kind of machine"
        )
    local = "+cpu" if key in platform.cpu_builds else ""
    return f"{need.name}=={version}{local}"


def download(
    specs: Sequence[str], tags: Sequence[str], platform: Platform, python: str, folder: Path
) -> None:
    """Has pip fetch these wheels, and nothing they need, for a platform. Raises `WheelError`."""
    places = [word for tag in tags for word in ("--platform", tag)]
    done = subprocess.run(  # noqa: S603 - pip with names out of wheels' metadata and our own pins
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-input",
         "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:",
         "--implementation", "cp", "--python-version", python, *places, "--dest", str(folder),
         *specs],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return
    where = f"{platform.name} (Python {python}, {platform.machine}, glibc 2.{platform.glibc})"
    if found := NO_MATCH.search(done.stderr):
        raise WheelError(
            f"no index that pip knows has a wheel of {found[1]} for {where}; where to take it from "
            f"says the head of constraints/{platform.name}.txt, and pip must know that index (pip "
            "config set global.extra-index-url ADDRESS)"
        )
    if "No module named pip" in done.stderr:
        raise WheelError(f"{sys.executable} has no pip; add it with: python -m ensurepip")
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    raise WheelError(f"pip could not fetch wheels for {where}: {last.removeprefix('ERROR: ')}")
