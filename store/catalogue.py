"""What is served and asked for: models, tasks and their exemplar queries. Rows in, records out."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

import numpy as np
from sqlalchemy import Select, delete, insert, select
from sqlalchemy.orm import Session

from store.changes import note_change
from store.connection import Database
from store.errors import CorruptStore, InvalidInput, NotFound
from store.packing import exemplar_digest, pack_vector, unpack_vector
from store.records import NO_TASK, Exemplar, ModelRecord, TaskRecord
from store.schema import ExemplarRow, ModelRow, PartRow, TaskRow
from store.writing import upsert

Query = TypeVar("Query", bound=Select[*tuple[Any, ...]])

LONGEST_NAME = 200
UNIT = 1e-3  # how far from 1 a unit vector's length may be


class Models:
    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, model: ModelRecord) -> None:
        """Adds the model, or renames the one with this fingerprint."""
        values = {field: getattr(model, field) for field in ModelRecord.__slots__}
        with self._database.write() as session:
            upsert(session, ModelRow, {**values, "created": datetime.now(UTC)}, update=("name", "family"))

    def get(self, fingerprint: str) -> ModelRecord:
        """Raises NotFound."""
        with self._database.read() as session:
            return _model(require_model(session, fingerprint))

    def list(self) -> Sequence[ModelRecord]:
        """In the order they were added."""
        with self._database.read() as session:
            rows = session.scalars(select(ModelRow).order_by(ModelRow.created, ModelRow.fingerprint))
            return [_model(row) for row in rows]


class Tasks:
    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, task: TaskRecord) -> None:
        """Adds the task, or gives the one of this name its new description."""
        check_name(task.name)
        values = {"name": task.name, "description": task.description, "created": datetime.now(UTC)}
        with self._database.write() as session:
            upsert(session, TaskRow, values, update=("description",))
            note_change(session)

    def get(self, name: str) -> TaskRecord:
        """Raises NotFound."""
        with self._database.read() as session:
            return _task(require_task(session, name))

    def list(self) -> Sequence[TaskRecord]:
        """By name."""
        with self._database.read() as session:
            return [_task(row) for row in session.scalars(select(TaskRow).order_by(TaskRow.name))]

    def delete(self, name: str) -> None:
        """With its exemplars, profiles and their parts, selections and evaluations; jobs and decisions stay.

        Raises NotFound.
        """
        with self._database.write() as session:
            require_task(session, name)
            session.execute(delete(PartRow).where(PartRow.task == name))
            session.execute(delete(TaskRow).where(TaskRow.name == name))
            note_change(session)


class Label(NamedTuple):
    """An exemplar without its vector: what a search shows, and what an index is checked by."""

    task: str
    text: str
    digest: str


class Exemplars:
    def __init__(self, database: Database) -> None:
        self._database = database

    def replace(self, task: str, exemplars: Sequence[Exemplar]) -> None:
        """Makes `exemplars` all that the task has from their embedders; an empty list takes all exemplars away.

        Exemplars of embedders that are not in the list stay. Raises NotFound for an unknown task.
        """
        rows = [_exemplar_values(task, position, exemplar) for position, exemplar in enumerate(exemplars)]
        old = delete(ExemplarRow).where(ExemplarRow.task == task)
        if rows:
            old = old.where(ExemplarRow.embedder.in_({exemplar.embedder for exemplar in exemplars}))
        with self._database.write() as session:
            require_task(session, task)
            session.execute(old)
            if rows:
                session.execute(insert(ExemplarRow), rows)
            note_change(session)

    def list(self, embedder: str | None = None, task: str | None = None) -> Sequence[Exemplar]:
        """By task, then in the order in which they were given."""
        with self._database.read() as session:
            return [_exemplar(row) for row in session.scalars(_ordered(select(ExemplarRow), embedder, task))]

    def check(self) -> None:
        """Raises CorruptStore for an exemplar that is not what was stored."""
        with self._database.read() as session:
            for row in session.scalars(select(ExemplarRow)):
                if exemplar_digest(_exemplar(row)) != row.digest:
                    raise CorruptStore(
                        f"Exemplar {row.text[:40]!r} of task {row.task!r} is damaged. Profile that task again."
                    )

    def labels(self, embedder: str) -> Sequence[Label]:
        """The same exemplars in the same order as `list(embedder)`, without reading their vectors."""
        columns = select(ExemplarRow.task, ExemplarRow.text, ExemplarRow.digest)
        with self._database.read() as session:
            return [
                Label(task, text, digest) for task, text, digest in session.execute(_ordered(columns, embedder, None))
            ]


def require_model(session: Session, fingerprint: str) -> ModelRow:
    if row := session.get(ModelRow, fingerprint):
        return row
    raise NotFound(f"No model {fingerprint[:16]} is in the store. Profile a task on it first: moepager profile.")


def require_task(session: Session, name: str) -> TaskRow:
    if row := session.get(TaskRow, name):
        return row
    known = session.scalars(select(TaskRow.name).order_by(TaskRow.name).limit(20)).all()
    raise NotFound(f"No task {name!r} is in the store. Known: {', '.join(known) or 'none'}. Add it: moepager profile.")


def check_name(name: str) -> None:
    if not 1 <= len(name) <= LONGEST_NAME or name != name.strip() or not name.isprintable():
        raise InvalidInput(
            f"A task's name is 1 to {LONGEST_NAME} printable characters without spaces around, got {name[:80]!r}.",
            param="task",
        )
    if name == NO_TASK:
        raise InvalidInput(
            f"The name {NO_TASK!r} is what headers and metrics say of queries of no task; choose another.", param="task"
        )
    if {".", ".."} & set(name.split("/")):  # clients fold them away: such a task could not be deleted by its URL
        raise InvalidInput(
            f"A task's name has no part '.' or '..' between slashes, for it stands in URLs; got {name!r}.", param="task"
        )


def _ordered(query: Query, embedder: str | None, task: str | None) -> Query:
    if embedder is not None:
        query = query.where(ExemplarRow.embedder == embedder)
    if task is not None:
        query = query.where(ExemplarRow.task == task)
    return query.order_by(ExemplarRow.task, ExemplarRow.embedder, ExemplarRow.position)


def _model(row: ModelRow) -> ModelRecord:
    return ModelRecord(**{field: getattr(row, field) for field in ModelRecord.__slots__})


def _task(row: TaskRow) -> TaskRecord:
    return TaskRecord(row.name, row.description)


def _exemplar(row: ExemplarRow) -> Exemplar:
    return Exemplar(row.task, row.text, unpack_vector(row.vector, f"{row.text[:40]!r}"), row.embedder)


def _exemplar_values(task: str, position: int, exemplar: Exemplar) -> dict[str, Any]:
    if exemplar.task != task:
        raise InvalidInput(f"An exemplar of {exemplar.task!r} can't be one of {task!r}. Replace each task's own.")
    _check_text(exemplar.text)
    _check_unit(exemplar)
    return {
        "task": task,
        "embedder": exemplar.embedder,
        "position": position,
        "text": exemplar.text,
        "vector": pack_vector(exemplar.vector),
        "digest": exemplar_digest(exemplar),
    }


def _check_text(text: str) -> None:
    """What either database would refuse is refused for both."""
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InvalidInput(f"An exemplar must be Unicode text without NUL or lone surrogates, got {text[:80]!r}.")


def _check_unit(exemplar: Exemplar) -> None:
    vector = exemplar.vector
    length = float(np.linalg.norm(vector)) if vector.ndim == 1 else float("nan")
    if not abs(length - 1) <= UNIT:
        raise InvalidInput(
            f"The vector of exemplar {exemplar.text[:40]!r} must be one row of length 1, got shape "
            f"{list(vector.shape)} and length {length:.4g}. Normalise what the embedder returns."
        )
