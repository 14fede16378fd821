"""Everything the coordinator must not forget, in one relational schema.

SQLite in write-ahead mode with full synchronisation: a receipt is a promise. All times are Unix
seconds. Facts travel in and out as the dataclasses of `protos.contract` and of `rows`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import sqlalchemy as sql
from sqlalchemy.dialects.sqlite import insert

from coordinator.ledger_types import Contribution
from coordinator.store.rows import (
    AssignmentRecord,
    DeviceRecord,
    RoundRecord,
    RunRecord,
    UploadRecord,
    read_assignment,
    read_run,
    read_upload,
)
from coordinator.store.schema import (
    adapters,
    assignments,
    contributions,
    devices,
    rounds,
    runs,
    uploads,
)
from coordinator.store.transactions import Transactions
from profiles.device import DeviceProfile
from protos.contract import (
    AdapterSpec,
    Assignment,
    BlobRef,
    LocalReport,
    canonical_json,
    from_json,
)

NONE_GIVEN: Mapping[str, Contribution] = MappingProxyType({})


# What every push runs, made once: to make one takes longer than to run it.
_ASKED = assignments.c.assignment_id == sql.bindparam("asked")
_ONE_ASSIGNMENT = assignments.select().where(_ASKED)
_STANDING = sql.select(assignments.c.update_digest, assignments.c.report.is_not(None)).where(_ASKED)
_KEEP_UPDATE = (
    assignments.update().where(_ASKED).where(assignments.c.update_digest.is_(None))
    .values(update_digest=sql.bindparam("digest"), update_bytes=sql.bindparam("size_bytes"),
            received_at=sql.bindparam("at"))
)  # fmt: skip
_KEEP_UPLOAD = insert(uploads).on_conflict_do_nothing()


class Records(Transactions):
    """Typed access to the tables. Each public method is one transaction."""

    # --- runs -----------------------------------------------------------------------------------

    def add_run(
        self, spec: AdapterSpec, config: dict[str, Any], initial: Mapping[str, BlobRef], at: float
    ) -> None:
        """Starts a run with version 0 of its model, files by role."""
        with self.transaction() as db:
            db.execute(runs.insert().values(
                run_id=spec.run_id, created_at=at, alive_at=at, config=json.dumps(config),
                spec=canonical_json(spec).decode(),
            ))  # fmt: skip
            _put_version(db, spec.run_id, 0, initial)

    def run(self, run_id: str) -> RunRecord | None:
        """The run of this name."""
        with self.transaction() as db:
            row = db.execute(runs.select().where(runs.c.run_id == run_id)).one_or_none()
        return None if row is None else read_run(row)

    def all_runs(self) -> list[RunRecord]:
        """Every run, oldest first."""
        with self.transaction() as db:
            return [read_run(row) for row in db.execute(runs.select().order_by(runs.c.created_at))]

    def alive(self, run_id: str, at: float) -> None:
        """Notes that the coordinator was running, to measure an outage by."""
        with self.transaction() as db:
            db.execute(runs.update().where(runs.c.run_id == run_id).values(alive_at=at))

    def finish_run(self, run_id: str, at: float) -> None:
        """Marks the run as done."""
        with self.transaction() as db:
            db.execute(runs.update().where(runs.c.run_id == run_id).values(finished_at=at))

    def model(
        self, run_id: str, at_most: int | None = None
    ) -> tuple[int, dict[str, BlobRef]] | None:
        """(version, its files by role) of the newest version, no newer than `at_most` rounds."""
        newest = sql.select(sql.func.max(adapters.c.version)).where(adapters.c.run_id == run_id)
        if at_most is not None:
            newest = newest.where(adapters.c.version <= at_most)
        with self.transaction() as db:
            version = db.execute(newest).scalar()
            if version is None:
                return None
            here = (adapters.c.run_id == run_id) & (adapters.c.version == version)
            rows = db.execute(adapters.select().where(here)).all()
        return version, {row.role: from_json(BlobRef, row.blob) for row in rows}

    def model_digests(self, run_id: str) -> set[str]:
        """Blobs of all versions."""
        query = sql.select(adapters.c.blob).where(adapters.c.run_id == run_id)
        with self.transaction() as db:
            return {from_json(BlobRef, text).digest for text in db.execute(query).scalars()}

    # --- devices --------------------------------------------------------------------------------

    def put_device(
        self, device_id: str, credential_hash: str, expires_at: float, at: float
    ) -> None:
        """Enrols a device, or gives an enrolled one a new credential."""
        values = {"credential_hash": credential_hash, "credential_expires_at": expires_at,
                  "last_seen_at": at}  # fmt: skip
        with self.transaction() as db:
            db.execute(
                insert(devices)
                .values(device_id=device_id, enrolled_at=at, **values)
                .on_conflict_do_update(index_elements=["device_id"], set_=values)
            )

    def credential(self, device_id: str) -> tuple[str, float] | None:
        """(hash, expiry) of a device's credential."""
        query = sql.select(devices.c.credential_hash, devices.c.credential_expires_at)
        with self.transaction() as db:
            row = db.execute(query.where(devices.c.device_id == device_id)).one_or_none()
        return None if row is None else (row[0], row[1])

    def seen(self, device_id: str, at: float, profile: DeviceProfile | None = None) -> None:
        """Notes a sign of life and, when given, the device's newest profile."""
        values: dict[str, Any] = {"last_seen_at": at}
        if profile is not None:
            values["profile"] = canonical_json(profile).decode()
        with self.transaction() as db:
            db.execute(devices.update().where(devices.c.device_id == device_id).values(**values))

    def all_devices(self) -> list[DeviceRecord]:
        """Every enrolled device by name."""
        with self.transaction() as db:
            return [
                DeviceRecord(
                    row.device_id, row.enrolled_at, row.last_seen_at,
                    from_json(DeviceProfile, row.profile) if row.profile else None,
                )
                for row in db.execute(devices.select().order_by(devices.c.device_id))
            ]  # fmt: skip

    # --- rounds ---------------------------------------------------------------------------------

    def open_round(
        self, run_id: str, round_: int, evaluate_only: bool, opened_at: float, deadline_at: float,
        planned: Sequence[tuple[Assignment, dict[str, Any]]],
    ) -> None:  # fmt: skip
        """Opens a round with its assignments; replaces an abandoned attempt at the same round."""
        with self.transaction() as db:
            here = (rounds.c.run_id == run_id) & (rounds.c.round == round_)
            db.execute(rounds.delete().where(here))
            db.execute(assignments.delete().where(
                (assignments.c.run_id == run_id) & (assignments.c.round == round_)
            ))  # fmt: skip
            db.execute(rounds.insert().values(
                run_id=run_id, round=round_, phase="open", evaluate_only=evaluate_only,
                opened_at=opened_at, deadline_at=deadline_at,
            ))  # fmt: skip
            for assignment, predicted in planned:
                db.execute(assignments.insert().values(
                    assignment_id=assignment.assignment_id, run_id=run_id, round=round_,
                    device_id=assignment.device_id, state="issued",
                    assignment=canonical_json(assignment).decode(),
                    predicted=json.dumps(predicted),
                ))  # fmt: skip

    def close_round(self, run_id: str, round_: int, detail: dict[str, Any], at: float) -> None:
        """Freezes the set of updates that will be merged."""
        self._set_round(run_id, round_, phase="merging", detail=json.dumps(detail), closed_at=at)

    def publish_round(
        self, run_id: str, round_: int, files: Mapping[str, BlobRef], merged: Sequence[str],
        detail: dict[str, Any], at: float, given: Mapping[str, Contribution] = NONE_GIVEN,
    ) -> None:  # fmt: skip
        """Commits the merged model (no files: it stays as it was), receipts and ledger facts.

        `given`: what each update gave to the merge, by assignment id.
        """
        with self.transaction() as db:
            if files:
                _put_version(db, run_id, round_ + 1, files)
            db.execute(
                assignments.update()
                .where(assignments.c.assignment_id.in_(list(merged)))
                .values(merged_in=round_)
            )
            for assignment_id, gave in given.items():
                db.execute(insert(contributions).values(
                    assignment_id=assignment_id, run_id=run_id, merged_in=round_,
                    **dataclasses.asdict(gave),
                ))  # fmt: skip
            db.execute(
                rounds.update()
                .where((rounds.c.run_id == run_id) & (rounds.c.round == round_))
                .values(phase="merged", detail=json.dumps(detail), merged_at=at)
            )

    def move_deadline(self, run_id: str, round_: int, deadline_at: float) -> None:
        """Gives a round the time back that the coordinator was away."""
        self._set_round(run_id, round_, deadline_at=deadline_at)

    def _set_round(self, run_id: str, round_: int, **values: Any) -> None:
        with self.transaction() as db:
            db.execute(
                rounds.update()
                .where((rounds.c.run_id == run_id) & (rounds.c.round == round_))
                .values(**values)
            )

    def all_rounds(self, run_id: str) -> list[RoundRecord]:
        """The rounds of a run in order."""
        query = rounds.select().where(rounds.c.run_id == run_id).order_by(rounds.c.round)
        with self.transaction() as db:
            return [
                RoundRecord(
                    r.round, r.phase, r.evaluate_only, r.opened_at, r.deadline_at, r.closed_at,
                    r.merged_at, json.loads(r.detail) if r.detail else {},
                )
                for r in db.execute(query)
            ]  # fmt: skip

    # --- assignments ----------------------------------------------------------------------------

    def assignments(self, run_id: str, round_: int | None = None) -> list[AssignmentRecord]:
        """Assignments of a run (or of one round) by round and device."""
        query = assignments.select().where(assignments.c.run_id == run_id)
        if round_ is not None:
            query = query.where(assignments.c.round == round_)
        with self.transaction() as db:
            rows = db.execute(query.order_by(assignments.c.round, assignments.c.device_id)).all()
        return [read_assignment(row) for row in rows]

    def assignment(self, assignment_id: str) -> AssignmentRecord | None:
        """One assignment."""
        with self.transaction() as db:
            row = db.execute(_ONE_ASSIGNMENT, {"asked": assignment_id}).one_or_none()
        return None if row is None else read_assignment(row)

    def put_report(self, report: LocalReport) -> None:
        """Keeps the report of an assignment; the first one stands."""
        state = "arrived" if report.outcome == "done" else "failed"
        with self.transaction() as db:
            db.execute(
                assignments.update()
                .where(assignments.c.assignment_id == report.assignment_id)
                .where(assignments.c.report.is_(None))
                .values(report=canonical_json(report).decode(), state=state)
            )

    def put_update(
        self, assignment_id: str, digest: str, size_bytes: int, at: float
    ) -> tuple[str, bool, bool]:
        """Keeps an update unless one is there.

        Returns (the digest that stands, whether it is new, whether the report is in).
        """
        with self.transaction() as db:
            kept = db.execute(
                _KEEP_UPDATE,
                {"asked": assignment_id, "digest": digest, "size_bytes": size_bytes, "at": at},
            )
            standing, reported = db.execute(_STANDING, {"asked": assignment_id}).one()
            return str(standing), bool(kept.rowcount), bool(reported)

    def ask_again(self, assignment_id: str) -> None:
        """Forgets an update that is lost here and its report, unless it is merged.

        Where its round was about to be merged, the round is open again.
        """
        with self.transaction() as db:
            row = db.execute(
                assignments.update()
                .where(assignments.c.assignment_id == assignment_id)
                .where(assignments.c.merged_in.is_(None))
                .values(state="issued", report=None, update_digest=None, update_bytes=None,
                        received_at=None)
                .returning(assignments.c.run_id, assignments.c.round)
            ).one_or_none()  # fmt: skip
            if row is not None:
                here = (rounds.c.run_id == row.run_id) & (rounds.c.round == row.round)
                db.execute(
                    rounds.update().where(here & (rounds.c.phase == "merging"))
                    .values(phase="open", closed_at=None, detail=None)
                )  # fmt: skip

    def contributions(self, run_id: str) -> dict[str, Contribution]:
        """What every merged update of a run gave, by assignment id."""
        query = contributions.select().where(contributions.c.run_id == run_id)
        with self.transaction() as db:
            return {
                row.assignment_id: Contribution(
                    row.weight, row.share, row.alignment, row.norm, row.components
                )
                for row in db.execute(query)
            }

    # --- uploads --------------------------------------------------------------------------------

    def put_upload(self, upload: UploadRecord) -> None:
        """Remembers an upload; repeating it changes nothing."""
        with self.transaction() as db:
            db.execute(_KEEP_UPLOAD, {
                "upload_id": upload.upload_id, "assignment_id": upload.assignment_id,
                "digest": upload.digest, "size_bytes": upload.size_bytes,
            })  # fmt: skip

    def upload(self, upload_id: str) -> UploadRecord | None:
        """One upload."""
        with self.transaction() as db:
            row = db.execute(uploads.select().where(uploads.c.upload_id == upload_id)).one_or_none()
        return None if row is None else read_upload(row)


def _put_version(
    db: sql.Connection, run_id: str, version: int, files: Mapping[str, BlobRef]
) -> None:
    here = (adapters.c.run_id == run_id) & (adapters.c.version == version)
    db.execute(adapters.delete().where(here))
    for role, blob in files.items():
        db.execute(adapters.insert().values(
            run_id=run_id, version=version, role=role, blob=canonical_json(blob).decode()
        ))  # fmt: skip
