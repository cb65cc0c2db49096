"""The store as one object: opens the database, brings it up to date, and gives a repository for each noun."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from store.catalogue import Exemplars, Models, Tasks
from store.changes import Changes
from store.connection import Database, parse_url
from store.corpora import Corpora
from store.errors import NotFound
from store.events import Events
from store.home import data_path, default_store_url, store_url
from store.journal import Decisions, Jobs
from store.keys import Keys
from store.parts import ProfileParts
from store.prices import Prices
from store.profiles import Evaluations, Profiles, Selections
from store.revision import bring_up_to_date, require_current
from store.unmatched import UnmatchedQueries


class Store:
    """All repositories over one database. Safe to share between threads; every call is its own transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.models = Models(database)
        self.tasks = Tasks(database)
        self.exemplars = Exemplars(database)
        self.profiles = Profiles(database)
        self.selections = Selections(database)
        self.evaluations = Evaluations(database)
        self.parts = ProfileParts(database)
        self.prices = Prices(database)
        self.jobs = Jobs(database)
        self.decisions = Decisions(database)
        self.changes = Changes(database)
        self.keys = Keys(database)
        self.corpora = Corpora(database)
        self.unmatched = UnmatchedQueries(database)
        self.events = Events(database)

    @property
    def name(self) -> str:
        """The database's URL without its password."""
        return self._database.name

    def check(self) -> None:
        """Reads everything and compares it with its hashes and formats. Raises CorruptStore, MismatchError."""
        self._database.check()
        self.exemplars.check()
        for profile in self.profiles.list():  # reading one unpacks and checks its statistics
            self.evaluations.list(profile.id)
            self.selections.find(profile.id)
            self.prices.list(profile.id)
        for run in self.parts.runs():
            for number, of in self.parts.list(run):
                self.parts.get(run, number, of)

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_store(url: str | None = None) -> Store:
    """The store at `url`, made or migrated if need be; the embedded default store without one.

    Raises InvalidInput for a URL of no known kind, StoreUnreachable, CorruptStore, and MismatchError for a store that
    a newer moepager wrote.
    """
    database = Database(url or default_store_url())
    try:
        bring_up_to_date(database)
    except BaseException:
        database.close()
        raise
    return Store(database)


def open_as_it_is(url: str | None = None) -> Store:
    """The same, but nothing is made or migrated.

    Raises NotFound where there is no store yet or one to be migrated, MismatchError where a newer moepager wrote it.
    """
    url = url or store_url(data_path())
    database = Database(url)
    try:
        if database.dialect == "sqlite" and not Path(str(parse_url(url).database)).exists():
            raise NotFound(f"There is no store at {database.name} yet: the first start or profile makes it.")
        require_current(database)
    except BaseException:
        database.close()
        raise
    return Store(database)
