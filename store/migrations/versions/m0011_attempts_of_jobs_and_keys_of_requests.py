"""Jobs count their attempts and deaths, a task has one job at a time, and requests that make tasks are known again."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

ACTIVE = sa.text("state IN ('queued', 'running')")
# Of several jobs of a task that have not ended, the one that runs stays, else the oldest.
CANCEL_OTHERS = """
UPDATE jobs SET state = 'cancelled', detail = 'another job of this task had not ended'
WHERE state IN ('queued', 'running') AND EXISTS (
    SELECT 1 FROM jobs AS other
    WHERE other.model = jobs.model AND other.task = jobs.task AND other.state IN ('queued', 'running')
    AND other.id <> jobs.id AND (
        other.state > jobs.state OR (other.state = jobs.state AND (
            other.created < jobs.created OR (other.created = jobs.created AND other.id < jobs.id)))))
"""


def upgrade() -> None:
    op.add_column("jobs", sa.Column("attempt", sa.Integer(), server_default="0", nullable=False))
    op.add_column("jobs", sa.Column("deaths", sa.Integer(), server_default="0", nullable=False))
    op.execute(CANCEL_OTHERS)
    op.create_index(
        "ix_jobs_active", "jobs", ["model", "task"], unique=True, sqlite_where=ACTIVE, postgresql_where=ACTIVE
    )
    op.create_table(
        "requests",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_requests")),
    )


def downgrade() -> None:
    op.drop_table("requests")
    op.drop_index("ix_jobs_active", table_name="jobs")
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_column("deaths")
        jobs.drop_column("attempt")
