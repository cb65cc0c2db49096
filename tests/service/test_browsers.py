"""Web pages, and what they can't do to a service without keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest
from fastapi.testclient import TestClient
from starlette.datastructures import Headers
from waiting import wait_for

from service.app import create_app
from service.browsers import refuse_pages
from service.keys import KeyRing, make_key
from service.parts import Parts
from service.settings import Settings
from store.errors import Forbidden

HERE = "127.0.0.1:8000"


@pytest.fixture
def client(parts: Parts) -> Iterator[TestClient]:
    with TestClient(create_app(lambda: nullcontext(parts)), base_url=f"http://{HERE}") as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        yield client


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example", "content-type": "application/x-www-form-urlencoded"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:3000"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"host": "evil.example:8000"},
        {"host": "evil.example:8000", "origin": "http://evil.example:8000", "sec-fetch-site": "same-origin"},
    ],
)
def test_a_page_of_another_can_not_drain_the_service(client: TestClient, headers: dict[str, str]) -> None:
    answer = client.post("/v1/drain", headers=headers)
    assert answer.status_code == 403, answer.text
    assert "moepager keys create" in answer.json()["error"]["message"]
    assert client.get("/readyz").status_code == 200


def test_a_name_that_was_made_to_lead_here_reads_nothing(client: TestClient) -> None:
    assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403


@pytest.mark.parametrize(
    "headers", [{}, {"origin": f"http://{HERE}", "sec-fetch-site": "same-origin"}, {"host": "localhost:8000"}]
)
def test_programs_and_the_own_console_may_ask(client: TestClient, headers: dict[str, str]) -> None:
    assert client.post("/v1/retrieve", json={"query": "boil rice"}, headers=headers).status_code == 200


def test_with_keys_the_key_decides(parts: Parts) -> None:
    key, secret = make_key("app", "query", None)
    keyed = replace(parts, keys=KeyRing([key]))
    with TestClient(create_app(lambda: nullcontext(keyed)), base_url="http://models.example") as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        headers = {"authorization": f"Bearer {secret}", "origin": "http://chat.example"}
        assert client.post("/v1/retrieve", json={"query": "boil rice"}, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1:1", "[::1]:8000", "10.1.2.3", "me.example", "LAN.example:80", ""]
)
def test_its_own_names_are_let_through(host: str) -> None:
    settings = Settings(host="me.example", allowed_hosts="other.example, lan.example")
    refuse_pages("POST", Headers({"host": host}), settings)


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "[::1", "127.0.0.1.evil.example"])
def test_other_names_are_refused_unless_any_is_allowed(host: str) -> None:
    with pytest.raises(Forbidden):
        refuse_pages("GET", Headers({"host": host}), Settings())
    refuse_pages("GET", Headers({"host": host}), Settings(allowed_hosts="*"))
