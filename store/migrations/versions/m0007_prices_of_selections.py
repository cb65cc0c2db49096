"""What selections cost: accuracy with an interval, on a task's own items and on others'."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "prices",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("selection", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("evaluation_hash", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("items", sa.Integer(), nullable=False),
        sa.Column("accuracy", sa.Double(), nullable=True),
        sa.Column("full_accuracy", sa.Double(), nullable=True),
        sa.Column("low", sa.Double(), nullable=True),
        sa.Column("high", sa.Double(), nullable=True),
        sa.Column("nll", sa.Double(), nullable=False),
        sa.Column("draws", sa.JSON(), nullable=False),
        sa.CheckConstraint("text IN ('own', 'others')", name=op.f("ck_prices_text_is_known")),
        sa.ForeignKeyConstraint(["selection"], ["selections.id"], name=op.f("fk_prices_selection"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_prices")),
        sa.UniqueConstraint(
            "selection", "text", "evaluation_hash", name=op.f("uq_prices_selection_text_evaluation_hash")
        ),
    )


def downgrade() -> None:
    op.drop_table("prices")
