"""The life of a service: loading, ready, failed, closed; and the composition root on real parts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from waiting import wait_for

from engine.embedder import HashEmbedder
from service.app import create_app
from service.model import model_id
from service.parts import Parts, open_parts
from service.settings import Settings
from store.database import open_store
from store.errors import BudgetError, CheckpointError, CorruptStore, MismatchError, NotFound
from store.home import bundled_model
from store.records import Exemplar


def test_while_the_model_loads_the_service_lives_but_is_not_ready(
    parts: Parts, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = threading.Event()

    @contextmanager
    def slow() -> Iterator[Parts]:
        go_on.wait(5)
        yield parts

    with TestClient(create_app(slow)) as client:
        assert client.get("/healthz").status_code == 200
        for answer in (client.get("/readyz"), client.post("/v1/query", json={"query": "x"}), client.get("/v1/models")):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert "still loading" in answer.json()["error"]["message"]
        go_on.set()
        wait_for(lambda: client.get("/readyz").status_code == 200)
    assert not [line for line in caplog.messages if "refused" in line]  # a probe asks every few seconds


def test_parts_that_can_not_be_opened_stop_the_service_with_their_reason() -> None:
    stopped = threading.Event()

    @contextmanager
    def failing() -> Iterator[Parts]:
        raise BudgetError("Too small.")
        yield

    app = create_app(failing, on_failure=stopped.set)
    with TestClient(app) as client:
        assert stopped.wait(5)
        assert isinstance(app.state.opening.failure, BudgetError)
        assert client.get("/readyz").json()["error"]["message"] == "Too small."


def test_the_parts_are_closed_when_the_service_stops(parts: Parts) -> None:
    closed = threading.Event()

    @contextmanager
    def noted() -> Iterator[Parts]:
        yield parts
        closed.set()

    with TestClient(create_app(noted)) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        assert not closed.is_set()
    assert closed.is_set()


def test_opened_parts_close_without_a_thread_left(half_settings: Settings) -> None:
    before = {thread.name for thread in threading.enumerate()}
    with open_parts(half_settings) as opened:
        assert opened.model_id == "tiny"
        assert opened.catalogue.retrievable == ("cooking", "sql", "unproven")
        assert 0 < opened.retriever.threshold < 1
    wait_for(lambda: {thread.name for thread in threading.enumerate()} <= before | {"moepager-engine"})


def test_a_threshold_that_is_set_is_not_calibrated(half_settings: Settings) -> None:
    with open_parts(half_settings.model_copy(update={"threshold": 0.123})) as opened:
        assert opened.retriever.threshold == 0.123


def test_an_index_folder_is_filled_and_used_again(half_settings: Settings, tmp_path: Path) -> None:
    settings = half_settings.model_copy(update={"index": tmp_path / "index"})
    for _ in range(2):
        with open_parts(settings) as opened:
            assert opened.retriever.decide("how long do I boil an egg").task == "cooking"
        files = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "index").iterdir()}
        assert len(files) == 2
    again = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "index").iterdir()}
    assert again == files


@pytest.mark.parametrize(
    ("update", "error", "words"),
    [
        ({"model": "/no/such/model"}, CheckpointError, "/no/such/model"),
        ({"memory": 1000}, BudgetError, "Give --memory"),
        ({"unknown_task": "generalist"}, NotFound, "No task 'generalist'"),
    ],
)
def test_what_can_not_be_served_is_refused(
    half_settings: Settings, update: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words), open_parts(half_settings.model_copy(update=update)):
        pass


def test_a_corrupt_database_is_refused(half_settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "store.db").write_bytes(b"not a database" * 100)
    settings = half_settings.model_copy(update={"store": f"sqlite:///{tmp_path / 'store.db'}"})
    with pytest.raises(CorruptStore), open_parts(settings):
        pass


def test_exemplars_of_another_embedder_are_a_mismatch(
    half_settings: Settings, stock: Callable[[str], None], tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    stock(url)
    with open_store(url) as store:
        other = Exemplar("unproven", "a query", HashEmbedder(64).embed(["a query"])[0], HashEmbedder(64).id)
        store.exemplars.replace("unproven", [other])
    with (
        pytest.raises(MismatchError, match="'unproven' were embedded by hash-v1-64"),
        open_parts(half_settings.model_copy(update={"store": url})),
    ):
        pass


def test_an_unexpected_failure_is_a_500_that_tells_nothing(parts: Parts) -> None:
    class Broken:
        def decide(self, query: str) -> None:
            raise RuntimeError("secret path")

    app = create_app(lambda: nullcontext(replace(parts, retriever=Broken())))  # type: ignore[arg-type]
    with TestClient(app, raise_server_exceptions=False) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        answer = client.post("/v1/retrieve", json={"query": "x"}, headers={"x-request-id": "lost-1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] == "lost-1"


def test_a_model_is_called_by_its_folder_its_hub_id_or_demo(tmp_path: Path) -> None:
    assert model_id(str(tmp_path), tmp_path) == tmp_path.name
    assert model_id("owner/name", tmp_path / "snapshots" / "abc") == "owner/name"
    assert model_id(None, bundled_model()) == "demo"
