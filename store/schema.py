"""The tables, as SQLAlchemy rows. Owns columns and constraints; knows neither sessions nor records.

Shapes of this file change only together with a migration: `tests/store/test_upgrade.py` compares the two.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# Constraints with names, so that a migration can say which one it changes.
NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


ACTIVE = text("state IN ('queued', 'running')")  # of a job: it has not ended


class UtcDateTime(TypeDecorator[datetime]):
    """Timezone-aware in and out, kept in UTC; SQLite, which has no zones, keeps the naive UTC time."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        assert value.tzinfo is not None, f"a stored time needs a zone, got {value!r}"
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        assert isinstance(value, datetime)
        return value.replace(tzinfo=UTC) if dialect.name == "sqlite" else value.astimezone(UTC)


class Row(DeclarativeBase):
    """Text has no length: SQLite would ignore one and PostgreSQL refuse, and the two must behave alike."""

    metadata = MetaData(naming_convention=NAMES)
    type_annotation_map = {str: Text, int: Integer, float: Double, bytes: LargeBinary, datetime: UtcDateTime}  # noqa: RUF012


class ModelRow(Row):
    __tablename__ = "models"

    fingerprint: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    family: Mapped[str]
    layers: Mapped[int]
    experts: Mapped[int]
    top_k: Mapped[int]
    config_hash: Mapped[str]
    weights_hash: Mapped[str]
    tokenizer_hash: Mapped[str]
    created: Mapped[datetime]


class TaskRow(Row):
    __tablename__ = "tasks"

    name: Mapped[str] = mapped_column(primary_key=True)
    description: Mapped[str]
    created: Mapped[datetime]


