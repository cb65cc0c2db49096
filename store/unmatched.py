"""Queries that were near no task, up to a bound. Rows in, records out; whether to keep any is the caller's choice."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from datetime import UTC, datetime

from sqlalchemy import delete, select, update

from store.connection import Database
from store.records import UnmatchedQuery
from store.schema import UnmatchedRow
from store.writing import insert_once


class UnmatchedQueries:
    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, text: str, similarity: float | None, limit: int) -> None:
        """Keep the query, or count it once more. Of more than `limit` those go that were longest not asked."""
        digest, now = hashlib.sha256(text.encode()).hexdigest(), datetime.now(UTC)
        values = {"digest": digest, "text": text, "count": 1, "similarity": similarity, "updated": now}
        again = {"count": UnmatchedRow.count + 1, "similarity": similarity, "updated": now}
        youngest = select(UnmatchedRow.digest).order_by(UnmatchedRow.updated.desc(), UnmatchedRow.digest)
        with self._database.write() as session:
            if not insert_once(session, UnmatchedRow, values):
                session.execute(update(UnmatchedRow).where(UnmatchedRow.digest == digest).values(**again))
            session.execute(delete(UnmatchedRow).where(UnmatchedRow.digest.not_in(youngest.limit(limit))))

    def list(self) -> Sequence[UnmatchedQuery]:
        """All of them, the one that was asked last first."""
        with self._database.read() as session:
            rows = session.scalars(select(UnmatchedRow).order_by(UnmatchedRow.updated.desc(), UnmatchedRow.digest))
            return [UnmatchedQuery(row.digest, row.text, row.count, row.similarity, row.updated) for row in rows]

    def delete(self, digests: Collection[str] | None = None) -> int:
        """Forget those, or all of them; how many there were."""
        query = delete(UnmatchedRow)
        if digests is not None:
            query = query.where(UnmatchedRow.digest.in_(digests))
        with self._database.write() as session:
            return len(session.scalars(query.returning(UnmatchedRow.digest)).all())
