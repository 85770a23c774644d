"""Signatures of bundles, and where copied revisions came from."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; what is stored already is unsigned and was copied from nowhere."""
    for column in (
        sa.Column("signer_key", sa.String(64), nullable=False, server_default=""),
        sa.Column("signer_trusted", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("signed_by", sa.String(255), nullable=False, server_default=""),
        sa.Column("signed_time", sa.BigInteger(), nullable=False, server_default="0"),
    ):
        op.add_column("bundles", column)
    op.add_column("revisions", sa.Column("origin", sa.LargeBinary(), nullable=True))