class ExemplarRow(Row):
    """`vector` is float32, little-endian. `digest` covers all that a search shows: an index is checked by it."""

    __tablename__ = "exemplars"
    __table_args__ = (UniqueConstraint("task", "embedder", "position"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    task: Mapped[str] = mapped_column(ForeignKey("tasks.name", ondelete="CASCADE"))
    embedder: Mapped[str] = mapped_column(index=True)
    position: Mapped[int]
    text: Mapped[str]
    vector: Mapped[bytes]
    digest: Mapped[str]


class ProfileRow(Row):
    """`statistics` is one blob of `store.packing`; `calibration_items` a sorted list of content hashes."""

    __tablename__ = "profiles"

    id: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(ForeignKey("models.fingerprint"), index=True)
    task: Mapped[str] = mapped_column(ForeignKey("tasks.name", ondelete="CASCADE"), index=True)
    tokens: Mapped[int] = mapped_column(BigInteger)
    calibration_hash: Mapped[str]
    calibration_items: Mapped[list[str]] = mapped_column(JSON)
    scorers: Mapped[dict[str, str]] = mapped_column(JSON)
    statistics: Mapped[bytes]
    created: Mapped[datetime]


class PartRow(Row):
    """What one part of a task's text has summed up, until all parts of its run are there. Model and task are told,
    not looked up: neither has to be in the store before its first profile is."""

    __tablename__ = "profile_parts"
    __table_args__ = (CheckConstraint("number >= 1 AND number <= parts", name="number_is_of_the_parts"),)

    run: Mapped[str] = mapped_column(primary_key=True)
    parts: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    model: Mapped[str]
    task: Mapped[str] = mapped_column(index=True)
    statistics: Mapped[bytes]
    created: Mapped[datetime]


class TrustRow(Row):
    """How far a profile is to be trusted, as it was judged when it was made; `doubts` is a list of sentences."""

    __tablename__ = "trust"
    __table_args__ = (
        CheckConstraint("unseen >= 0 AND unseen <= 1", name="unseen_is_a_share"),
        CheckConstraint("agreement >= 0 AND agreement <= 1", name="agreement_is_a_share"),
    )

    profile: Mapped[str] = mapped_column(ForeignKey("profiles.id", ondelete="CASCADE"), primary_key=True)
    tokens_per_expert: Mapped[float]
    unseen: Mapped[float]
    skew: Mapped[float]
    least_skew: Mapped[float]
    agreement: Mapped[float | None]
    surprise: Mapped[float | None]
    doubts: Mapped[list[str]] = mapped_column(JSON)


class SelectionRow(Row):
    """`bitmap` has one row of `width` bits for each of `layers` layers, rows padded to whole bytes; `stand_in` is a
    kind of store.stand_ins, whose vectors are in the profile's statistics. `calls` lists how many experts a token calls
    in each layer, None: as many as the model does; `active` is the share that was asked for, `calls_by` the rule.
    """

    __tablename__ = "selections"
    __table_args__ = (
        CheckConstraint("keep > 0 AND keep <= 1", name="keep_is_a_share"),
        CheckConstraint("active > 0 AND active <= 1", name="active_is_a_share"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    profile: Mapped[str] = mapped_column(ForeignKey("profiles.id", ondelete="CASCADE"), index=True)
    scorer: Mapped[str]
    allocator: Mapped[str]
    keep: Mapped[float]
    layers: Mapped[int]
    width: Mapped[int]
    bitmap: Mapped[bytes]
    stand_in: Mapped[str] = mapped_column(server_default="nothing")
    calls: Mapped[list[int] | None] = mapped_column(JSON(none_as_null=True))
    active: Mapped[float] = mapped_column(server_default="1")
    calls_by: Mapped[str] = mapped_column(server_default="all")


class EvaluationRow(Row):
    __tablename__ = "evaluations"
    __table_args__ = (UniqueConstraint("selection", "evaluation_hash"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    selection: Mapped[str] = mapped_column(ForeignKey("selections.id", ondelete="CASCADE"))
    evaluation_hash: Mapped[str]
    items: Mapped[int]
    accuracy: Mapped[float | None]
    full_accuracy: Mapped[float | None]
    nll: Mapped[float]
    coverage: Mapped[float]
    levels: Mapped[list[float] | None] = mapped_column(JSON(none_as_null=True))  # None: made before the guard


class PriceRow(Row):
    """`text` says whose items: the profile's own task's or others'. `draws` is a list of [accuracy or null, nll]."""

    __tablename__ = "prices"
    __table_args__ = (
        UniqueConstraint("selection", "text", "evaluation_hash"),
        CheckConstraint("text IN ('own', 'others')", name="text_is_known"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    selection: Mapped[str] = mapped_column(ForeignKey("selections.id", ondelete="CASCADE"))
    text: Mapped[str]
    evaluation_hash: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    items: Mapped[int]
    accuracy: Mapped[float | None]
    full_accuracy: Mapped[float | None]
    low: Mapped[float | None]
    high: Mapped[float | None]
    nll: Mapped[float]
    draws: Mapped[list[list[float | None]]] = mapped_column(JSON)


class JobRow(Row):
    """Jobs name their model and task, but outlive them: they tell what was run. A task of a model has one at a time
    that has not ended. `attempt` counts the runners that took it, `deaths` those of them that died over it."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint("state IN ('queued', 'running', 'done', 'failed', 'cancelled')", name="state_is_known"),
        CheckConstraint("progress >= 0 AND progress <= 1", name="progress_is_a_share"),
        Index("ix_jobs_active", "model", "task", unique=True, sqlite_where=ACTIVE, postgresql_where=ACTIVE),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str]
    task: Mapped[str]
    state: Mapped[str]
    progress: Mapped[float]
    detail: Mapped[str]
    created: Mapped[datetime] = mapped_column(index=True)
    updated: Mapped[datetime]
    options: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))  # None: made before there were any
    attempt: Mapped[int] = mapped_column(server_default="0")
    deaths: Mapped[int] = mapped_column(server_default="0")


class ChangesRow(Row):
    """One row, counting the writes that change what a service serves: it asks for this number, not for everything."""

    __tablename__ = "changes"

    id: Mapped[int] = mapped_column(primary_key=True)
    count: Mapped[int] = mapped_column(BigInteger)


class KeyRow(Row):
    """`digest` is the sha256 of the key, which is never stored; `per_minute` is empty where nothing limits it, `tasks`
    where it may use all."""

    __tablename__ = "keys"
    __table_args__ = (CheckConstraint("role IN ('query', 'operator')", name="role_is_known"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    role: Mapped[str]
    digest: Mapped[str]
    per_minute: Mapped[int | None]
    created: Mapped[datetime]
    tasks: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))


class CorpusRow(Row):
    """The text that a task is profiled from, as it was sent: `calibration` and `evaluation` are lists of items."""

    __tablename__ = "corpora"

    task: Mapped[str] = mapped_column(ForeignKey("tasks.name", ondelete="CASCADE"), primary_key=True)
    exemplars: Mapped[list[str]] = mapped_column(JSON)
    calibration: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    evaluation: Mapped[list[dict[str, Any]]] = mapped_column(JSON)


class RequestRow(Row):
    """A request that made a task, and may be sent again under its key: sha256 of the key and of the body."""

    __tablename__ = "requests"

    key: Mapped[str] = mapped_column(primary_key=True)
    body: Mapped[str]
    created: Mapped[datetime]


class UnmatchedRow(Row):
    """Queries that were near no task, where the operator keeps them. `digest` is the text's sha256."""

    __tablename__ = "unmatched"

    digest: Mapped[str] = mapped_column(primary_key=True)
    text: Mapped[str]
    count: Mapped[int]
    similarity: Mapped[float | None]
    updated: Mapped[datetime] = mapped_column(index=True)


class EventRow(Row):
    """What an operator should look at. Names are copied: deleting a task leaves the past as it was."""

    __tablename__ = "events"
    __table_args__ = (CheckConstraint("kind IN ('drift')", name="kind_is_known"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    model: Mapped[str]
    task: Mapped[str]
    value: Mapped[float]
    bound: Mapped[float]
    detail: Mapped[str]
    created: Mapped[datetime] = mapped_column(index=True)


class DecisionRow(Row):
    """An audit log: names are copied, so that deleting a task leaves the past as it was."""

    __tablename__ = "decisions"

    id: Mapped[int] = mapped_column(primary_key=True)
    request: Mapped[str]
    query_hash: Mapped[str]
    task: Mapped[str | None]
    nearest: Mapped[str | None]
    similarity: Mapped[float | None]
    threshold: Mapped[float]
    reason: Mapped[str]
    mode: Mapped[str]
    created: Mapped[datetime] = mapped_column(index=True)
    key: Mapped[str | None]
    model: Mapped[str | None]
    profile: Mapped[str | None]
    keep: Mapped[float | None]
    active: Mapped[float | None]
