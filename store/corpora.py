"""The text of tasks that are profiled over REST. Rows in, records out; the profiler knows what an item is."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from store.catalogue import check_name, require_task
from store.connection import Database
from store.errors import Conflict, NotFound
from store.journal import insert_job
from store.records import Job, MadeBy, StoredCorpus, TaskRecord
from store.schema import CorpusRow, RequestRow, TaskRow
from store.unmatched import forget
from store.writing import insert_once


class Corpora:
    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        task: TaskRecord,
        corpus: StoredCorpus,
        created: datetime,
        job: Job | None = None,
        unmatched: Collection[str] = (),
        request: MadeBy | None = None,
    ) -> None:
        """Adds a new task with its text and the `job` that profiles it, and forgets the queries that it was made of,
        and notes the `request`: all of this or nothing. Raises Conflict where there is a task of this name, or the job,
        or the request's key.
        """
        check_name(task.name)
        assert corpus.task == task.name, "a corpus is stored with its own task"
        row = {"name": task.name, "description": task.description, "created": created}
        text = {field: getattr(corpus, field) for field in StoredCorpus.__slots__}
        with self._database.write() as session:
            if request is not None:
                _note(session, request, created)
            if not insert_once(session, TaskRow, row):
                raise Conflict(f"Task {task.name!r} is in the store already. Delete it first, or choose another name.")
            session.add(CorpusRow(**{name: list(v) if isinstance(v, tuple) else v for name, v in text.items()}))
            if job is not None:
                insert_job(session, job)
            if unmatched:
                forget(session, unmatched)

    def made_by(self, key: str) -> MadeBy | None:
        """The request that made a task under this key, if one did; the task may be gone since."""
        with self._database.read() as session:
            row = session.get(RequestRow, key)
            return None if row is None else MadeBy(row.key, row.body)

    def tasks(self) -> frozenset[str]:
        """Names of the tasks that have text."""
        with self._database.read() as session:
            return frozenset(session.scalars(select(CorpusRow.task)))

    def get(self, task: str) -> StoredCorpus:
        """Raises NotFound for a task that is not there, or has no text: it was profiled from a file."""
        with self._database.read() as session:
            require_task(session, task)
            row = session.get(CorpusRow, task)
            if row is None:
                raise NotFound(
                    f"Task {task!r} has no text in the store: it was profiled from a file. Run `moepager profile` "
                    "again, or create a task with its text by POST /v1/tasks."
                )
            return StoredCorpus(row.task, tuple(row.exemplars), tuple(row.calibration), tuple(row.evaluation))


def _note(session: Session, request: MadeBy, created: datetime) -> None:
    if not insert_once(session, RequestRow, {"key": request.key, "body": request.body, "created": created}):
        raise Conflict("This Idempotency-Key was used before. Send a key of its own with every new request.")
