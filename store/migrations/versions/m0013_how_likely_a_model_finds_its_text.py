"""How likely the model finds a profile's text. Of profiles from before that nobody knows until they are made again."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("trust") as trust:
        trust.add_column(sa.Column("surprise", sa.Double(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("trust") as trust:
        trust.drop_column("surprise")
