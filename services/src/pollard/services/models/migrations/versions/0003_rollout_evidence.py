"""What was seen in a step of a rollout, and shadows."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns of shadows and the tables of evidence."""
    with op.batch_alter_table("rollouts") as rollouts:
        for column in (
            sa.Column("shadow_ppm", sa.Integer(), nullable=False, server_default="0"),
            sa.Column("shadow_output", sa.Text(), nullable=False, server_default=""),
            sa.Column("shadow_transforms", sa.Boolean(), nullable=False, server_default=sa.false()),
            sa.Column("min_agreement", sa.Float(), nullable=False, server_default="0"),
        ):
            rollouts.add_column(column)
    for name, columns in (
        (
            "rollout_evidence",
            (
                sa.Column("step", sa.Integer(), nullable=False),
                sa.Column("held_us", sa.BigInteger(), nullable=False),
                sa.Column("seen", sa.JSON(), nullable=False),
            ),
        ),
        (
            "rollout_baselines",
            (
                sa.Column("server_id", sa.String(length=128), nullable=False),
                sa.Column("revision", sa.BigInteger(), nullable=False),
                sa.Column("run_id", sa.String(length=64), nullable=False),
                sa.Column("counters", sa.LargeBinary(), nullable=False),
            ),
        ),
    ):
        keys = [c.name for c in columns if c.name in ("server_id", "revision")]
        op.create_table(
            name,
            sa.Column("model", sa.String(length=63), nullable=False),
            sa.Column("number", sa.BigInteger(), nullable=False),
            *columns,
            sa.ForeignKeyConstraint(
                ["model", "number"], ["rollouts.model", "rollouts.number"], ondelete="CASCADE"
            ),
            sa.PrimaryKeyConstraint("model", "number", *keys),
        )
