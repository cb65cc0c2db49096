"""Tasks that change in the store while the service runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from waiting import wait_for

from engine.embedder import HashEmbedder
from service.app import create_app
from service.keys import KeyRing, make_key
from service.parts import Parts, reread
from service.serving import Catalogue
from store.database import Store, open_store
from store.errors import Busy, StoreUnreachable
from store.fingerprint import Fingerprint
from store.records import UNJUDGED, ApiKey, Evaluation, Exemplar, Profile, Selection, StoredSelection, TaskRecord

GARDEN = ["when do I plant tomatoes outside", "when do I plant beans outside"]


@pytest.fixture
def own(parts: Parts, stock: Callable[[str], None], tmp_path: Path) -> Iterator[Parts]:
    """The parts over a store of the test's own, looked at often."""
    url = f"sqlite:///{tmp_path / 'store.db'}"
    stock(url)
    settings = parts.settings.model_copy(update={"store": url, "reload_seconds": 0.02})
    with open_store(url) as store:
        yield reread(replace(parts, settings=settings, store=store))


@pytest.fixture
def running(own: Parts) -> Iterator[TestClient]:
    with TestClient(create_app(lambda: nullcontext(own))) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        yield client


def put_garden(store: Store, parts: Parts, *, evidence: bool = True, name: str = "p-garden", age: int = 0) -> None:
    card, embedder = parts.engine.card, HashEmbedder()
    made = datetime.now(UTC) - timedelta(hours=age)
    store.tasks.put(TaskRecord("garden", "plants"))
    store.profiles.put(Profile(name, card.fingerprint, "garden", {}, 10, "hash", frozenset(), {"reap": "1"}, made))
    selection = StoredSelection(f"s-{name}", name, "reap", "uniform", 0.5, Selection.of([[0, 1, 2, 3]] * card.layers))
    store.selections.put(selection)
    if evidence:
        store.evaluations.put(Evaluation(f"s-{name}", "h", 5, 0.9, 1.0, 1.0, 0.9))
    store.exemplars.replace(
        "garden", [Exemplar("garden", text, embedder.embed([text])[0], embedder.id) for text in GARDEN]
    )


def tasks_of(client: TestClient) -> list[str]:
    return [one["task"] for one in client.get("/v1/tasks").json()["tasks"]]


def test_a_profile_that_is_stored_while_serving_serves(running: TestClient, own: Parts) -> None:
    query = {"query": "when do I plant carrots outside", "max_tokens": 2}
    assert running.post("/v1/query", json=query).json()["task"] is None
    put_garden(own.store, own)
    wait_for(lambda: "garden" in tasks_of(running))
    receipt = running.post("/v1/query", json=query).json()["receipt"]
    assert (receipt["task"], receipt["profile_id"], receipt["mode"]) == ("garden", "p-garden", "mask")
    assert receipt["doubts"] == [UNJUDGED]
    own.store.tasks.delete("garden")
    wait_for(lambda: "garden" not in tasks_of(running))
    assert running.post("/v1/query", json=query).json()["task"] is None


def test_reload_answers_with_the_tasks_as_they_are_now(running: TestClient, own: Parts) -> None:
    put_garden(own.store, own)
    answer = running.post("/v1/tasks/reload")
    assert answer.status_code == 200
    assert "garden" in [one["task"] for one in answer.json()["tasks"]]


def test_doubts_about_a_new_profile_are_logged_once(own: Parts, caplog: pytest.LogCaptureFixture) -> None:
    put_garden(own.store, own)
    reread(reread(own))
    assert [record.getMessage() for record in caplog.records if "doubt" in record.getMessage()] == [
        f"The profile of task garden is served with a doubt: {UNJUDGED}"
    ]


def test_a_request_keeps_the_parts_it_began_with(own: Parts) -> None:
    before = own.catalogue, own.retriever
    put_garden(own.store, own)
    after = reread(own)
    assert "garden" not in own.catalogue.tasks
    assert (own.catalogue, own.retriever) == before
    assert "garden" in after.catalogue.tasks
    assert after.changes == own.store.changes.count() > own.changes
    assert (after.engine, after.worker) == (own.engine, own.worker)


