"""Keys, the text of tasks that are profiled over REST, and a count of the changes that a service has to see."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    changes = op.create_table(
        "changes",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_changes"),
    )
    op.bulk_insert(changes, [{"id": 1, "count": 0}])
    op.create_table(
        "keys",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("per_minute", sa.Integer(), nullable=True),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("role IN ('query', 'operator')", name=op.f("ck_keys_role_is_known")),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
    )
    op.create_table(
        "corpora",
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("exemplars", sa.JSON(), nullable=False),
        sa.Column("calibration", sa.JSON(), nullable=False),
        sa.Column("evaluation", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["task"], ["tasks.name"], name="fk_corpora_task", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("task", name="pk_corpora"),
    )


def downgrade() -> None:
    for table in ("corpora", "keys", "changes"):
        op.drop_table(table)
