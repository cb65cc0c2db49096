"""From a URL to transactions: SQLite or PostgreSQL, their settings, and what their errors mean. Knows no tables."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
from sqlalchemy import URL, Connection, Engine, create_engine, event, insert, make_url, text
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionLeft
from sqlalchemy.orm import Session

from store.errors import Busy, Conflict, CorruptStore, InvalidInput, MoepagerError, StoreUnreachable
from store.patience import Breaker, PatientConnection, Silent
from store.plain_insert import PlainInsert

DRIVERS = {
    "sqlite": "sqlite+pysqlite",
    "postgresql": "postgresql+psycopg",
    "postgres": "postgresql+psycopg",
    "sqlite+pysqlite": "sqlite+pysqlite",
    "postgresql+psycopg": "postgresql+psycopg",
}
EXAMPLES = "sqlite:////srv/moepager/store.db or postgresql://user:password@host/database"
CONNECT_SECONDS = 5
LOCK_SECONDS = 30
WRITES = "moepager_writes"

# The low byte of SQLite's result codes, https://sqlite.org/rescode.html
SQLITE_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
SQLITE_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR})


class Database:
    """Transactions on one database, from any thread. Errors of the database come out as errors that tell the fix."""

    def __init__(self, url: str) -> None:
        """Connects to nothing yet. Raises InvalidInput for a URL that no driver serves."""
        self._url = parse_url(url)
        self._breaker = Breaker()
        self._engine = _sqlite_engine(self._url) if self.dialect == "sqlite" else _postgres_engine(self._url)
        self._inserts: dict[tuple[type[Any], tuple[str, ...]], PlainInsert] = {}

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._url.get_backend_name()

    @property
    def name(self) -> str:
        """The URL as it may be shown: without the password."""
        return self._url.render_as_string(hide_password=True)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that only reads."""
        with self._translated(), Session(self._engine) as session:
            yield session

    @contextmanager
    def write(self, patience: float | None = None) -> Iterator[Session]:
        """A transaction: all of the block is kept, or none of it where the block raises or the process dies.

        `patience`: seconds that one statement may take on PostgreSQL; without it, those of store.patience.
        """
        with self._translated(), Session(self._engine) as session, session.begin():
            connection = session.connection(execution_options={WRITES: True})
            with _patient(connection.connection.driver_connection, patience):
                yield session

    def insert(self, row: type[Any], values: dict[str, Any]) -> None:
        """One row, in a transaction of its own, past the session: each query has to wait for one."""
        with self._translated():
            if self.dialect == "sqlite":
                self._plain(row, tuple(values)).add(values)
                return
            with self._engine.connect() as connection, connection.begin():
                connection.execute(insert(row), [values])

    def _plain(self, row: type[Any], columns: tuple[str, ...]) -> PlainInsert:
        known = self._inserts.get((row, columns))
        if known is None:  # made twice where two ask at once, which harms nothing
            known = self._inserts[row, columns] = PlainInsert(row, columns, self._engine)
        return known

    def check(self) -> None:
        """Has SQLite look at its every page; PostgreSQL checks pages as it reads them. Raises CorruptStore."""
        if self.dialect == "sqlite":
            with self.read() as session:
                said = session.execute(text("PRAGMA quick_check(3)")).scalars().all()
            if said != ["ok"]:
                raise _damaged(self.name, "; ".join(map(str, said)))

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            with self._breaker.passing() as began:
                try:
                    yield
                except DBAPIError as error:
                    if isinstance(error.orig, Silent | psycopg.errors.ConnectionTimeout):
                        self._breaker.trip(str(_meaning(error, self.name)), began)
                    raise
        except DBAPIError as error:
            meaning = _meaning(error, self.name)
            if meaning is None:
                raise
            raise meaning from error
        except NoConnectionLeft as error:
            raise _unreachable(self.name, "all of its connections are in use, and none came free") from error
        except UnicodeEncodeError as error:
            raise InvalidInput(
                f"Text to be stored must be valid Unicode: {error.reason}. Remove the lone surrogate."
            ) from error


