"""What happened: profiling jobs and retrieval decisions. Rows in, records out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Any, cast, get_args

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from store.connection import Database
from store.errors import Conflict, InvalidInput, NotFound
from store.records import Decision, Job, JobState, JobTally
from store.schema import DecisionRow, JobRow
from store.writing import insert_once, now

PORTION = 1000  # rows of one transaction that deletes
GIVEN_UP = (
    "Its runner died {} times over this job, most likely killed for want of memory. Lower MOEPAGER_JOB_MEMORY or "
    "MOEPAGER_MAX_BATCH, or give the machine more, and start it again."
)


class Jobs:
    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, job: Job) -> None:
        """Adds the job. Raises Conflict where the id is taken: a job is changed by `update`."""
        with self._database.write() as session:
            insert_job(session, job)

    def get(self, id: str) -> Job:  # noqa: A002
        """Raises NotFound."""
        with self._database.read() as session:
            return _job(_require_job(session, id))

    def list(self, states: Collection[JobState] | None = None) -> Sequence[Job]:
        """Those in one of `states`, or all; the youngest first."""
        query = select(JobRow).order_by(JobRow.created.desc(), JobRow.id)
        if states is not None:
            query = query.where(JobRow.state.in_(states))
        with self._database.read() as session:
            rows = session.scalars(query)
            return [_job(row) for row in rows]

    def tally(self, model: str) -> JobTally:
        """How many jobs the model has in each state, and since when the oldest of those that have not ended waits."""
        query = select(JobRow.state, func.count(), func.min(JobRow.created)).where(JobRow.model == model)
        with self._database.read() as session:
            found = {state: (count, oldest) for state, count, oldest in session.execute(query.group_by(JobRow.state))}
            at = now(session)
        waiting = [oldest for state, (_, oldest) in found.items() if state in ("queued", "running")]
        counts = {state: found.get(state, (0, at))[0] for state in get_args(JobState)}
        return JobTally(counts, max(0.0, (at - min(waiting, default=at)).total_seconds()))

    def update(
        self,
        id: str,  # noqa: A002
        *,
        state: JobState | None = None,
        progress: float | None = None,
        detail: str | None = None,
    ) -> Job:
        """Changes what is given, notes the time, and returns the job as it is now. Raises NotFound."""
        if progress is not None:
            _check_progress(progress)
        changes: dict[str, Any] = {"state": state, "progress": progress, "detail": detail}
        with self._database.write() as session:
            row = _require_job(session, id)
            for name, value in changes.items():
                if value is not None:
                    setattr(row, name, value)
            row.updated = now(session)
            return _job(row)

    def claim(self, id: str) -> Job | None:  # noqa: A002
        """The queued job as a running one, with the number of this attempt; None where somebody else has it."""
        query = update(JobRow).where(JobRow.id == id, JobRow.state == "queued").returning(JobRow)
        with self._database.write() as session:
            values = {"state": "running", "detail": "starting", "attempt": JobRow.attempt + 1, "updated": now(session)}
            row = session.scalars(query.values(**values)).one_or_none()
            return None if row is None else _job(row)

    def change(
        self,
        id: str,  # noqa: A002
        expected: Collection[JobState],
        *,
        attempt: int | None = None,
        state: JobState | None = None,
        progress: float | None = None,
        detail: str | None = None,
    ) -> bool:
        """As `update`, but only while the job is in one of the `expected` states and, for its runner, still at this
        `attempt`; says whether it was. Of two that want the same change one gets True."""
        if progress is not None:
            _check_progress(progress)
        values: dict[str, Any] = {"state": state, "progress": progress, "detail": detail}
        kept = {name: value for name, value in values.items() if value is not None}
        query = update(JobRow).where(JobRow.id == id, JobRow.state.in_(expected))
        if attempt is not None:
            query = query.where(JobRow.attempt == attempt)
        with self._database.write() as session:
            query = query.values(**kept, updated=now(session))
            return bool(session.execute(query.returning(JobRow.id)).all())

    def revive(self, model: str, stale: timedelta, most: int) -> None:
        """Queues the model's running jobs again of which nobody has noted anything for longer than `stale`: their
        runner is dead. The `most`-th death of a job's runner fails it. All by the database's clock."""
        lost = [JobRow.model == model, JobRow.state == "running"]
        with self._database.read() as session:
            since = now(session) - stale
            if session.scalars(select(JobRow.id).where(*lost, JobRow.updated < since)).first() is None:
                return  # a look each second must not write
        with self._database.write() as session:
            at = now(session)
            query = select(JobRow).where(*lost, JobRow.updated < at - stale).with_for_update()
            for row in session.scalars(query):
                row.deaths, row.updated = row.deaths + 1, at
                row.state = "failed" if row.deaths >= most else "queued"
                row.detail = GIVEN_UP.format(row.deaths) if row.deaths >= most else "taken up again: its runner died"


class Decisions:
    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, decision: Decision) -> None:
        values = {field: getattr(decision, field) for field in Decision.__slots__ if field != "id"}
        self._database.insert(DecisionRow, values)

    def list(
        self, limit: int = 100, *, task: str | None = None, since: datetime | None = None, before: int | None = None
    ) -> Sequence[Decision]:
        """The `limit` youngest, the youngest first: of one task, `since` a time, `before` the one with this id."""
        if limit < 1:
            raise InvalidInput(f"A limit is at least 1, got {limit}.", param="limit")
        query = select(DecisionRow).order_by(DecisionRow.id.desc()).limit(limit)
        if task is not None:
            query = query.where(DecisionRow.task == task)
        if since is not None:
            query = query.where(DecisionRow.created >= since)
        if before is not None:
            query = query.where(DecisionRow.id < before)
        with self._database.read() as session:
            return [_decision(row) for row in session.scalars(query)]

    def forget(self, before: datetime) -> int:
        """Deletes those that are older, in portions, between which queries write theirs; how many there were."""
        old = select(DecisionRow.id).where(DecisionRow.created < before).limit(PORTION)
        count = 0
        while True:
            with self._database.write() as session:
                gone = session.scalars(
                    delete(DecisionRow).where(DecisionRow.id.in_(old)).returning(DecisionRow.id)
                ).all()
            count += len(gone)
            if len(gone) < PORTION:
                return count


def insert_job(session: Session, job: Job) -> None:
    _check_progress(job.progress)
    values = {field: getattr(job, field) for field in Job.__slots__} | {"options": dict(job.options)}
    if not insert_once(session, JobRow, values):
        raise Conflict(f"Job {job.id} is in the store already. Give the new job an id of its own.")


def _require_job(session: Session, id: str) -> JobRow:  # noqa: A002
    if row := session.get(JobRow, id):
        return row
    raise NotFound(f"No job {id} is in the store. Jobs are listed at GET /v1/jobs.")


def _check_progress(progress: float) -> None:
    if not 0 <= progress <= 1:
        raise InvalidInput(f"Progress is between 0 and 1, got {progress}.", param="progress")


def _job(row: JobRow) -> Job:
    state = cast("JobState", row.state)  # a check constraint holds it to these words
    facts = row.id, row.model, row.task, state, row.progress, row.detail, row.created, row.updated
    return Job(*facts, row.options or {}, row.attempt, row.deaths)


def _decision(row: DecisionRow) -> Decision:
    return Decision(**{field: getattr(row, field) for field in Decision.__slots__})
