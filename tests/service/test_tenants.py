"""Keys that are limited to some tasks: for them there are no others, wherever they look and whatever they name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from engine.embedder import HashEmbedder
from service.app import create_app
from service.key_commands import app as commands
from service.keys import KeyRing, make_key
from service.parts import Parts, reread
from service.retrieval import calibrate_threshold
from service.serving import Policy, Wish, choose_serving
from store.database import open_store
from store.errors import InvalidInput, NotFound
from store.records import ApiKey, Exemplar, TaskRecord

COOK = {"query": "how long do I boil an egg", "max_tokens": 2}
TABLE = {"query": "select all rows from the users table", "max_tokens": 2}
STRANGE = {"query": "who won the cup final yesterday", "max_tokens": 2}


@pytest.fixture(scope="module")
def keys() -> dict[str, tuple[ApiKey, str]]:
    return {
        "cook": make_key("cook", "query", None, ["cooking"]),
        "both": make_key("both", "query", None, ["sql", "cooking", "unproven"]),
        "all": make_key("all", "query", None),
    }


@pytest.fixture(scope="module")
def clients(parts: Parts, keys: dict[str, tuple[ApiKey, str]]) -> Iterator[dict[str, TestClient]]:
    """One service, a client for each key."""
    app = create_app(lambda: nullcontext(replace(parts, keys=KeyRing([key for key, _ in keys.values()]))))
    with TestClient(app) as first:
        while first.get("/readyz").status_code == 503:
            pass
        yield {
            name: TestClient(app, headers={"authorization": f"Bearer {secret}"}) for name, (_, secret) in keys.items()
        }


@pytest.fixture(scope="module")
def small(parts: Parts, stock: Callable[[str], None], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A service without keys, whose store has never heard of any task but cooking."""
    url = f"sqlite:///{tmp_path_factory.mktemp('small') / 'store.db'}"
    stock(url)
    settings = parts.settings.model_copy(update={"store": url})
    with ExitStack() as stack:
        store = stack.enter_context(open_store(url))
        for task in ("sql", "unproven", "stranger"):
            store.tasks.delete(task)
        own = reread(replace(parts, settings=settings, store=store))
        client = stack.enter_context(TestClient(create_app(lambda: nullcontext(own))))
        while client.get("/readyz").status_code == 503:
            pass
        yield client


def plain(value: Any) -> Any:
    """Without what differs between two looks at one service: times, speeds, counts of changes."""
    moving = ("created", "changes", "load_seconds", "disk_bytes_per_second", "ttft_ms", "queue_ms", "swap_ms",
              "experts_paged", "bytes_paged", "predicted_bytes", "predicted_swap_ms", "resident_bytes")  # fmt: skip
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items() if name not in moving}
    return [plain(each) for each in value] if isinstance(value, list) else value


CALLS = [
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/tiny:cooking", None),
    ("GET", "/v1/models/tiny:sql", None),
    ("GET", "/v1/models/tiny:stranger", None),
    ("GET", "/v1/tasks", None),
    ("GET", "/v1/plan", None),
    ("GET", "/v1/plan?task=sql", None),
    ("GET", "/v1/plan?task=cooking", None),
    ("GET", "/v1/residency/selections", None),
    ("POST", "/v1/embeddings", {"input": "select"}),
    ("POST", "/v1/query", {**COOK, "task": "sql"}),
    ("POST", "/v1/query", {**COOK, "task": "stranger"}),
    ("POST", "/v1/query", {**COOK, "task": "unproven"}),
    ("POST", "/v1/query", COOK),
    ("POST", "/v1/query", STRANGE),
    ("POST", "/v1/query", {**STRANGE, "mode": "mask"}),
    ("POST", "/v1/query", {**TABLE, "mode": "exact"}),
    ("POST", "/v1/completions", {"model": "tiny:sql", "prompt": "x"}),
    ("POST", "/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "x"}],
                                      "expert": {"task": "sql"}}),
    *[("POST", "/v1/retrieve", {"query": text}) for text in (
        "boil potatoes", "select rows", "select and boil", "names of users", "a", "how do I select potatoes")],
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body"), CALLS)
def test_a_limited_key_gets_what_a_service_without_the_other_tasks_answers(
    clients: dict[str, TestClient], small: TestClient, method: str, path: str, body: Any
) -> None:
    limited, alone = (
        client.request(method, path, json=body, headers={"x-request-id": "same"}) for client in (clients["cook"], small)
    )
    assert (limited.status_code, plain(limited.json())) == (alone.status_code, plain(alone.json()))
    shown = limited.text + json.dumps(dict(limited.headers))
    assert "sql" not in shown or "sql" in path or "sql" in json.dumps(body)


