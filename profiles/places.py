"""Where a service finds its settings and keeps its state when nobody says: the standard places.

systemd's STATE_DIRECTORY first; a system installation under /etc and /var/lib, both below the root
that `deploy/install.sh` installed this program into; a person's own under the XDG base directories.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

NAME = "sketchfleet"


def system_config(prefix: Path = Path(sys.prefix)) -> Path:
    """/etc/sketchfleet, below the root whose opt/sketchfleet this program runs from."""
    parts = prefix.parts
    at = next((i for i in range(len(parts) - 1) if parts[i : i + 2] == ("opt", NAME)), 1)
    return Path(*parts[:at]) / "etc" / NAME


def config_places(file: str, environ: Mapping[str, str] = os.environ) -> tuple[Path, ...]:
    """Where a settings file of this name is looked for, nearest first."""
    return (Path(file), _own("CONFIG", environ) / file, system_config() / file)


def find_config(file: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The first of `config_places` that is there."""
    return next((path for path in config_places(file, environ) if path.is_file()), None)


def state_folder(
    role: str, config: Path | None, beside: str, environ: Mapping[str, str] = os.environ
) -> tuple[Path, str]:
    """(where `role` keeps its state by default, who says so).

    config: its settings file. beside: the name of the folder next to a settings file that lies in
    no standard place.
    """
    if given := environ.get("STATE_DIRECTORY", ""):
        return Path(given.split(":")[0]), "STATE_DIRECTORY"
    folder = None if config is None else config.resolve().parent
    if folder is not None and folder.parts[-2:] == ("etc", NAME):
        return folder.parents[1] / "var" / "lib" / NAME / role, "default"
    if folder is None or folder == _own("CONFIG", environ).resolve():
        return _own("STATE", environ) / role, "default"
    return folder / beside, "default"


def _own(kind: str, environ: Mapping[str, str]) -> Path:
    """The folder of this person for "CONFIG" or "STATE" (XDG base directory specification)."""
    usual = {"CONFIG": ".config", "STATE": ".local/state"}[kind]
    given = environ.get(f"XDG_{kind}_HOME", "")
    home = Path(given) if given.startswith("/") else Path.home() / usual
    return home / NAME
