"""What screening found, who stands apart, and the key of signatures."""

from __future__ import annotations

import sqlalchemy as sql
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes the tables; runs that began before are screened from their next round on."""
    op.create_table(
        "screenings",
        sql.Column("assignment_id", sql.String, primary_key=True),
        sql.Column("run_id", sql.String, nullable=False),
        sql.Column("device_id", sql.String, nullable=False),
        sql.Column("round", sql.Integer, nullable=False),
        sql.Column("accepted", sql.Boolean, nullable=False),
        sql.Column("shadow", sql.Boolean, nullable=False),
        sql.Column("reasons", sql.Text, nullable=False),
        sql.Column("size", sql.Float, nullable=False),
        sql.Column("agreement", sql.Float),
        sql.Column("examples", sql.Integer, nullable=False),
        sql.Column("signature", sql.LargeBinary, nullable=False),
    )
    op.create_index("ix_screenings_run_id", "screenings", ["run_id"])
    op.create_table(
        "quarantines",
        sql.Column("number", sql.Integer, primary_key=True),
        sql.Column("device_id", sql.String, nullable=False),
        sql.Column("run_id", sql.String, nullable=False),
        sql.Column("round", sql.Integer, nullable=False),
        sql.Column("at", sql.Float, nullable=False),
        sql.Column("reason", sql.Text, nullable=False),
        sql.Column("needed", sql.Integer, nullable=False),
        sql.Column("clean", sql.Integer, nullable=False),
        sql.Column("ended_at", sql.Float),
        sql.Column("ended_by", sql.String),
    )
    op.create_index("ix_quarantines_device_id", "quarantines", ["device_id"])
    op.create_table(
        "screening_keys",
        sql.Column("run_id", sql.String, primary_key=True),
        sql.Column("secret", sql.String, nullable=False),
    )
