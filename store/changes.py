"""The count of changes: every write that changes what a service serves adds one, so that noticing costs one number."""

from __future__ import annotations

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from store.connection import Database
from store.schema import ChangesRow


def note_change(session: Session) -> None:
    """Inside the writer's own transaction: the change and its count are seen together, or neither is."""
    session.execute(update(ChangesRow).values(count=ChangesRow.count + 1))


class Changes:
    def __init__(self, database: Database) -> None:
        self._database = database

    def count(self) -> int:
        with self._database.read() as session:
            return session.scalars(select(ChangesRow.count)).one()
