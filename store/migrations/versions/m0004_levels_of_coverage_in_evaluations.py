"""Evaluations keep the levels of coverage that mode auto draws its bound from; those made before have none."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("evaluations") as evaluations:
        evaluations.add_column(sa.Column("levels", sa.JSON(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("evaluations") as evaluations:
        evaluations.drop_column("levels")
