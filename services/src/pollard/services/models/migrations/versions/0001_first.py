"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Sorted byte by byte everywhere, as page tokens need it, whatever the database's language.
NAME = sa.String(length=63).with_variant(sa.String(length=63, collation="C"), "postgresql")
SERVER = sa.String(length=128).with_variant(sa.String(length=128, collation="C"), "postgresql")


def upgrade() -> None:
    """Create everything."""
    op.create_table(
        "answered",
        sa.Column("request_id", sa.String(length=36), nullable=False),
        sa.Column("method", sa.String(length=64), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("response", sa.LargeBinary(), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("request_id"),
    )
    op.create_index(op.f("ix_answered_create_time"), "answered", ["create_time"], unique=False)
    op.create_table(
        "bundles",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("signature", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("sha256"),
    )
    op.create_table(
        "draining",
        sa.Column("model", NAME, nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("routes_version", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("model", "revision"),
    )
    op.create_table(
        "events",
        sa.Column(
            "sequence",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("time", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("model", NAME, nullable=False),
        sa.Column("resource", sa.String(length=255), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("sequence"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_events_model", "events", ["model", "sequence"], unique=False)
    op.create_table(
        "meta",
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_table(
        "models",
        sa.Column("name", NAME, nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.Column("update_time", sa.BigInteger(), nullable=False),
        sa.Column("delete_time", sa.BigInteger(), nullable=True),
        sa.Column("latest_revision", sa.BigInteger(), nullable=False),
        sa.Column("etag", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "servers",
        sa.Column("server_id", SERVER, nullable=False),
        sa.Column("hello", sa.LargeBinary(), nullable=False),
        sa.Column("present", sa.Boolean(), nullable=False),
        sa.Column("serving", sa.Boolean(), nullable=False),
        sa.Column("last_seen_time", sa.BigInteger(), nullable=False),
        sa.Column("acked_version", sa.BigInteger(), nullable=False),
        sa.Column("last_nack", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("server_id"),
    )
    op.create_table(
        "uploads",
        sa.Column("upload_id", sa.String(length=36), nullable=False),
        sa.Column("model", NAME, nullable=False),
        sa.Column("total_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("existed", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("upload_id"),
    )
    op.create_table(
        "aliases",
        sa.Column("model", NAME, nullable=False),
        sa.Column("name", NAME, nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("pending_revision", sa.BigInteger(), nullable=False),
        sa.Column("previous_revision", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Integer(), nullable=False),
        sa.Column("pending_version", sa.BigInteger(), nullable=True),
        sa.Column("routes_version", sa.BigInteger(), nullable=True),
        sa.Column("error", sa.LargeBinary(), nullable=False),
        sa.Column("failures", sa.JSON(), nullable=False),
        sa.Column("update_time", sa.BigInteger(), nullable=False),
        sa.Column("etag", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["model"], ["models.name"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("model", "name"),
    )
    op.create_table(
        "bundle_files",
        sa.Column("bundle_sha256", sa.String(length=64), nullable=False),
        sa.Column("path", sa.String(length=255), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["bundle_sha256"], ["bundles.sha256"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("bundle_sha256", "path"),
    )
    op.create_index(op.f("ix_bundle_files_sha256"), "bundle_files", ["sha256"], unique=False)
    op.create_table(
        "revisions",
        sa.Column("model", NAME, nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("bundle_sha256", sa.String(length=64), nullable=False),
        sa.Column("state", sa.Integer(), nullable=False),
        sa.Column("error", sa.LargeBinary(), nullable=False),
        sa.Column("notes", sa.Text(), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("creator", sa.String(length=255), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.Column("delete_time", sa.BigInteger(), nullable=True),
        sa.Column("removed_version", sa.BigInteger(), nullable=False),
        sa.Column("etag", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["bundle_sha256"],
            ["bundles.sha256"],
        ),
        sa.ForeignKeyConstraint(["model"], ["models.name"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("model", "number"),
    )
    op.create_index(
        op.f("ix_revisions_bundle_sha256"), "revisions", ["bundle_sha256"], unique=False
    )
