"""API keys, by their hashes. Rows in, records out; a key itself never comes here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from sqlalchemy import delete, select

from store.changes import note_change
from store.connection import Database
from store.errors import Conflict, NotFound
from store.records import ApiKey, Role
from store.schema import KeyRow
from store.writing import insert_once


class Keys:
    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, key: ApiKey) -> None:
        """Raises Conflict where the id is taken."""
        with self._database.write() as session:
            if not insert_once(session, KeyRow, {field: getattr(key, field) for field in ApiKey.__slots__}):
                raise Conflict(f"Key {key.id} is in the store already. Create another one.")
            note_change(session)

    def list(self) -> Sequence[ApiKey]:
        """The oldest first."""
        with self._database.read() as session:
            return [_key(row) for row in session.scalars(select(KeyRow).order_by(KeyRow.created, KeyRow.id))]

    def delete(self, id: str) -> None:  # noqa: A002
        """Raises NotFound."""
        with self._database.write() as session:
            if session.get(KeyRow, id) is None:
                raise NotFound(f"No key {id!r} is in the store. `moepager keys list` shows them.")
            session.execute(delete(KeyRow).where(KeyRow.id == id))
            note_change(session)


def _key(row: KeyRow) -> ApiKey:
    role = cast("Role", row.role)  # a check constraint holds it to these words
    tasks = None if row.tasks is None else tuple(row.tasks)
    return ApiKey(row.id, row.name, role, row.digest, row.per_minute, row.created, tasks)
