"""What can be done about files that rotted on the coordinator's disk.

A blob's name is its SHA-256, so damage shows. Whoever finds some stops the coordinator with a
`DamagedError`; as it starts again, what the run still needs is looked through and made anew from
what it came from: slices from the model, the newest model from the updates that were merged into
it, an update by asking its device for it again. Each of these gives the same bits as before, which
is checked. What cannot be made anew comes from a backup.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence

from coordinator.audit import Audit
from coordinator.issuing import Issuer
from coordinator.store.blobs import BlobStore, UnknownBlobError
from coordinator.store.records import Records
from coordinator.store.rows import AssignmentRecord, RoundRecord
from profiles.errors import SketchfleetError
from protos.codecs import PackingError
from protos.contract import BlobRef

log = logging.getLogger("sketchfleet.coordinator")

Remake = Callable[[int, Sequence[AssignmentRecord], dict[str, float]], dict[str, BlobRef]]
"""(round, updates merged in it, their weights) -> the files of the model after it."""


class DamagedError(SketchfleetError):
    """A file of the state folder is not what it was."""


def require_sound(blobs: BlobStore, digests: Iterable[str]) -> None:
    """Raises `DamagedError` when one of the blobs is damaged or gone. Reads all of them."""
    for digest in dict.fromkeys(digests):
        if not blobs.is_sound(digest):
            raise DamagedError(
                f"blob {digest[:12]} of the state folder is damaged; start again, what can be made "
                "anew is, and see to the disk"
            )


def read_by_merge(records: Records, run_id: str, merged: Sequence[AssignmentRecord]) -> list[str]:
    """The blobs that a merge reads: the newest model, and updates."""
    found = records.model(run_id)
    read = [] if found is None else [blob.digest for blob in found[1].values()]
    return read + [r.update_digest for r in merged if r.update_digest is not None]


class Mender:
    """Mends one run before it goes on."""

    def __init__(
        self, run_id: str, records: Records, blobs: BlobStore, issuer: Issuer, remake: Remake
    ) -> None:
        self._run_id, self._records, self._blobs = run_id, records, blobs
        self._issuer, self._remake = issuer, remake
        self._audit = Audit(records)

    def mend(self) -> None:
        """Looks through what the run needs and mends it. Raises `DamagedError`."""
        history = self._records.all_rounds(self._run_id)
        self._mend_model(history)
        if history and history[-1].phase != "merged":
            self._mend_updates(history[-1])
            self._mend_round(history[-1])

    def _mend_model(self, history: Sequence[RoundRecord]) -> None:
        found = self._records.model(self._run_id)
        assert found is not None, "a run has a model from its start"
        version, files = found
        damaged = [blob.digest for blob in files.values() if not self._blobs.is_sound(blob.digest)]
        if not damaged:
            return
        number = version - 1
        merged = [a for a in self._records.assignments(self._run_id) if a.merged_in == number]
        before = self._records.model(self._run_id, number)
        sources = [a.update_digest for a in merged if a.update_digest is not None]
        sources += [] if before is None else [blob.digest for blob in before[1].values()]
        if not merged or not all(self._blobs.is_sound(digest) for digest in sources):
            raise DamagedError(
                f"the model after {version} rounds is damaged and so is what it was made from; "
                "restore a backup (sketchfleet-coordinator restore)"
            )
        for digest in damaged:
            self._blobs.drop(digest)
        detail = next(r.detail for r in history if r.round == number)
        made = self._remake(number, merged, detail["weights"])
        if {role: blob.digest for role, blob in made.items()} != {
            role: blob.digest for role, blob in files.items()
        }:
            raise DamagedError(
                f"the model after {version} rounds is damaged, and merging round {number} again "
                "gave another; restore a backup (sketchfleet-coordinator restore)"
            )
        self._tell("the newest model was damaged and is merged again", damaged)

    def _mend_updates(self, last: RoundRecord) -> None:
        for record in self._records.assignments(self._run_id):
            digest, number = record.update_digest, record.assignment.round
            if digest is None or record.merged_in is not None:
                continue
            # Of an earlier round, one that came late may still be merged; others went long ago.
            if number < last.round and not self._blobs.holds(digest):
                continue
            if not self._blobs.is_sound(digest):
                self._blobs.drop(digest)
                with self._records.transaction():
                    self._records.ask_again(record.assignment.assignment_id)
                    self._tell("an update was damaged; its device is asked again", [digest])

    def _mend_round(self, last: RoundRecord) -> None:
        for record in self._records.assignments(self._run_id, last.round):
            task = record.assignment
            named = [blob.digest for blob in task.blobs]
            if task.mirror is not None:
                named.append(task.mirror.result.digest)
            damaged = [name for name in named if not self._blobs.is_sound(name)]
            if not damaged:
                continue
            for lost in damaged:
                self._blobs.drop(lost)
            with contextlib.suppress(PackingError, UnknownBlobError):  # of the mirror before
                self._issuer.cut_again(record)
            if all(self._blobs.is_sound(lost) for lost in damaged):
                self._tell("what a device is to fetch was damaged and is cut again", damaged)
            else:
                raise DamagedError(
                    f"what {task.device_id} is to fetch in round {last.round} is damaged and came "
                    "out otherwise; restore a backup (sketchfleet-coordinator restore)"
                )

    def _tell(self, what: str, digests: Sequence[str]) -> None:
        log.error("%s", what, extra={"blobs": [digest[:12] for digest in digests]})
        self._audit.record("mended", run_id=self._run_id, what=what, blobs=list(digests))
