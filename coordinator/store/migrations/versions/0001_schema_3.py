"""The tables as they were when revisions began: what programs before knew as schema 3."""

from __future__ import annotations

import sqlalchemy as sql
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes the tables."""
    op.create_table(
        "runs",
        sql.Column("run_id", sql.String, primary_key=True),
        sql.Column("created_at", sql.Float, nullable=False),
        sql.Column("config", sql.Text, nullable=False),
        sql.Column("spec", sql.Text, nullable=False),
        sql.Column("alive_at", sql.Float, nullable=False),
        sql.Column("finished_at", sql.Float),
    )
    op.create_table(
        "devices",
        sql.Column("device_id", sql.String, primary_key=True),
        sql.Column("enrolled_at", sql.Float, nullable=False),
        sql.Column("last_seen_at", sql.Float, nullable=False),
        sql.Column("credential_hash", sql.String, nullable=False),
        sql.Column("credential_expires_at", sql.Float, nullable=False),
        sql.Column("profile", sql.Text),
    )
    op.create_table(
        "adapters",
        sql.Column("run_id", sql.String, primary_key=True),
        sql.Column("version", sql.Integer, primary_key=True),
        sql.Column("role", sql.String, primary_key=True),
        sql.Column("blob", sql.Text, nullable=False),
    )
    op.create_table(
        "rounds",
        sql.Column("run_id", sql.String, primary_key=True),
        sql.Column("round", sql.Integer, primary_key=True),
        sql.Column("phase", sql.String, nullable=False),
        sql.Column("evaluate_only", sql.Boolean, nullable=False),
        sql.Column("opened_at", sql.Float, nullable=False),
        sql.Column("deadline_at", sql.Float, nullable=False),
        sql.Column("closed_at", sql.Float),
        sql.Column("merged_at", sql.Float),
        sql.Column("detail", sql.Text),
    )
    op.create_table(
        "assignments",
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
    )
    op.create_table(
        "contributions",
        sql.Column("assignment_id", sql.String, primary_key=True),
        sql.Column("run_id", sql.String, nullable=False, index=True),
        sql.Column("merged_in", sql.Integer, nullable=False),
        sql.Column("weight", sql.Float, nullable=False),
        sql.Column("share", sql.Float),
        sql.Column("alignment", sql.Float),
        sql.Column("norm", sql.Float),
        sql.Column("components", sql.LargeBinary, nullable=False),
    )
    op.create_table(
        "uploads",
        sql.Column("upload_id", sql.String, primary_key=True),
        sql.Column("assignment_id", sql.String, nullable=False),
        sql.Column("digest", sql.String, nullable=False),
        sql.Column("size_bytes", sql.Integer, nullable=False),
    )
