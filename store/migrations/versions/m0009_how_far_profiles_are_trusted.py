"""Profiles are judged: figures and doubts. Those made before have no judgement until their text is profiled again."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "trust",
        sa.Column("profile", sa.Text(), nullable=False),
        sa.Column("tokens_per_expert", sa.Double(), nullable=False),
        sa.Column("unseen", sa.Double(), nullable=False),
        sa.Column("skew", sa.Double(), nullable=False),
        sa.Column("least_skew", sa.Double(), nullable=False),
        sa.Column("agreement", sa.Double(), nullable=True),
        sa.Column("doubts", sa.JSON(), nullable=False),
        sa.CheckConstraint("unseen >= 0 AND unseen <= 1", name=op.f("ck_trust_unseen_is_a_share")),
        sa.CheckConstraint("agreement >= 0 AND agreement <= 1", name=op.f("ck_trust_agreement_is_a_share")),
        sa.ForeignKeyConstraint(["profile"], ["profiles.id"], name=op.f("fk_trust_profile"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("profile", name=op.f("pk_trust")),
    )


def downgrade() -> None:
    op.drop_table("trust")
