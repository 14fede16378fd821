"""The wheel of the Sketchfleet that runs here, to be handed on to another machine.

From its sources it is built; an installed one is put together again from its files, each checked
against what was recorded when it was installed. Knows no platform: the package is pure Python.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from profiles.errors import SketchfleetError

NAME = "sketchfleet"
MADE_BY_INSTALLERS = ("INSTALLER", "RECORD", "REQUESTED", "direct_url.json")  # of .dist-info


class OwnWheelError(SketchfleetError):
    """The running package cannot be made into a wheel."""


def own_wheel(folder: Path) -> Path:
    """Writes the wheel into the folder. Raises `OwnWheelError`."""
    sources = Path(__file__).resolve().parent.parent
    if (sources / "pyproject.toml").is_file():
        return _built(sources, folder)
    try:
        return packed_again(distribution(NAME), folder)
    except PackageNotFoundError as error:
        raise OwnWheelError(
            f"{sources} is neither an installation of {NAME} nor its sources; install it with pip"
        ) from error


def _built(sources: Path, folder: Path) -> Path:
    # The builder that is here needs no index; else pip fetches it.
    here = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    done = subprocess.run(  # noqa: S603 - pip on our own sources
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", *here,
         "--no-deps", "--wheel-dir", str(folder), str(sources)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = list(folder.glob(f"{NAME}-*.whl"))
    if done.returncode or len(found) != 1:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise OwnWheelError(f"the wheel of {sources} cannot be built with pip: {last}")
    return found[0]


def packed_again(installed: Distribution, folder: Path) -> Path:
    """The wheel that this was installed from, but for its compression. Raises `OwnWheelError`."""
    wheel = folder / f"{NAME}-{installed.version}-py3-none-any.whl"
    records = []
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(installed.files or (), key=str):
            own = ".dist-info" in file.parts[0] and file.name in MADE_BY_INSTALLERS
            if own or file.hash is None or file.parts[0] == "..":  # programs, compiled modules
                continue
            content = Path(str(installed.locate_file(file))).read_bytes()
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            if (file.hash.mode, file.hash.value) != ("sha256", digest):
                raise OwnWheelError(
                    f"{file} of the installed {NAME} was changed since; install {NAME} again"
                )
            archive.writestr(zipfile.ZipInfo(str(file)), content, zipfile.ZIP_DEFLATED)
            records.append(f"{file},sha256={digest},{len(content)}")
        place = next((r.split("/", 1)[0] for r in records if ".dist-info/" in r), None)
        if place is None:
            raise OwnWheelError(f"the installed {NAME} records no files; install it again")
        record = f"{place}/RECORD"
        archive.writestr(zipfile.ZipInfo(record), "\n".join([*records, f"{record},,", ""]))
    return wheel
