"""`sketchfleet-agent bundle`: everything that a machine without a network is installed from.

One uncompressed tar with one folder, `sketchfleet-VERSION-PLATFORM/`:

    install.sh, systemd/   the installer; started there, it installs from the folder
    wheels/                Sketchfleet and everything its extras need on the platform
    constraints.txt        the pins that the wheels were chosen by
    manifest.json          what this is; SHA-256 and size of every file but itself and SHA256SUMS
    SHA256SUMS             the same for `sha256sum -c`, manifest.json included
    EXTRAS, PYTHON, MACHINE    of the manifest, a line each, for a shell
    model/                 with a model: its folder as it was given
    agent.toml             with a configuration: as it was given
    join                   with a join file: as it was given; the tar is then for its owner's eyes
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from edge_agent.bundle_wheels import collect, metadata, read_pins
from edge_agent.own_wheel import own_wheel
from edge_agent.platforms import PLATFORMS, Platform
from profiles.errors import SketchfleetError
from profiles.progress import Progress, progress
from protos.transfer import sha256_of

FORMAT = 1
MB = 10**6


class BundleError(SketchfleetError):
    """A bundle that cannot be made."""


@dataclass(frozen=True)
class Wanted:
    """What goes into a bundle."""

    platform: Platform
    python: str
    extras: tuple[str, ...]
    model: Path | None = None
    config: Path | None = None
    join: Path | None = None


def wanted(
    platform: str, python: str | None, extras: str, model: Path | None, config: Path | None,
    join: Path | None,
) -> Wanted:  # fmt: skip
    """The same from words, checked before anything is fetched. Raises `BundleError`."""
    if platform not in PLATFORMS:
        raise BundleError(f"platform {platform!r} is not known; choose from {', '.join(PLATFORMS)}")
    there = PLATFORMS[platform]
    if python is not None and python not in there.pythons:
        raise BundleError(
            f"{platform} has Python {' or '.join(there.pythons)}, not {python}; leave --python out"
        )
    if model is not None and not any(model.glob("*")):
        raise BundleError(f"--model {model} is no folder with a model in it")
    if config is not None:
        from edge_agent.config import AgentConfig, AgentConfigError
        from profiles.settings import load_settings

        load_settings(config, AgentConfig, AgentConfigError)
    if join is not None:
        from protos.invitation import read_invitation

        if not join.is_file():
            raise BundleError(f"--join {join} is no file")
        read_invitation(str(join))
    names = tuple(dict.fromkeys(name.strip() for name in extras.split(",") if name.strip()))
    return Wanted(there, python or there.pythons[0], names or ("agent",), model, config, join)


def make(wish: Wanted, out: Path) -> dict[str, object]:
    """Writes the tar; returns its manifest. There is either all of it or nothing.

    Raises `BundleError`, `WheelError`, `OwnWheelError`, and `OSError` of a disk.
    """
    place = out.resolve().parent
    if out.exists() or out.is_symlink():
        raise BundleError(f"{out} is there already; remove it or choose another --out")
    if not place.is_dir():
        raise BundleError(f"{place} is not there; choose another --out")
    with (
        tempfile.TemporaryDirectory(prefix=".sketchfleet-bundle-", dir=place) as name,
        progress(f"a bundle for {wish.platform.name}") as line,
    ):
        folder = Path(name)
        files, manifest = _gather(wish, folder, line)
        size = sum(path.stat().st_size for path in files.values())
        free = shutil.disk_usage(place).free
        if free < size + MB:
            raise BundleError(
                f"the bundle takes {size / MB:.0f} MB, {place} has {free / MB:.0f} MB free; make "
                "room there or choose another --out"
            )
        top = f"sketchfleet-{manifest['version']}-{wish.platform.name}"
        line.step(what=f"writing {out.name}")
        half = folder / "bundle.tar"
        with half.open("xb") as stream:
            os.fchmod(stream.fileno(), 0o600 if wish.join else 0o644)
            with tarfile.open(fileobj=stream, mode="w", dereference=True) as archive:
                for inside, path in files.items():
                    archive.add(path, f"{top}/{inside}", recursive=False, filter=_plain)
            stream.flush()
            os.fsync(stream.fileno())
        half.rename(out)
    return manifest


def _gather(
    wish: Wanted, folder: Path, line: Progress
) -> tuple[dict[str, Path], dict[str, object]]:
    """Every file by its place in the bundle, and the manifest."""
    wheels = folder / "wheels"
    wheels.mkdir()
    line.step(what="packing Sketchfleet's own wheel")
    own = own_wheel(wheels)
    told = metadata(own)
    known = told.get_all("Provides-Extra", [])
    if strange := [extra for extra in wish.extras if extra not in known]:
        raise BundleError(f"there is no extra {strange[0]!r}; choose from {', '.join(known)}")
    pins = shipped(f"constraints/{wish.platform.name}.txt")
    collect(own, wish.extras, wish.platform, wish.python, read_pins(pins), wheels,
            lambda what: line.step(what=f"fetching {what}"))  # fmt: skip
    files = {"install.sh": shipped("deploy/install.sh"), "constraints.txt": pins}
    files |= _below(shipped("deploy/systemd"), "systemd") | _below(wheels, "wheels")
    files |= _below(wish.model, "model") if wish.model else {}
    files |= {"agent.toml": wish.config} if wish.config else {}
    files |= {"join": wish.join} if wish.join else {}
    for name, text in (
        ("EXTRAS", ",".join(wish.extras)),
        ("PYTHON", wish.python),
        ("MACHINE", wish.platform.machine),
    ):
        files[name] = folder / name
        files[name].write_text(f"{text}\n")
    line.step(what="hashing")
    sums = {name: sha256_of(path) for name, path in files.items()}
    manifest: dict[str, object] = {
        "format": FORMAT, "version": told["Version"], "platform": wish.platform.name,
        "python": wish.python, "machine": wish.platform.machine, "extras": list(wish.extras),
        "files": {name: {"sha256": digest, "bytes": files[name].stat().st_size}
                  for name, digest in sums.items()},
    }  # fmt: skip
    text = json.dumps(manifest, indent=1) + "\n"
    (folder / "manifest.json").write_text(text)
    sums["manifest.json"] = hashlib.sha256(text.encode()).hexdigest()
    lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
    (folder / "SHA256SUMS").write_text("".join(lines))
    first = {name: folder / name for name in ("manifest.json", "SHA256SUMS")}
    return first | files, manifest


def _below(folder: Path, name: str) -> dict[str, Path]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    if odd := next((path for path in found if set(path.name) & {"\n", "\\"}), None):
        raise BundleError(f"SHA256SUMS cannot hold the name {odd.name!r} in {folder}; rename it")
    return {f"{name}/{path.relative_to(folder).as_posix()}": path for path in found}


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Nobody's file in particular."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    name = member.name.partition("/")[2]
    member.mode = {"install.sh": 0o755, "join": 0o600}.get(name, 0o644)
    return member


def shipped(name: str) -> Path:
    """A file of the project that comes with the package, or lies in its sources.

    Raises `BundleError`.
    """
    here = Path(__file__).resolve().parent
    for place in (here / "shipped" / name, here.parent / name):
        if place.exists():
            return place
    raise BundleError(f"{name} did not come with this installation; install Sketchfleet again")
