"""The statistics of parts of a task's text, which several machines may sum up for one profile."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "profile_parts",
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("parts", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("statistics", sa.LargeBinary(), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("number >= 1 AND number <= parts", name=op.f("ck_profile_parts_number_is_of_the_parts")),
        sa.PrimaryKeyConstraint("run", "parts", "number", name=op.f("pk_profile_parts")),
    )
    op.create_index(op.f("ix_profile_parts_task"), "profile_parts", ["task"])


def downgrade() -> None:
    op.drop_index(op.f("ix_profile_parts_task"), table_name="profile_parts")
    op.drop_table("profile_parts")
