"""The device's copy of the global adapter on disk: one file, named by its digest.

Knows how a step is taken so that after a crash the old copy is there, or the new one. What a mirror
is and how the next one is made is `protos.mirror`'s; fetching is the agent's.
"""

from __future__ import annotations

from pathlib import Path

from protos.contract import AdapterSpec, Assignment, BlobRef, MirrorStep
from protos.mirror import MirrorError, advance
from protos.transfer import make_folder, move_durably, sha256_of

NEXT = "next"  # being written


class Mirror:
    """The one mirror in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        make_folder(folder)
        (folder / NEXT).unlink(missing_ok=True)
        found = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for path in found[:-1]:  # a kill came between the new one and the end of the old
            path.unlink()
        self.digest = found[-1].name if found else ""

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self._folder / self.digest

    def wanted(self, step: MirrorStep) -> tuple[BlobRef, ...]:
        """What must be fetched to take this step; a copy that is damaged is removed."""
        if self.digest == step.result.digest:
            if sha256_of(self.path) == self.digest:
                return ()
            self.clear()
        if step.base is None or step.base.digest == self.digest:
            return tuple(dict.fromkeys(file.blob for file in step.files))
        return (step.result,)

    def take(self, spec: AdapterSpec, task: Assignment, blobs: Path) -> Path:
        """Takes the step of an assignment; `blobs` holds what was wanted. Returns the new mirror.

        Raises `MirrorError` when the result is not the one that the step names, and `PackingError`
        or `OSError` when something cannot be read: then the mirror is to be fetched whole.
        """
        step = task.mirror
        if step is None:
            raise MirrorError("the assignment names no mirror")
        if self.digest == step.result.digest:
            return self.path
        made = self._folder / NEXT
        if step.base is None or step.base.digest == self.digest:
            files = [blobs / file.blob.digest for file in step.files]
            advance(spec, task, None if step.base is None else self.path, files, made)
            if sha256_of(made) != step.result.digest:
                raise MirrorError(
                    f"the mirror came out other than {step.result.digest[:12]}; fetch it whole"
                )
        else:
            (blobs / step.result.digest).replace(made)
        old = self.path if self.digest else None
        move_durably(made, self._folder / step.result.digest)
        self.digest = step.result.digest
        if old is not None:
            old.unlink(missing_ok=True)
        return self.path

    def clear(self) -> None:
        """Forgets what is held."""
        for path in self._folder.iterdir():
            path.unlink()
        self.digest = ""
