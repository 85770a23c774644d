"""How many servers are enough for a rollout, and which refuse its revision."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns."""
    op.add_column(
        "rollouts", sa.Column("quorum", sa.JSON(), nullable=False, server_default=sa.text("'{}'"))
    )
    op.add_column(
        "rollouts", sa.Column("failures", sa.JSON(), nullable=False, server_default=sa.text("'[]'"))
    )


def downgrade() -> None:
    """Drop the columns."""
    op.drop_column("rollouts", "failures")
    op.drop_column("rollouts", "quorum")
