"""What `moepager serve` does before it listens. The process itself is tested in test_cli."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime

import numpy as np
import pytest

from engine.card import ModelCard
from service.server import listen, prepare_demo
from service.settings import Settings
from store.database import open_store
from store.errors import InvalidInput, MoepagerError
from store.records import GENERALIST, Evaluation, Profile, Selection, StoredSelection, TaskRecord

Runs = list[list[str]]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """The commands that would have been run; each ends well."""
    seen: Runs = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        seen.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return seen


@pytest.fixture
def settings(stock: Callable[[str], None], tmp_path_factory: pytest.TempPathFactory) -> Settings:
    url = f"sqlite:///{tmp_path_factory.mktemp('server') / 'store.db'}"
    stock(url)
    return Settings(store=url)


def test_a_store_that_lacks_the_demos_last_profile_is_prepared(runs: Runs, settings: Settings, card: ModelCard) -> None:
    prepare_demo(settings, card.hashes)
    assert runs == [[sys.executable, "-m", "demo", "prepare", "--store", settings.store]]


def test_a_store_that_is_prepared_is_left_alone(runs: Runs, settings: Settings, card: ModelCard) -> None:
    with open_store(settings.store) as store:
        store.tasks.put(TaskRecord(GENERALIST))
        made = datetime.now(UTC)
        arrays = {"count": np.ones((3, 8))}
        store.profiles.put(Profile("g", card.fingerprint, GENERALIST, arrays, 1, "h", frozenset(), {}, made))
        store.selections.put(StoredSelection("s", "g", "reap", "uniform", 1.0, Selection.whole(3, 8)))
        prepare_demo(settings, card.hashes)
        assert len(runs) == 1  # a profile without evidence is half a preparation
        store.evaluations.put(Evaluation("s", "h", 1, 1.0, 1.0, 0.1, 1.0))
    prepare_demo(settings, card.hashes)
    assert len(runs) == 1


def test_a_preparation_that_fails_stops_the_service(
    settings: Settings, card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 3))
    with pytest.raises(MoepagerError, match="exit code 3"):
        prepare_demo(settings, card.hashes)


def test_a_free_port_is_bound_and_a_taken_one_refused() -> None:
    with listen("127.0.0.1", 0) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        with pytest.raises(InvalidInput, match=f"Can't listen on 127.0.0.1, port {port}"):
            listen("127.0.0.1", port)


def test_a_host_that_nobody_knows_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"no-such-host\.invalid"):
        listen("no-such-host.invalid", 0)


def test_an_answer_does_not_wait_for_the_clients_acknowledgements() -> None:
    with (
        listen("127.0.0.1", 0) as bound,
        socket.create_connection(bound.getsockname()) as _,
        bound.accept()[0] as taken,
    ):
        assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_an_address_of_version_six_is_bound() -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    with listen("::1", 0) as bound:
        assert bound.family == socket.AF_INET6