def test_another_tenants_task_is_told_apart_from_none_by_its_name_alone(clients: dict[str, TestClient]) -> None:
    theirs, nobodys = (clients["cook"].post("/v1/query", json={**COOK, "task": name}) for name in ("sql", "zzz"))
    assert theirs.status_code == nobodys.status_code == 404
    assert theirs.json()["error"]["message"].replace("sql", "zzz") == nobodys.json()["error"]["message"]
    assert clients["both"].post("/v1/query", json={**COOK, "task": "sql"}).json()["task"] == "sql"


def test_a_query_of_anothers_task_belongs_to_none(clients: dict[str, TestClient]) -> None:
    found = {name: client.post("/v1/query", json=TABLE).json() for name, client in clients.items()}
    assert (found["all"]["task"], found["both"]["task"]) == ("sql", "sql")
    assert (found["cook"]["task"], found["cook"]["receipt"]["mode"]) == (None, "exact")
    assert found["cook"]["receipt"]["similarity"] < found["both"]["receipt"]["similarity"]


def test_a_threshold_that_was_set_holds_for_every_key(parts: Parts) -> None:
    settings = parts.settings.model_copy(update={"threshold": 0.123})
    key, _ = make_key("cook", "query", None, ["cooking"])
    assert replace(parts, settings=settings).seen_by(key).retriever.threshold == 0.123
    embedder = HashEmbedder()
    cooking = [e for e in parts.store.exemplars.list(embedder=embedder.id) if e.task == "cooking"]
    assert parts.seen_by(key).retriever.threshold == pytest.approx(calibrate_threshold(cooking).threshold)


def test_a_key_without_a_limit_and_no_key_see_everything(parts: Parts, keys: dict[str, tuple[ApiKey, str]]) -> None:
    assert parts.seen_by(None) is parts
    assert parts.seen_by(keys["all"][0]) is parts
    assert parts.seen_by(keys["cook"][0]) is parts.seen_by(keys["cook"][0])
    later = replace(parts)
    assert later.seen_by(keys["cook"][0]) is not parts.seen_by(keys["cook"][0])


def test_what_counts_all_tasks_is_not_for_a_limited_key(clients: dict[str, TestClient]) -> None:
    assert clients["all"].get("/metrics").status_code == 200
    for method, path in [
        ("GET", "/metrics"), ("GET", "/v1/proposals"), ("GET", "/v1/unmatched"), ("GET", "/v1/events"),
        ("GET", "/v1/jobs"), ("POST", "/v1/tasks/reload"), ("DELETE", "/v1/tasks/cooking"),
    ]:  # fmt: skip
        answer = clients["cook"].request(method, path)
        assert answer.status_code == 403, path
        assert "sql" not in answer.text


def test_the_residency_of_a_limited_key_is_that_of_its_own_experts(
    clients: dict[str, TestClient], parts: Parts
) -> None:
    for body in (COOK, {**TABLE, "keep": 0.25}):
        clients["all"].post("/v1/query", json=body)
    path = "/v1/residency?experts=true"
    whole, own = clients["all"].get(path).json(), clients["cook"].get(path).json()
    [kept] = clients["cook"].get("/v1/residency/selections").json()["tasks"].values()
    for layer, row in enumerate(own["table"]):
        for expert, slot in enumerate(row):
            assert slot == (whole["table"][layer][expert] if expert in kept["experts"][layer] else -1)
    there = sum(slot >= 0 for row in own["table"] for slot in row)
    assert (own["resident"], sum(own["per_layer"])) == (there, there)
    assert 0 < there < whole["resident"]
    assert own["slots"] == whole["slots"] == parts.engine.plan.slots
    assert own["bytes_read"] is None
    assert own.keys() == whole.keys()


