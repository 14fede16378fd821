"""What a power cut leaves of a state folder: what was synced, under the names that were.

The processes keep account while they run (`protos.faults`). Bytes written after a file's last sync
are gone, so are names that were made, and those that were removed are back, if their folder was not
synced since. SQLite's files are left alone: it syncs by itself, and what it does not have to keep
it may.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from protos import faults

SYNCS_ITSELF = (".sqlite", "lock", ".log")


def baseline(state: Path, folder: Path) -> None:
    """Takes what is in a state folder now for synced. `folder`: that of the faults."""
    faults.arm(folder)
    try:
        for path in [state, *(p for p in state.rglob("*") if p.is_dir())]:
            for file in path.iterdir():
                if file.is_file():
                    faults.synced_file(file)
            faults.synced_folder(path)
    finally:
        faults.arm(None)


def cut_power(state: Path, folder: Path) -> list[str]:
    """Takes away what was not synced; the processes are dead. Returns what that was, in words."""
    sizes: dict[str, int] = {}
    names: dict[str, dict[str, str]] = {}
    synced = folder / "synced"
    for line in synced.read_text().splitlines() if synced.exists() else ():
        if not line.endswith("}"):  # the process died as it wrote it
            continue
        note = json.loads(line)
        if "file" in note:
            sizes[note["file"]] = note["size"]
        else:
            names[note["folder"]] = note["entries"]
    lost: list[str] = []
    _restore(state.resolve(), state.resolve(), folder / "kept", sizes, names, lost)
    return lost


def _restore(
    path: Path, root: Path, kept: Path, sizes: dict[str, int], names: dict[str, dict[str, str]],
    lost: list[str],
) -> None:  # fmt: skip
    durable = names.get(str(path), {})
    for entry in sorted(path.iterdir()):
        if any(word in entry.name for word in SYNCS_ITSELF):
            continue
        if durable.get(entry.name, "").removeprefix("folder ") != str(entry.lstat().st_ino):
            lost.append(f"{entry.relative_to(root)} is gone")
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for name, what in durable.items():
        entry = path / name
        if any(word in name for word in SYNCS_ITSELF) or not what:
            continue
        if not entry.exists():
            lost.append(f"{entry.relative_to(root)} is back")
            entry.mkdir() if what.startswith("folder") else os.link(kept / what, entry)
        if what.startswith("folder"):
            _restore(entry, root, kept, sizes, names, lost)
        elif entry.stat().st_size > sizes.get(what, 0):
            lost.append(f"{entry.relative_to(root)} is cut to {sizes.get(what, 0)} bytes")
            os.truncate(entry, sizes.get(what, 0))
