"""Parts of a profile that several processes make, each stored once under its run and number. Rows in, records out.

A part that is there stays: whoever makes it a second time adds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, select

from store.connection import Database
from store.errors import NotFound
from store.packing import pack_arrays, unpack_arrays
from store.records import ProfilePart
from store.schema import PartRow
from store.writing import insert_once


class ProfileParts:
    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, part: ProfilePart) -> bool:
        """Whether it is new."""
        values = {
            "run": part.run,
            "parts": part.of,
            "number": part.number,
            "model": part.model,
            "task": part.task,
            "statistics": pack_arrays(part.statistics),  # outside the transaction: compressing takes a while
            "created": part.created,
        }
        with self._database.write() as session:
            return insert_once(session, PartRow, values)

    def list(self, run: str) -> Sequence[tuple[int, int]]:
        """Number and how many parts the text was cut into, in order."""
        query = select(PartRow.number, PartRow.parts).where(PartRow.run == run).order_by(PartRow.parts, PartRow.number)
        with self._database.read() as session:
            return [(number, parts) for number, parts in session.execute(query)]

    def get(self, run: str, number: int, of: int) -> ProfilePart:
        """Raises NotFound, and CorruptStore where its statistics are damaged."""
        with self._database.read() as session:
            row = session.get(PartRow, (run, of, number))
        if row is None:
            raise NotFound(f"No part {number}/{of} of run {run} is in the store. Make it: moepager profile --part.")
        statistics = unpack_arrays(row.statistics, f"part {number}/{of} of run {run}")
        return ProfilePart(row.run, row.number, row.parts, row.model, row.task, statistics, row.created)

    def runs(self, task: str | None = None) -> Sequence[str]:
        """All that have a part in the store, of one task or of all."""
        query = select(PartRow.run).distinct().order_by(PartRow.run)
        with self._database.read() as session:
            return list(session.scalars(query if task is None else query.where(PartRow.task == task)))

    def forget(self, run: str, part: tuple[int, int] | None = None) -> None:
        """All parts of a run, or one, named as `list` does. Nothing to do where there is none."""
        query = delete(PartRow).where(PartRow.run == run)
        if part is not None:
            query = query.where(PartRow.number == part[0], PartRow.parts == part[1])
        with self._database.write() as session:
            session.execute(query)