def test_what_can_not_be_read_is_told_and_the_old_goes_on(running: TestClient, own: Parts) -> None:
    put_garden(own.store, own)
    stranger = HashEmbedder(64)
    text = GARDEN[0]
    own.store.exemplars.replace("garden", [])
    own.store.exemplars.replace("garden", [Exemplar("garden", text, stranger.embed([text])[0], stranger.id)])
    answer = running.post("/v1/tasks/reload")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "mismatch")
    ask = running.post("/v1/query", json={"query": "how long do I boil an egg", "max_tokens": 2})
    assert ask.json()["task"] == "cooking"


def test_a_profile_whose_evidence_is_still_made_does_not_displace_one_that_has_it(own: Parts) -> None:
    put_garden(own.store, own, name="old", age=1)
    put_garden(own.store, own, name="new", evidence=False)
    model = own.engine.card.hashes
    assert Catalogue.read(own.store, model).named("garden").profile_id == "old"
    own.store.evaluations.put(Evaluation("s-new", "h", 5, 0.9, 1.0, 1.0, 0.9))
    assert Catalogue.read(own.store, model).named("garden").profile_id == "new"


def test_nothing_is_read_again_while_nothing_changes(own: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    whole = Catalogue.read.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        Catalogue, "read", classmethod(lambda cls, store, model: read.append(model) or whole(cls, store, model))
    )
    app: FastAPI = create_app(lambda: nullcontext(own))
    with TestClient(app) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        time.sleep(0.2)
        assert read == []
        own.store.tasks.put(TaskRecord("garden"))
        wait_for(lambda: len(read) == 1)
        time.sleep(0.2)
        assert len(read) == 1


def revocable(own: Parts) -> tuple[Parts, dict[str, str], ApiKey]:
    """With an operator's key, and one that the test will revoke."""
    stays, (goes, secret) = make_key("stays", "operator", None)[0], make_key("goes", "query", None)
    for key in (stays, goes):
        own.store.keys.put(key)
    keyed = reread(replace(own, keys=KeyRing([stays, goes])))
    return keyed, {"authorization": f"Bearer {secret}"}, goes


@pytest.mark.parametrize("error", [StoreUnreachable("away"), Busy("locked"), RuntimeError("a bug")])
def test_a_key_revoked_while_the_store_fails_is_out_once_it_is_read_again(
    own: Parts, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    own, header, gone = revocable(own)
    whole, failed = own.store.keys.list, []

    def failing() -> object:
        if len(failed) < 3:
            failed.append(error)
            raise error
        return whole()

    with TestClient(create_app(lambda: nullcontext(own))) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        assert client.get("/v1/models", headers=header).status_code == 200
        monkeypatch.setattr(own.store.keys, "list", failing)
        own.store.keys.delete(gone.id)
        wait_for(lambda: client.get("/v1/models", headers=header).status_code == 401)
        wait_for(lambda: client.get("/readyz").status_code == 200)
    assert len(failed) == 3


def test_a_store_that_was_away_in_the_middle_of_a_reading_is_read_again(
    running: TestClient, own: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, away = Catalogue.read.__func__, [True]  # type: ignore[attr-defined]

    def read(cls: type[Catalogue], store: Store, model: Fingerprint) -> Catalogue:
        if away:
            raise StoreUnreachable("away")
        found: Catalogue = whole(cls, store, model)
        return found

    monkeypatch.setattr(Catalogue, "read", classmethod(read))
    put_garden(own.store, own)
    wait_for(lambda: running.get("/readyz").status_code == 503)
    time.sleep(0.1)
    away.clear()
    wait_for(lambda: "garden" in tasks_of(running))


def test_a_service_that_looks_no_more_is_not_ready(own: Parts) -> None:
    app = create_app(lambda: nullcontext(own))
    with TestClient(app) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        assert client.portal is not None
        client.portal.call(app.state.watch.cancel)
        wait_for(lambda: client.get("/readyz").status_code == 503)
        assert "no longer looks at its store" in client.get("/readyz").json()["error"]["message"]
