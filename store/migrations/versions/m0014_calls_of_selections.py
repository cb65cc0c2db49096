"""Selections say how many experts a token calls in each layer; those made before call as many as the model does."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("selections") as selections:
        selections.add_column(sa.Column("calls", sa.JSON(none_as_null=True), nullable=True))
        selections.add_column(sa.Column("active", sa.Double(), server_default="1", nullable=False))
        selections.add_column(sa.Column("calls_by", sa.Text(), server_default="all", nullable=False))
        selections.create_check_constraint("active_is_a_share", "active > 0 AND active <= 1")


def downgrade() -> None:
    with op.batch_alter_table("selections") as selections:
        selections.drop_constraint("active_is_a_share", type_="check")
        for name in ("calls", "active", "calls_by"):
            selections.drop_column(name)
