"""A row for SQLite in one statement of the driver's own, compiled once: past SQLAlchemy, whose way to the driver takes
longer than the driver, and far longer in a process that does other work in between and finds it in no cache."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import Any

from sqlalchemy import Engine, insert
from sqlalchemy.exc import DBAPIError


class PlainInsert:
    """Rows of one table, every one with values for the same `columns`."""

    def __init__(self, row: type[Any], columns: tuple[str, ...], engine: Engine) -> None:
        self._engine = engine
        compiled = insert(row).compile(dialect=engine.dialect, column_keys=list(columns))
        self._sql = str(compiled)
        types = {name: row.__table__.columns[name].type for name in compiled.positiontup or ()}
        self._writers = {
            name: kind.dialect_impl(engine.dialect).bind_processor(engine.dialect) for name, kind in types.items()
        }

    def add(self, values: dict[str, Any]) -> None:
        """In a transaction of its own, which the driver begins and commits. Raises DBAPIError, as SQLAlchemy does."""
        row = [values[name] if write is None else write(values[name]) for name, write in self._writers.items()]
        try:
            with closing(self._engine.raw_connection()) as held:
                connection: Any = held.driver_connection
                connection.execute(self._sql, row)
        except sqlite3.Error as error:
            raise DBAPIError.instance(self._sql, None, error, sqlite3.Error) from error
