"""The audit log."""

from __future__ import annotations

import sqlalchemy as sql
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes the table, which takes rows and gives none back."""
    op.create_table(
        "audit",
        sql.Column("number", sql.Integer, primary_key=True),
        sql.Column("at", sql.Float, nullable=False),
        sql.Column("event", sql.String, nullable=False),
        sql.Column("run_id", sql.String, index=True),
        sql.Column("facts", sql.Text, nullable=False),
        sql.Column("link", sql.String, nullable=False),
    )
    for what in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER audit_no_{what.lower()} BEFORE {what} ON audit "
            "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
        )
