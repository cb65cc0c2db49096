"""Selections say what stands in for the experts that they leave out; those made before have nothing."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("selections") as selections:
        selections.add_column(sa.Column("stand_in", sa.Text(), server_default="nothing", nullable=False))


def downgrade() -> None:
    with op.batch_alter_table("selections") as selections:
        selections.drop_column("stand_in")
