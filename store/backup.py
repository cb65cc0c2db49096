"""A store into one file, and back: SQLite by its own backup interface, PostgreSQL by its own clients.

Both may run while a service uses the store. What is written appears under its name once it is whole, and what a restore
replaces is there until then.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import URL

from store.connection import Database, parse_url
from store.errors import Busy, Conflict, CorruptStore, InvalidInput, MoepagerError, NotFound, StoreUnreachable
from store.revision import VERSION_TABLE, current_revision

EMPTY = f"SELECT name FROM sqlite_master WHERE name = '{VERSION_TABLE}'"  # noqa: S608 - a constant of our own
# Also what a newer moepager added: a dump's own DROPs know the tables of its day alone, and the next migration would
# stumble over the rest. The database is moepager's, so nobody else's tables are in its schema.
DROP_ALL = """
    SET LOCAL lock_timeout = '10s';
    DO $$ DECLARE name text; BEGIN
        FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = current_schema() LOOP
            EXECUTE format('DROP TABLE IF EXISTS %I CASCADE', name);
        END LOOP;
    END $$;
"""


def back_up(url: str, file: Path) -> None:
    """Write the store into a new `file`, readable by its owner alone: a database of SQLite, or a dump of PostgreSQL.

    Raises Conflict where the file is there, NotFound where the store is not, CorruptStore for one that is damaged, and
    StoreUnreachable.
    """
    if file.exists():
        raise Conflict(f"{file} is there already, and no backup is overwritten. Name a new file.")
    parsed = parse_url(url)
    with _private(file) as part:
        if parsed.get_backend_name() == "sqlite":
            _copy(_there(parsed, "store"), part)
        else:
            _require_store(url)
            _run(["pg_dump", "--format=custom", "--no-owner", f"--file={part}", f"--dbname={_plain(parsed)}"], parsed)


def restore(url: str, file: Path, *, replace: bool = False) -> None:
    """Put the store of a backup in the place of what is at `url`. Stop the service before.

    Raises Conflict where a store is there and `replace` does not say that it may go, Busy where one is in use,
    CorruptStore for a file that is no backup, NotFound for none, and StoreUnreachable.
    """
    if not file.is_file():
        raise NotFound(f"There is no backup {file}. Check the name.")
    parsed = parse_url(url)
    if not replace and _has_store(url, parsed):
        raise Conflict(
            f"A store is at {parsed.render_as_string(hide_password=True)}. Add --replace if the backup shall take its "
            "place; back it up before."
        )
    if parsed.get_backend_name() == "sqlite":
        _restore_file(file, Path(str(parsed.database)))
    else:
        _restore_server(file, parsed)


# --- SQLite ----------------------------------------------------------------------------------------------------------


def _restore_file(file: Path, target: Path) -> None:
    with _private(target) as part:
        _copy(file, part)
        if target.exists():
            _close_log(target)
        for log in ("-wal", "-shm"):  # of a damaged store: they belong to no other
            Path(f"{target}{log}").unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    """All of it as it is at one moment, write-ahead log included; checked page by page."""
    try:
        with closing(_opened(source)) as old, closing(sqlite3.connect(target)) as new:
            if not old.execute(EMPTY).fetchall():
                raise CorruptStore(f"{source} holds no store of moepager's. Name a file that `moepager backup` wrote.")
            old.backup(new)
            new.execute("PRAGMA journal_mode = DELETE")  # one file, with nothing beside it
            said = [row[0] for row in new.execute("PRAGMA quick_check(3)")]
    except sqlite3.DatabaseError as error:
        raise CorruptStore(f"{source} is damaged or no database: {error}. Take an older backup.") from error
    if said != ["ok"]:
        raise CorruptStore(f"{source} is damaged: {'; '.join(said)}. Take an older backup.")


def _close_log(target: Path) -> None:
    """Refuse a store that somebody has open: SQLite leaves the write-ahead log only for its last user."""
    with closing(_opened(target)) as old:
        old.execute("PRAGMA busy_timeout = 0")
        try:
            old.execute("PRAGMA journal_mode = DELETE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
                raise Busy(f"{target} is in use. Stop the service and its workers, then restore.") from error
        except sqlite3.DatabaseError:  # damaged, which is why it is replaced
            pass


def _opened(file: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True)


def _there(url: URL, what: str) -> Path:
    file = Path(str(url.database))
    if not file.is_file():
        raise NotFound(f"There is no {what} at {file}. Check --store, MOEPAGER_STORE and MOEPAGER_HOME.")
    return file


@contextmanager
def _private(file: Path) -> Iterator[Path]:
    """A file beside `file`, of its owner alone, that takes its name at the end; gone where the block raises."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.absolute().parent)
    except OSError as error:
        raise InvalidInput(f"{file} can't be written: {error}. Name a file in a folder that is there.") from error
    os.close(descriptor)
    part = Path(name)
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


# --- PostgreSQL ------------------------------------------------------------------------------------------------------


def _restore_server(file: Path, url: URL) -> None:
    """In one transaction: a dump that breaks off leaves what was there."""
    with tempfile.TemporaryDirectory(prefix="moepager-restore-") as folder:
        script = Path(folder) / "script.sql"
        _run(["pg_restore", "--no-owner", f"--file={script}", str(file)], url, CorruptStore)
        words = ["psql", "--no-psqlrc", "--quiet", "--single-transaction", "--set=ON_ERROR_STOP=1"]
        _run([*words, f"--command={DROP_ALL}", f"--file={script}", f"--dbname={_plain(url)}"], url)


def _run(words: Sequence[str], url: URL, failure: type[MoepagerError] = StoreUnreachable) -> None:
    secret = {} if url.password is None else {"PGPASSWORD": str(url.password)}
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, **secret})  # noqa: S603
    except FileNotFoundError as error:
        raise NotFound(
            f"{words[0]} is not here. Install PostgreSQL's client programs, of the server's version or newer; the "
            "compose file's database is backed up by deploy/backup.sh."
        ) from error
    if done.returncode:
        raise failure(f"{words[0]} failed: {done.stderr.strip()}")


def _plain(url: URL) -> str:
    """As libpq reads it, and as other users of the machine may see it: without the password."""
    bare = URL.create("postgresql", url.username, None, url.host, url.port, url.database, url.query)
    return bare.render_as_string(hide_password=False)


def _require_store(url: str) -> None:
    if not _has_store(url, parse_url(url)):
        raise NotFound(f"{Database(url).name} holds no store of moepager's. Check --store.")


def _has_store(url: str, parsed: URL) -> bool:
    """Whether a store, or a file that takes its place, is there."""
    if parsed.get_backend_name() == "sqlite":
        return Path(str(parsed.database)).exists()
    with closing(Database(url)) as database, database.read() as session:
        return current_revision(session.connection()) is not None
