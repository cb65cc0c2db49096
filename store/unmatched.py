"""Queries that were near no task, up to a bound. Rows in, records out; whether to keep any is the caller's choice."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from store.connection import Database
from store.records import UnmatchedQuery
from store.schema import UnmatchedRow
from store.writing import insert_once

PORTION = 1000  # digests of one statement


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
            if insert_once(session, UnmatchedRow, values):
                session.execute(delete(UnmatchedRow).where(UnmatchedRow.digest.not_in(youngest.limit(limit))))
            else:
                session.execute(update(UnmatchedRow).where(UnmatchedRow.digest == digest).values(**again))

    def list(self) -> Sequence[UnmatchedQuery]:
        """All of them, the one that was asked last first."""
        with self._database.read() as session:
            rows = session.scalars(select(UnmatchedRow).order_by(UnmatchedRow.updated.desc(), UnmatchedRow.digest))
            return [UnmatchedQuery(row.digest, row.text, row.count, row.similarity, row.updated) for row in rows]

    def delete(self, digests: Collection[str] | None = None) -> int:
        """Forget those, or all of them; how many there were."""
        with self._database.write() as session:
            return forget(session, digests)


def forget(session: Session, digests: Collection[str] | None) -> int:
    """In portions: a statement has a bounded number of parameters."""
    if digests is None:
        return len(session.scalars(delete(UnmatchedRow).returning(UnmatchedRow.digest)).all())
    count = 0
    for portion in batched(sorted(digests), PORTION):
        query = delete(UnmatchedRow).where(UnmatchedRow.digest.in_(portion))
        count += len(session.scalars(query.returning(UnmatchedRow.digest)).all())
    return count


def batched(digests: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(digests), size):
        yield digests[start : start + size]
