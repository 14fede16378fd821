"""Join tokens, members of the fleet, and the certificates that were issued to them."""

from __future__ import annotations

import sqlalchemy as sql
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes the tables; devices of a plain-text fleet are no members, they enrol anew."""
    op.create_table(
        "tokens",
        sql.Column("token_id", sql.String, primary_key=True),
        sql.Column("secret_hash", sql.String, nullable=False),
        sql.Column("device_name", sql.String),
        sql.Column("created_at", sql.Float, nullable=False),
        sql.Column("expires_at", sql.Float, nullable=False),
        sql.Column("uses", sql.Integer, nullable=False),
        sql.Column("uses_left", sql.Integer, nullable=False),
        sql.Column("revoked_at", sql.Float),
    )
    op.create_table(
        "members",
        sql.Column("device_id", sql.String, primary_key=True),
        sql.Column("state", sql.String, nullable=False),
        sql.Column("key_digest", sql.String, nullable=False),
        sql.Column("token_id", sql.String, nullable=False),
        sql.Column("joined_at", sql.Float, nullable=False),
        sql.Column("changed_at", sql.Float, nullable=False),
    )
    op.create_table(
        "certificates",
        sql.Column("fingerprint", sql.String, primary_key=True),
        sql.Column("device_id", sql.String, nullable=False),
        sql.Column("generation", sql.String, nullable=False),
        sql.Column("issued_at", sql.Float, nullable=False),
        sql.Column("expires_at", sql.Float, nullable=False),
    )
    op.create_index("ix_certificates_device_id", "certificates", ["device_id"])
