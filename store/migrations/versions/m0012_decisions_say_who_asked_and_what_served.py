"""Decisions name the key that asked, the model, and the profile and share that served. Older ones do not know."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("decisions") as decisions:
        decisions.add_column(sa.Column("key", sa.Text(), nullable=True))
        decisions.add_column(sa.Column("model", sa.Text(), nullable=True))
        decisions.add_column(sa.Column("profile", sa.Text(), nullable=True))
        decisions.add_column(sa.Column("keep", sa.Double(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("decisions") as decisions:
        for name in ("keep", "profile", "model", "key"):
            decisions.drop_column(name)
