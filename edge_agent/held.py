"""The fleet's newest whole adapter that this device was given, kept for whoever wants to use it.

`held/held.json` in the state folder names a run, a round and the files, which lie beside it under
their digests. It is replaced as a whole once all files are there, so that it may be read while the
agent works; and it stays when the run ends. The files are hard links to the mirror and the blobs
that the agent has anyway. Knows no PEFT and no inference.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from profiles.errors import SketchfleetError
from protos.codecs import PackingError
from protos.contract import (
    AdapterSpec,
    Assignment,
    BlobRef,
    ContractError,
    Part,
    from_plain,
    to_plain,
)
from protos.layout import Parts
from protos.transfer import make_folder, sha256_of, write_durably
from protos.unpacking import open_packed
from protos.whole_adapter import WholeAdapter, with_branch

FOLDER, NAME = "held", "held.json"
VERSION = 1


class HeldError(SketchfleetError):
    """There is no adapter of the fleet here, or it cannot be read."""


@dataclass(frozen=True)
class Held:
    """What lies here. round: how many rounds went into it; side: a branch beside it, at scale 1.

    personal: parts that never left the devices, without which it is no model.
    """

    folder: Path
    spec: AdapterSpec
    round: int
    files: tuple[BlobRef, ...]
    side: BlobRef | None = None
    personal: tuple[Part, ...] = ()

    @property
    def digests(self) -> tuple[str, ...]:
        """Names of its files."""
        return tuple(b.digest for b in (*self.files, self.side) if b is not None)

    def whole(self) -> WholeAdapter:
        """The adapter, its branch included. Raises `HeldError`."""
        spec, scale = self.spec, self.spec.scale(self.spec.rank)
        if self.personal:
            raise HeldError(
                f"run {spec.run_id} keeps {', '.join(self.personal)} on each device, so that the "
                "fleet has no adapter; use this device's own"
            )
        try:
            for digest in self.digests:
                if sha256_of(self.folder / digest) != digest:
                    raise HeldError(f"{self.folder / digest} is damaged; the next round mends it")
            parts = self._read(self.files)
            branch = self._read([] if self.side is None else [self.side])
        except (OSError, PackingError) as error:
            raise HeldError(
                f"the adapter in {self.folder} cannot be read ({error}); the next round mends it"
            ) from error
        factors = {}
        for m in spec.modules:
            found: Parts = {
                "up": np.zeros((spec.rank, m.out_features), np.float32),
                "down": np.zeros((spec.rank, m.in_features), np.float32),
                **parts.get(m.name, {}),
            }
            factors[m.name] = with_branch(spec, found, scale, branch.get(m.name))
        rank = len(next(iter(factors.values()))[0])
        dense = {t.name: parts[t.name]["dense"] for t in spec.dense if t.name in parts}
        return WholeAdapter(spec, rank, factors, dense, self.round)

    def _read(self, blobs: Sequence[BlobRef]) -> dict[str, Parts]:
        found: dict[str, Parts] = {}
        for blob in blobs:
            reader = open_packed(self.folder / blob.digest, self.spec, blob.payload)
            for name in reader.names:
                found.setdefault(name, {}).update(reader.module(name))
        return found


def keep(state: Path, spec: AdapterSpec, task: Assignment, mirror: Path | None) -> None:
    """Keeps what an assignment brought if that is the whole adapter; else what is kept stays.

    For the agent, once everything is fetched. mirror: after the assignment's step. Raises
    `OSError`.
    """
    step = task.mirror
    if not (task.evaluates_global or (step is not None and task.rank == spec.rank)):
        return
    if step is None or mirror is None:
        files = {blob: state / "blobs" / blob.digest for blob in task.global_adapter}
    else:
        files = {step.result: mirror} if step.result.payload.parts else {}
    side = task.global_side if task.evaluates_global else task.side
    if side is not None:
        files[side] = state / "blobs" / side.digest
    folder = state / FOLDER
    make_folder(folder)
    for blob, path in files.items():
        _link(path, folder / blob.digest)
    plain = {
        "version": VERSION,
        "spec": to_plain(spec),
        "round": task.round,
        "files": [to_plain(blob) for blob in files if blob != side],
        "side": None if side is None else to_plain(side),
        "personal": list(task.personal),
    }
    write_durably(folder / NAME, json.dumps(plain, sort_keys=True).encode())
    _clear(folder, (NAME, *(blob.digest for blob in files)))


def _link(source: Path, target: Path) -> None:
    """One more name for a file; a copy where the file system has no hard links."""
    part = target.with_name(f"{target.name}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:
        shutil.copyfile(source, part)
    part.replace(target)
    part.unlink(missing_ok=True)  # two names of one file: then `replace` does nothing


def _clear(folder: Path, but: Iterable[str]) -> None:
    for path in folder.iterdir():
        if path.name not in but:
            path.unlink()


def read_held(state: Path) -> Held | None:
    """What is kept in this state folder; None where nothing is. Raises `HeldError`."""
    path = state / FOLDER / NAME
    try:
        plain: dict[str, Any] = json.loads(path.read_bytes())
        if plain["version"] != VERSION:
            raise HeldError(f"{path} is another release's; the next round writes it anew")
        side = plain["side"]
        return Held(
            path.parent,
            from_plain(AdapterSpec, plain["spec"]),
            int(plain["round"]),
            tuple(from_plain(BlobRef, blob) for blob in plain["files"]),
            None if side is None else from_plain(BlobRef, side),
            tuple(plain["personal"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, ContractError) as error:
        raise HeldError(f"{path} cannot be read; the next round writes it anew") from error
