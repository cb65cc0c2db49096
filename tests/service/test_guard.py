"""Keys, roles, limits and headers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from inspect import iscoroutinefunction
from pathlib import Path

import openai
import pytest
from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from service.app import ROUTES, create_app
from service.guard import OPEN
from service.key_commands import app as commands
from service.keys import KeyRing, digest_of, make_key
from service.parts import Parts
from store.database import open_store
from store.errors import InvalidInput
from store.records import ApiKey

EGG = {"query": "how long do I boil an egg", "max_tokens": 2}


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[ApiKey, str]]:
    return {role: make_key(f"{role} key", role, None) for role in ("query", "operator")} | {
        "slow": make_key("slow", "query", 2)
    }


@pytest.fixture
def locked(parts: Parts, made: dict[str, tuple[ApiKey, str]]) -> FastAPI:
    ring = KeyRing([key for key, _ in made.values()])
    return create_app(lambda: nullcontext(replace(parts, keys=ring)))


@pytest.fixture
def guarded(locked: FastAPI) -> Iterator[TestClient]:
    with TestClient(locked) as client:
        while client.get("/readyz").status_code == 503:
            pass
        yield client


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def test_a_made_key_is_found_by_its_secret_and_only_its_hash_is_kept() -> None:
    key, secret = make_key("laptop", "query", 5)
    assert KeyRing([key]).find(secret) == key
    assert key.digest == digest_of(secret)
    assert secret not in repr(key)
    assert make_key("laptop", "query", 5)[1] != secret


@pytest.mark.parametrize(
    "change", [lambda s: s[:-1] + ("A" if s[-1] != "A" else "B"), lambda s: s + "x", lambda s: "", str.upper]
)
def test_a_key_that_is_a_little_different_is_nobodys(change: Callable[[str], str]) -> None:
    key, secret = make_key("laptop", "query", None)
    assert KeyRing([key]).find(change(secret)) is None


def test_one_keys_id_with_anothers_secret_is_nobodys() -> None:
    (a, secret_a), (b, secret_b) = make_key("a", "query", None), make_key("b", "query", None)
    mixed = secret_a[: len("mp-") + 12] + secret_b[len("mp-") + 12 :]
    assert KeyRing([a, b]).find(mixed) is None


@pytest.mark.parametrize(
    ("name", "role", "limit", "words"),
    [("x", "admin", None, "query or operator"), (" ", "query", None, "printable"), ("x", "query", 0, "at least 1")],
)
def test_a_key_that_makes_no_sense_is_refused(name: str, role: str, limit: int | None, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        make_key(name, role, limit)


def test_with_keys_no_route_but_the_probes_answers_without_one(guarded: TestClient, locked: FastAPI) -> None:
    seen = 0
    for path, operations in locked.openapi()["paths"].items():
        for method in operations:
            answer = guarded.request(method, path.replace("{", "").replace("}", ""))
            assert (answer.status_code == 200) == (path in OPEN), (method, path)
            assert answer.status_code in (200, 401), (method, path)
            seen += 1
    assert seen > 10
    for path in ("/openapi.json", "/redoc", "/metrics", "/no-such-route"):
        assert guarded.get(path).status_code == 401, path


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic abc", "Bearer mp-000000000000-" + "a" * 43, "mp-x"])
def test_a_wrong_key_is_refused_in_openais_shape(guarded: TestClient, header: str) -> None:
    answer = guarded.post("/v1/query", json=EGG, headers={"authorization": header, "x-request-id": "no-1"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (401, "invalid_api_key", "invalid_request_error")
    assert (answer.headers["www-authenticate"], answer.headers["x-request-id"]) == ("Bearer", "no-1")


def test_a_query_key_may_ask_but_not_operate(guarded: TestClient, made: dict[str, tuple[ApiKey, str]]) -> None:
    headers = bearer(made["query"][1])
    assert guarded.post("/v1/query", json=EGG, headers=headers).status_code == 200
    for method, path in (("DELETE", "/v1/residency"), ("POST", "/v1/tasks/reload")):
        answer = guarded.request(method, path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_permissions")
    assert guarded.delete("/v1/residency", headers=bearer(made["operator"][1])).status_code == 200


def test_every_route_that_changes_something_is_for_operators(
    guarded: TestClient, locked: FastAPI, made: dict[str, tuple[ApiKey, str]]
) -> None:
    """Tried with a key that may only query; the description says the same of each."""
    asking = {
        "/v1/query",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/retrieve",
        "/tokenize",
        "/detokenize",
        "/v1/embeddings",
    }
    refused = set()
    for path, operations in locked.openapi()["paths"].items():
        for method, operation in operations.items():
            if path.endswith("/events"):
                continue  # a stream, of a job
            answer = guarded.request(method, path, headers=bearer(made["query"][1]))
            if answer.status_code == 403:
                refused.add((method, path))
            assert (answer.status_code == 403) == operation.get("x-operators-only", False), (method, path)
            if method not in ("get", "head") and path not in asking:
                assert answer.status_code == 403, (method, path)
    assert {("delete", "/v1/residency"), ("post", "/v1/tasks"), ("post", "/v1/drain"), ("get", "/v1/jobs")} <= refused


def test_no_route_waits_for_a_thread_to_be_told_who_asks() -> None:
    """The framework runs dependencies that are plain functions in threads, which cost more than they compute."""
    calls = [call for route in api_routes() for call in calls_of(route.dependant)]
    assert {call.__name__ for call in calls if not iscoroutinefunction(call)} == set()


def api_routes() -> list[APIRoute]:
    """Those of the application; it keeps them inside the routers that it includes."""
    found = [route for module in ROUTES for route in module.router.routes if isinstance(route, APIRoute)]
    assert len(found) > 30
    return found


def calls_of(dependant: Dependant) -> list[Callable[..., object]]:
    """What a route depends on, directly and not."""
    calls = [one.call for one in dependant.dependencies if one.call is not None]
    return calls + [call for one in dependant.dependencies for call in calls_of(one)]


def test_a_key_that_asks_too_often_is_told_when_to_come_back(
    guarded: TestClient, made: dict[str, tuple[ApiKey, str]]
) -> None:
    headers = bearer(made["slow"][1])
    answers = [guarded.get("/v1/models", headers=headers) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    assert guarded.get("/v1/models", headers=bearer(made["query"][1])).status_code == 200


def test_while_it_loads_nothing_but_the_probes_answers(parts: Parts) -> None:
    go_on = threading.Event()

    @contextmanager
    def slow() -> Iterator[Parts]:
        go_on.wait(5)
        yield parts

    with TestClient(create_app(slow)) as client:
        assert client.get("/openapi.json").status_code == 503
        assert client.get("/healthz").status_code == 200
        go_on.set()


def test_every_answer_carries_the_headers_that_keep_browsers_careful(guarded: TestClient) -> None:
    for path in ("/healthz", "/v1/models", "/nothing"):
        headers = guarded.get(path).headers
        assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY")
        assert "default-src 'none'" in headers["content-security-policy"]


def test_the_openai_client_works_with_a_real_key(
    locked: FastAPI, made: dict[str, tuple[ApiKey, str]], live: Callable[[FastAPI], AbstractContextManager[str]]
) -> None:
    with live(locked) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=made["query"][1], max_retries=0)
        found = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": EGG["query"]}], max_tokens=2
        )
        assert found.choices[0].finish_reason in ("stop", "length")
        wrong = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        slow = openai.OpenAI(base_url=f"{url}/v1", api_key=made["slow"][1], max_retries=0)
        slow.models.list()
        slow.models.list()
        with pytest.raises(openai.RateLimitError):
            slow.models.list()
        with pytest.raises(openai.PermissionDeniedError):
            client.delete("/residency", cast_to=object)


def run(*words: str) -> Sequence[str]:
    done = CliRunner().invoke(commands, words)
    assert done.exit_code == 0, done.output
    return done.output.strip().splitlines()


def test_keys_are_created_listed_and_revoked(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'store.db'}"
    assert "No keys" in run("list", "--store", store)[0]
    made = json.loads(
        run("create", "laptop", "--role", "operator", "--per-minute", "9", "--store", store, "--json")[-1]
    )
    with open_store(store) as opened:
        [kept] = opened.keys.list()
        assert KeyRing([kept]).find(made["key"]) == kept
    assert (made["role"], made["per_minute"], kept.name) == ("operator", 9, "laptop")
    shown = run("list", "--store", store, "--json")
    assert made["key"] not in "".join(shown)
    assert kept.digest not in "".join(shown)
    assert json.loads(shown[-1])["keys"][0]["id"] == made["id"]
    assert "asks for no key" in run("revoke", made["id"], "--store", store)[0]
    with open_store(store) as opened:
        assert opened.keys.list() == []