def parse_url(url: str) -> URL:
    """A URL with the driver that is installed. Raises InvalidInput, never showing a password."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise InvalidInput(f"The store's URL can't be read. Write it like {EXAMPLES}.", param="store") from error
    if parsed.drivername not in DRIVERS:
        raise InvalidInput(
            f"A store is kept in SQLite or PostgreSQL, not in {parsed.drivername!r}. Write its URL like {EXAMPLES}.",
            param="store",
        )
    parsed = parsed.set(drivername=DRIVERS[parsed.drivername])
    if parsed.get_backend_name() == "sqlite" and parsed.database in {None, "", ":memory:"}:
        raise InvalidInput(
            "A store must outlive its process, so SQLite needs a file: sqlite:///store.db.", param="store"
        )
    return parsed


def _sqlite_engine(url: URL) -> Engine:
    engine = create_engine(url, connect_args={"timeout": LOCK_SECONDS})

    @event.listens_for(engine, "do_connect")
    def make_private(_dialect: Any, _record: Any, _words: Any, _options: Any) -> None:
        # SQLite would let everybody read a new file, with its texts; the files of its log have the rights of this one.
        with suppress(OSError):  # it is there already; or can't be, which SQLite says better
            os.close(os.open(str(url.database), os.O_CREAT | os.O_EXCL, 0o600))

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver would begin transactions late; `begin` below does it
        connection.execute("PRAGMA foreign_keys = ON")
        _log_writes(connection)
        # A killed process loses nothing; a power cut may lose the newest transactions, never the file. Each commit
        # would otherwise wait for the disk, and every query has one.
        connection.execute("PRAGMA synchronous = NORMAL")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # SQLite fails a transaction at once that reads, then writes behind another writer. So writers queue first.
        writes = connection.get_execution_options().get(WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _log_writes(connection: sqlite3.Connection) -> None:
    """Readers and the one writer do not wait for each other. Of several that turn a fresh file into that at once SQLite
    refuses all but one, and does not let them wait as for any other lock."""
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in SQLITE_BUSY or time.monotonic() >= until:
                raise
            time.sleep(0.005)
        else:
            return


def _postgres_engine(url: URL) -> Engine:
    engine = create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": CONNECT_SECONDS})

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _record: Any, words: Any, options: Any) -> PatientConnection:
        return PatientConnection.connect(*words, **options)

    return engine


@contextmanager
def _patient(connection: Any, seconds: float | None) -> Iterator[None]:
    if seconds is None or not isinstance(connection, PatientConnection):
        yield
        return
    before, connection.patience = connection.patience, seconds
    try:
        yield
    finally:
        connection.patience = before


def _meaning(error: DBAPIError, name: str) -> MoepagerError | None:
    """What a driver's error means to a person; None for one that must be our own bug."""
    said = " ".join(str(error.orig).split()).rstrip(".?")  # drivers speak in several lines
    if isinstance(error, IntegrityError):
        return Conflict(
            f"The store refused a row that contradicts others: {said}. Another run changed them: try again."
        )
    if isinstance(error, DataError):
        return InvalidInput(f"The store can't hold this value: {said}. Remove characters such as NUL from the text.")
    if isinstance(error.orig, sqlite3.Error):
        return _sqlite_meaning(error.orig, name, said)
    if isinstance(
        error.orig, psycopg.errors.DataCorrupted | psycopg.errors.IndexCorrupted | psycopg.errors.UndefinedTable
    ):
        return _damaged(name, said)
    lost = error.connection_invalidated or isinstance(error, OperationalError)
    if lost or isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
        return _unreachable(name, said)
    return None


def _sqlite_meaning(error: sqlite3.Error, name: str, said: str) -> MoepagerError | None:
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        return None
    if code & 0xFF in SQLITE_BUSY:
        return Busy(
            f"Another process has been writing {name} for over {LOCK_SECONDS} s. Let it finish, then try again."
        )
    return _damaged(name, said) if code & 0xFF in SQLITE_DAMAGED else _unreachable(name, said)


def _damaged(name: str, said: str) -> CorruptStore:
    return CorruptStore(
        f"The store {name} is damaged or no database of moepager's: {said}. "
        "Restore it from a backup, or move it away and profile again."
    )


def _unreachable(name: str, said: str) -> StoreUnreachable:
    server = "Check that the server runs, and the URL's host, user, password and database."
    file = "Check that the file's folder exists, that both are writable, and that the disk is not full."
    return StoreUnreachable(f"Can't use the store {name}: {said}. {file if name.startswith('sqlite') else server}")