def test_the_session_tells_a_key_its_tasks(clients: dict[str, TestClient]) -> None:
    assert clients["both"].get("/v1/session").json()["key"]["tasks"] == ["cooking", "sql", "unproven"]
    assert clients["all"].get("/v1/session").json()["key"]["tasks"] is None


def test_a_conversation_never_goes_on_with_a_task_that_is_no_longer_the_keys(parts: Parts) -> None:
    before, secret = make_key("k", "query", None)
    after = replace(before, tasks=("cooking",))
    talk = {**TABLE, "session": "s"}
    headers = {"authorization": f"Bearer {secret}"}
    tasks = []
    for key in (before, after):
        own = replace(parts, keys=KeyRing([key]))
        with TestClient(create_app(lambda own=own: nullcontext(own)), headers=headers) as client:  # type: ignore[misc]
            while client.get("/readyz").status_code == 503:
                pass
            tasks.append(client.post("/v1/query", json=talk).json()["task"])
    assert tasks == ["sql", None]


@pytest.mark.parametrize("unknown", ["exact", "generalist", "refuse"])
def test_the_generalist_is_a_task_like_others(parts: Parts, unknown: Any) -> None:
    """It is made of all tasks: who was not given it is served exactly, or refused where the policy is another."""
    policy = replace(Policy.of(parts.settings, parts.engine.plan), unknown_task=unknown)
    everything = replace(
        parts.catalogue,
        tasks={**parts.catalogue.tasks, "generalist": replace(parts.catalogue.tasks["sql"], name="generalist")},
    )
    found = parts.retriever.only(["cooking"]).decide(STRANGE["query"])
    given = choose_serving(Wish(mode="mask"), found, everything.only(["cooking", "generalist"]), policy)
    assert given.served_task == "generalist"
    without = everything.only(["cooking"])
    if unknown == "exact":
        assert choose_serving(Wish(), found, without, policy).mode == "exact"
    else:
        with pytest.raises(InvalidInput, match="No task is near enough"):
            choose_serving(Wish(), found, without, policy)
    with pytest.raises(NotFound, match="No task 'generalist'"):
        without.named("generalist")
    assert choose_serving(Wish(mode="exact"), found, without, policy).mode == "exact"


def test_a_task_of_anothers_that_is_profiled_for_another_model_is_not_betrayed(parts: Parts) -> None:
    with pytest.raises(NotFound, match="No task 'stranger'"):
        parts.catalogue.only(["cooking"]).named("stranger")


def test_keys_are_limited_by_the_command(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    with open_store(url) as store:
        store.tasks.put(TaskRecord("sql"))
        store.tasks.put(TaskRecord("code"))
        vector = HashEmbedder().embed(["x"])[0]
        store.exemplars.replace("sql", [Exemplar("sql", "x", vector, "hash")])

    def run(*words: str) -> Any:
        return CliRunner().invoke(commands, [*words, "--store", url])

    made = run("create", "tenant", "--task", "sql", "--task", "code", "--task", "sql", "--json")
    assert made.exit_code == 0
    assert json.loads(made.output.splitlines()[-1])["tasks"] == ["code", "sql"]
    assert "only code, sql" in run("list").output
    assert "all tasks" in run("create", "me").output
    with open_store(url) as store:
        assert [key.tasks for key in store.keys.list()] == [("code", "sql"), None]
    wrong = run("create", "tenant", "--task", "sqll")
    assert isinstance(wrong.exception, NotFound)
    assert "It has: code, sql" in str(wrong.exception)
    with pytest.raises(InvalidInput, match="An operator runs the whole service"):
        make_key("ops", "operator", None, ["sql"])
