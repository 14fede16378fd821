"""The tables. All times are Unix seconds; facts are kept as the JSON of their dataclasses.

A change here goes with a revision in `migrations/versions`.
"""

from __future__ import annotations

import sqlalchemy as sql

META = sql.MetaData()
APPEND_ONLY = [
    f"CREATE TRIGGER audit_no_{what.lower()} BEFORE {what} ON audit "
    "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
    for what in ("UPDATE", "DELETE")
]

runs = sql.Table(
    "runs", META,
    sql.Column("run_id", sql.String, primary_key=True),
    sql.Column("created_at", sql.Float, nullable=False),
    sql.Column("config", sql.Text, nullable=False),
    sql.Column("spec", sql.Text, nullable=False),
    sql.Column("alive_at", sql.Float, nullable=False),
    sql.Column("finished_at", sql.Float),
)  # fmt: skip
devices = sql.Table(
    "devices", META,
    sql.Column("device_id", sql.String, primary_key=True),
    sql.Column("enrolled_at", sql.Float, nullable=False),
    sql.Column("last_seen_at", sql.Float, nullable=False),
    sql.Column("credential_hash", sql.String, nullable=False),
    sql.Column("credential_expires_at", sql.Float, nullable=False),
    sql.Column("profile", sql.Text),
)  # fmt: skip
adapters = sql.Table(
    "adapters", META,
    sql.Column("run_id", sql.String, primary_key=True),
    sql.Column("version", sql.Integer, primary_key=True),
    sql.Column("role", sql.String, primary_key=True),
    sql.Column("blob", sql.Text, nullable=False),
)  # fmt: skip
rounds = sql.Table(
    "rounds", META,
    sql.Column("run_id", sql.String, primary_key=True),
    sql.Column("round", sql.Integer, primary_key=True),
    sql.Column("phase", sql.String, nullable=False),
    sql.Column("evaluate_only", sql.Boolean, nullable=False),
    sql.Column("opened_at", sql.Float, nullable=False),
    sql.Column("deadline_at", sql.Float, nullable=False),
    sql.Column("closed_at", sql.Float),
    sql.Column("merged_at", sql.Float),
    sql.Column("detail", sql.Text),
)  # fmt: skip
assignments = sql.Table(
    "assignments", META,
    sql.Column("assignment_id", sql.String, primary_key=True),
    sql.Column("run_id", sql.String, nullable=False),
    sql.Column("round", sql.Integer, nullable=False),
    sql.Column("device_id", sql.String, nullable=False),
    sql.Column("assignment", sql.Text, nullable=False),
    sql.Column("predicted", sql.Text, nullable=False),
    sql.Column("state", sql.String, nullable=False),
    sql.Column("report", sql.Text),
    sql.Column("update_digest", sql.String),
    sql.Column("update_bytes", sql.Integer),
    sql.Column("received_at", sql.Float),
    sql.Column("merged_in", sql.Integer),
    sql.UniqueConstraint("run_id", "round", "device_id"),
)  # fmt: skip
contributions = sql.Table(
    "contributions", META,
    sql.Column("assignment_id", sql.String, primary_key=True),
    sql.Column("run_id", sql.String, nullable=False, index=True),
    sql.Column("merged_in", sql.Integer, nullable=False),
    sql.Column("weight", sql.Float, nullable=False),
    sql.Column("share", sql.Float),
    sql.Column("alignment", sql.Float),
    sql.Column("norm", sql.Float),
    sql.Column("components", sql.LargeBinary, nullable=False),
)  # fmt: skip
uploads = sql.Table(
    "uploads", META,
    sql.Column("upload_id", sql.String, primary_key=True),
    sql.Column("assignment_id", sql.String, nullable=False),
    sql.Column("digest", sql.String, nullable=False),
    sql.Column("size_bytes", sql.Integer, nullable=False),
)  # fmt: skip
audit = sql.Table(
    "audit", META,
    sql.Column("number", sql.Integer, primary_key=True),
    sql.Column("at", sql.Float, nullable=False),
    sql.Column("event", sql.String, nullable=False),
    sql.Column("run_id", sql.String, index=True),
    sql.Column("facts", sql.Text, nullable=False),
    sql.Column("link", sql.String, nullable=False),
)  # fmt: skip
for _trigger in APPEND_ONLY:
    sql.event.listen(audit, "after_create", sql.DDL(_trigger))  # type: ignore[no-untyped-call]
tokens = sql.Table(
    "tokens", META,
    sql.Column("token_id", sql.String, primary_key=True),
    sql.Column("secret_hash", sql.String, nullable=False),
    sql.Column("device_name", sql.String),
    sql.Column("created_at", sql.Float, nullable=False),
    sql.Column("expires_at", sql.Float, nullable=False),
    sql.Column("uses", sql.Integer, nullable=False),
    sql.Column("uses_left", sql.Integer, nullable=False),
    sql.Column("revoked_at", sql.Float),
)  # fmt: skip
members = sql.Table(
    "members", META,
    sql.Column("device_id", sql.String, primary_key=True),
    sql.Column("state", sql.String, nullable=False),
    sql.Column("key_digest", sql.String, nullable=False),
    sql.Column("token_id", sql.String, nullable=False),
    sql.Column("joined_at", sql.Float, nullable=False),
    sql.Column("changed_at", sql.Float, nullable=False),
)  # fmt: skip
certificates = sql.Table(
    "certificates", META,
    sql.Column("fingerprint", sql.String, primary_key=True),
    sql.Column("device_id", sql.String, nullable=False, index=True),
    sql.Column("generation", sql.String, nullable=False),
    sql.Column("issued_at", sql.Float, nullable=False),
    sql.Column("expires_at", sql.Float, nullable=False),
)  # fmt: skip
screenings = sql.Table(
    "screenings", META,
    sql.Column("assignment_id", sql.String, primary_key=True),
    sql.Column("run_id", sql.String, nullable=False, index=True),
    sql.Column("device_id", sql.String, nullable=False),
    sql.Column("round", sql.Integer, nullable=False),
    sql.Column("accepted", sql.Boolean, nullable=False),
    sql.Column("shadow", sql.Boolean, nullable=False),
    sql.Column("reasons", sql.Text, nullable=False),
    sql.Column("size", sql.Float, nullable=False),
    sql.Column("agreement", sql.Float),
    sql.Column("examples", sql.Integer, nullable=False),
    sql.Column("signature", sql.LargeBinary, nullable=False),
)  # fmt: skip
quarantines = sql.Table(
    "quarantines", META,
    sql.Column("number", sql.Integer, primary_key=True),
    sql.Column("device_id", sql.String, nullable=False, index=True),
    sql.Column("run_id", sql.String, nullable=False),
    sql.Column("round", sql.Integer, nullable=False),
    sql.Column("at", sql.Float, nullable=False),
    sql.Column("reason", sql.Text, nullable=False),
    sql.Column("needed", sql.Integer, nullable=False),
    sql.Column("clean", sql.Integer, nullable=False),
    sql.Column("ended_at", sql.Float),
    sql.Column("ended_by", sql.String),
)  # fmt: skip
screening_keys = sql.Table(
    "screening_keys", META,
    sql.Column("run_id", sql.String, primary_key=True),
    sql.Column("secret", sql.String, nullable=False),
)  # fmt: skip
