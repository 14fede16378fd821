"""Which files a device may fetch: those that its own assignments name."""

from __future__ import annotations

from coordinator.store.records import Records


def names_blob(records: Records, run_id: str, device_id: str, newest: int, digest: str) -> bool:
    """Whether an assignment of a device, of a round up to `newest`, names a file.

    Rounds long closed count as well: a device that was away may still evaluate what it was sent.
    """
    for round_ in range(newest, -1, -1):  # most ask for the newest
        record = records.assignment(f"{run_id}.{round_}.{device_id}")
        if record is None:
            continue
        task = record.assignment
        if any(blob.digest == digest for blob in task.blobs):
            return True
        # Who lacks the base of a mirror fetches it whole.
        if task.mirror is not None and task.mirror.result.digest == digest:
            return True
    return False
