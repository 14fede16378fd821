"""Who may join and who belongs: tokens, members, their certificates.

Of a token only a keyed hash is kept, of a certificate only its fingerprint. A certificate that is
not in the table is none of the fleet's, whoever signed it; revoking a device empties its rows.
All times are Unix seconds.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sql
from sqlalchemy.dialects.sqlite import insert

from coordinator.store.database import take_write_lock
from coordinator.store.records import Records
from coordinator.store.schema import certificates, members, tokens

Standing = Literal["active", "pending", "revoked"]

_BY_CERTIFICATE = (
    "SELECT m.state FROM certificates c JOIN members m ON m.device_id = c.device_id "
    "WHERE c.fingerprint = ? AND c.device_id = ?"
)
_BY_NAME = "SELECT state FROM members WHERE device_id = ?"


@dataclass(frozen=True)
class TokenRecord:
    """A join token, less its secret. `device_name`: the only one that may join with it."""

    token_id: str
    secret_hash: str
    device_name: str | None
    created_at: float
    expires_at: float
    uses: int
    uses_left: int
    revoked_at: float | None = None


@dataclass(frozen=True)
class MemberRecord:
    """A device that joined or asked to. `generation`: of the authority that signed it last."""

    device_id: str
    state: Standing
    key_digest: str
    token_id: str
    joined_at: float
    changed_at: float
    generation: str | None = None
    certificate_ends_at: float | None = None


class Members:
    """The tables, over the database of `records`. Use `standing` from one thread."""

    def __init__(self, records: Records) -> None:
        self.records = records
        # Asked for every message: past SQLAlchemy, over a connection of its own. It sees at once
        # what another process, say `revoke`, has committed.
        self._reading = sqlite3.connect(
            f"file:{records.path.resolve()}?mode=ro", uri=True, isolation_level=None,
            check_same_thread=False,
        )  # fmt: skip
        self._reading.execute("PRAGMA busy_timeout=5000")

    def close(self) -> None:
        """Releases the connection; the database is the records'."""
        self._reading.close()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sql.Connection]:
        """A transaction that nobody else writes in."""
        with self.records.transaction() as db:
            take_write_lock(db)
            yield db

    # --- tokens ---------------------------------------------------------------------------------

    def add_token(self, token: TokenRecord) -> None:
        """Keeps a new token."""
        with self.writing() as db:
            db.execute(tokens.insert().values(**vars(token)))

    def token(self, token_id: str) -> TokenRecord | None:
        """The token of this id."""
        with self.records.transaction() as db:
            row = db.execute(tokens.select().where(tokens.c.token_id == token_id)).one_or_none()
        return None if row is None else TokenRecord(**row._mapping)

    def all_tokens(self) -> list[TokenRecord]:
        """Every token, oldest first."""
        with self.records.transaction() as db:
            rows = db.execute(tokens.select().order_by(tokens.c.created_at)).all()
        return [TokenRecord(**row._mapping) for row in rows]

    def spend(self, token_id: str, device_name: str, at: float) -> bool:
        """Takes one use of a token that is good for this name now; False where it is not."""
        t = tokens.c
        with self.writing() as db:
            spent = db.execute(
                tokens.update()
                .where(t.token_id == token_id, t.uses_left > 0, t.expires_at > at)
                .where(t.revoked_at.is_(None))
                .where(t.device_name.is_(None) | (t.device_name == device_name))
                .values(uses_left=t.uses_left - 1)
            )
        return spent.rowcount == 1

    def revoke_token(self, token_id: str, at: float) -> bool:
        """Ends a token; False when there is none that was good."""
        t = tokens.c
        with self.writing() as db:
            ended = db.execute(
                tokens.update()
                .where(t.token_id == token_id, t.revoked_at.is_(None))
                .values(revoked_at=at)
            )
        return ended.rowcount == 1

    # --- members --------------------------------------------------------------------------------

    def standing(self, device_id: str, fingerprint: str | None) -> Standing | None:
        """Of a device, by a certificate that was issued here (None: by its name alone).

        None: no such certificate, or no such device.
        """
        if fingerprint is None:
            row = self._reading.execute(_BY_NAME, (device_id,)).fetchone()
        else:
            row = self._reading.execute(_BY_CERTIFICATE, (fingerprint, device_id)).fetchone()
        return None if row is None else row[0]

    def member(self, device_id: str) -> MemberRecord | None:
        """The member of this name."""
        return next(iter(self._members(members.c.device_id == device_id)), None)

    def all_members(self) -> list[MemberRecord]:
        """Every member by name."""
        return self._members(sql.true())

    def _members(self, where: sql.ColumnElement[bool]) -> list[MemberRecord]:
        # SQLite takes bare columns from the row that holds the maximum.
        query = (
            sql.select(members, certificates.c.generation,
                       sql.func.max(certificates.c.issued_at), certificates.c.expires_at)
            .outerjoin(certificates, certificates.c.device_id == members.c.device_id)
            .where(where).group_by(members.c.device_id).order_by(members.c.device_id)
        )  # fmt: skip
        with self.records.transaction() as db:
            rows = db.execute(query).all()
        return [
            MemberRecord(
                row.device_id, row.state, row.key_digest, row.token_id, row.joined_at,
                row.changed_at, row.generation, row.expires_at,
            )
            for row in rows
        ]  # fmt: skip

    def put_member(
        self, device_id: str, state: Standing, key_digest: str, token_id: str, at: float
    ) -> None:
        """A new member, or one that was revoked and may come back."""
        again = {"state": state, "key_digest": key_digest, "token_id": token_id, "changed_at": at}
        with self.writing() as db:
            db.execute(
                insert(members)
                .values(device_id=device_id, joined_at=at, **again)
                .on_conflict_do_update(index_elements=["device_id"], set_=again)
            )
            self.records.put_device(device_id, "", 0.0, at)

    def set_state(self, device_id: str, state: Standing, at: float) -> bool:
        """Approves or revokes, with every certificate; False when there is no such member."""
        with self.writing() as db:
            done = db.execute(
                members.update()
                .where(members.c.device_id == device_id)
                .values(state=state, changed_at=at)
            )
            if state == "revoked":
                db.execute(certificates.delete().where(certificates.c.device_id == device_id))
        return done.rowcount == 1

    # --- certificates ---------------------------------------------------------------------------

    def add_certificate(
        self, fingerprint: str, device_id: str, generation: str, at: float, expires_at: float,
        forget_before: float,
    ) -> None:  # fmt: skip
        """Keeps what was issued, and forgets what expired before a time."""
        with self.writing() as db:
            db.execute(
                certificates.delete()
                .where(certificates.c.device_id == device_id)
                .where(certificates.c.expires_at < forget_before)
            )
            db.execute(certificates.insert().values(
                fingerprint=fingerprint, device_id=device_id, generation=generation, issued_at=at,
                expires_at=expires_at,
            ))  # fmt: skip


def revoked_members(records: Records) -> frozenset[str]:
    """Names of the devices that are shut out."""
    with records.transaction() as db:
        rows = db.execute(sql.select(members.c.device_id).where(members.c.state == "revoked"))
        return frozenset(rows.scalars())
