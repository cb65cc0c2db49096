"""Inserts that two writers may make at once, and the time they agree on, the same on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import CursorResult, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from store.schema import Row, UtcDateTime


def insert_once(session: Session, row: type[Row], values: Mapping[str, Any]) -> bool:
    """Whether the row is new. One with the same primary key stays as it is."""
    insert = _insert(session, row, values).on_conflict_do_nothing(index_elements=_key(row))
    done = session.execute(insert, execution_options={"preserve_rowcount": True})
    assert isinstance(done, CursorResult)
    return done.rowcount == 1


def upsert(
    session: Session, row: type[Row], values: Mapping[str, Any], update: Sequence[str], key: Sequence[str] = ()
) -> None:
    """Inserts the row; where one with the same `key` (the primary key) exists, sets its `update` columns."""
    new = {name: values[name] for name in update}
    session.execute(_insert(session, row, values).on_conflict_do_update(index_elements=key or _key(row), set_=new))


def now(session: Session) -> datetime:
    """By the clock that all writers share: the server's; SQLite's is that of the machine, and so ours."""
    if session.get_bind().dialect.name == "sqlite":
        return datetime.now(UTC)
    return session.scalars(select(func.clock_timestamp(type_=UtcDateTime))).one()


def _insert(session: Session, row: type[Row], values: Mapping[str, Any]) -> sqlite.Insert | postgresql.Insert:
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    return insert(row).values(**values)


def _key(row: type[Row]) -> list[str]:
    return [column.name for column in row.__table__.primary_key]
