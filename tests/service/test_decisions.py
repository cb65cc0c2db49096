"""The audit of retrieval as operators read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from waiting import wait_for

from service.app import create_app
from service.keys import KeyRing, make_key
from service.parts import Parts, reread
from store.database import open_store
from store.records import Decision

OPERATOR, QUERIER = make_key("boss", "operator", None), make_key("app", "query", None)
EGG = {"query": "how long do I boil an egg", "max_tokens": 1}


@pytest.fixture
def own(parts: Parts, stock: Callable[[str], None], tmp_path: Path) -> Iterator[Parts]:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    stock(url)
    with open_store(url) as store:
        store.decisions.add(
            Decision("old", "q", None, None, None, 0.5, "no-tasks", "exact", datetime(2020, 1, 1, tzinfo=UTC))
        )
        yield replace(reread(replace(parts, store=store)), keys=KeyRing([OPERATOR[0], QUERIER[0]]))


@pytest.fixture
def client(own: Parts) -> Iterator[TestClient]:
    with TestClient(create_app(lambda: nullcontext(own))) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        yield client


def bearer(key: tuple[Any, str]) -> dict[str, str]:
    return {"authorization": f"Bearer {key[1]}"}


def test_an_operator_reads_who_asked_and_what_served(client: TestClient, own: Parts) -> None:
    wait_for(lambda: not own.store.decisions.list())  # the old one is forgotten
    assert client.post("/v1/query", json=EGG, headers=bearer(QUERIER)).status_code == 200
    assert client.post("/v1/query", json=EGG | {"keep": 0.01}, headers=bearer(QUERIER)).status_code == 400
    assert (
        client.post("/v1/retrieve", json={"query": "select rows from orders"}, headers=bearer(OPERATOR)).status_code
        == 200
    )
    page = client.get("/v1/decisions", headers=bearer(OPERATOR)).json()
    retrieved, refused, served = page["decisions"]
    assert (page["next"], page["days_kept"]) == (None, 30)
    assert {one["model"] for one in page["decisions"]} == {own.catalogue.model}
    assert (served["task"], served["key"], served["profile"]) == ("cooking", QUERIER[0].id, "p-cooking")
    assert 0 < served["keep"] <= 1
    assert served["active"] == 1.0
    assert (refused["task"], refused["profile"], refused["keep"], refused["active"]) == ("cooking", None, None, None)
    assert (retrieved["task"], retrieved["key"]) == ("sql", OPERATOR[0].id)
    assert "egg" not in str(page)


def test_pages_follow_each_other_and_are_narrowed(client: TestClient) -> None:
    for query in ("how long do I boil an egg", "select rows from orders", "boil rice how long"):
        client.post("/v1/retrieve", json={"query": query}, headers=bearer(QUERIER))

    def read(**words: Any) -> Any:
        return client.get("/v1/decisions", params=words, headers=bearer(OPERATOR)).json()

    first = read(limit=2, task="cooking", since=(datetime.now(UTC) - timedelta(days=1)).isoformat())
    assert [one["task"] for one in first["decisions"]] == ["cooking", "cooking"]
    assert first["next"] is None
    first = read(limit=2)
    second = read(limit=2, before=first["next"])
    assert [one["task"] for one in first["decisions"] + second["decisions"]][:3] == ["cooking", "sql", "cooking"]
    assert read(since=(datetime.now(UTC) + timedelta(days=1)).isoformat())["decisions"] == []


def test_the_audit_is_for_operators_and_a_time_needs_its_zone(client: TestClient) -> None:
    assert client.get("/v1/decisions", headers=bearer(QUERIER)).status_code == 403
    for since in ("2026-01-01T00:00:00", "0001-01-01T00:00:00+14:00", "yesterday"):
        answer = client.get("/v1/decisions", params={"since": since}, headers=bearer(OPERATOR))
        assert answer.status_code == 400, answer.text
