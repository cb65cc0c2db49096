"""What operators should look at: events in, events out. Who raises one, and when, is not known here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from sqlalchemy import select

from store.connection import Database
from store.errors import InvalidInput
from store.records import Event, EventKind
from store.schema import EventRow


class Events:
    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, event: Event) -> None:
        values = {field: getattr(event, field) for field in Event.__slots__}
        with self._database.write() as session:
            session.add(EventRow(**values))

    def list(self, limit: int = 100) -> Sequence[Event]:
        """The `limit` youngest, the youngest first."""
        if limit < 1:
            raise InvalidInput(f"A limit is at least 1, got {limit}.", param="limit")
        with self._database.read() as session:
            rows = session.scalars(select(EventRow).order_by(EventRow.id.desc()).limit(limit))
            return [_event(row) for row in rows]


def _event(row: EventRow) -> Event:
    kind = cast("EventKind", row.kind)  # a check constraint holds it to these words
    return Event(kind, row.model, row.task, row.value, row.bound, row.detail, row.created)
