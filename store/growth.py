"""A profile that grows has a new id. What was made of it, selections and their evidence, goes on to the new one."""

from __future__ import annotations

from typing import Any

from sqlalchemy import inspect, select
from sqlalchemy.orm import Session

from store.schema import EvaluationRow, JobRow, PriceRow, Row, SelectionRow
from store.writing import insert_once


def inherit(session: Session, old: str, new: str) -> None:
    """Copies selections, evaluations, prices and the reasons of searches of profile `old` to `new`; the old ones stay.

    Only for profiles of one text whose shared statistics are equal: else the new one would not choose those experts.
    A selection's id begins with its profile's, and so does that of a job that tells why one was chosen.
    """
    for job in session.scalars(select(JobRow).where(JobRow.id.startswith(f"{old}-", autoescape=True))).all():
        insert_once(session, JobRow, _values(job) | {"id": new + job.id.removeprefix(old)})
    names: dict[str, str] = {}
    for row in session.scalars(select(SelectionRow).where(SelectionRow.profile == old)).all():
        name = new + row.id.removeprefix(old)
        if insert_once(session, SelectionRow, _values(row) | {"id": name, "profile": new}):
            names[row.id] = name
    for kind in (EvaluationRow, PriceRow):  # in the order they were made: the last one says which text is the newest
        made = session.scalars(select(kind).where(kind.selection.in_(names)).order_by(kind.id)).all()
        for values in (_values(one, but="id") for one in made):
            session.add(kind(**values | {"selection": names[values["selection"]]}))
        session.flush()


def _values(row: Row, but: str = "") -> dict[str, Any]:
    return {column.key: getattr(row, column.key) for column in inspect(type(row)).column_attrs if column.key != but}
