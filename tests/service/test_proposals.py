"""Queries that were near no task are kept where that is wanted, grouped, and become a task by one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from waiting import wait_for

import service.proposals
from engine.embedder import HashEmbedder
from engine.requests import FinishedEvent, Sampling
from service.answer import Question, prepare
from service.app import create_app
from service.callers import ANYBODY
from service.discovery import Discovery
from service.drift import DELAY, WARM_UP
from service.parts import Parts, reread
from service.proposals import LEAST, Proposer, cohesion_of, grouped, joined, level_of, named
from service.redaction import redact
from service.serving import Serving, Wish, choose_serving
from service.settings import Settings, load_settings
from store.database import Store, open_store
from store.errors import InvalidInput
from store.records import F64, Exemplar, UnmatchedQuery

PLANTS = ("beans", "kale", "leeks", "peas", "corn", "mint", "dill", "sage", "thyme")
TOWNS = ("Ulm", "Bonn", "Kiel", "Trier", "Jena", "Mainz", "Essen", "Halle")
GARDEN = [f"when do I plant {plant} in the garden" for plant in PLANTS]
TRAINS = [f"which train goes to {town} tonight" for town in TOWNS]
STRAY = ["tell me a joke about lawyers", "what is the meaning of life", "sing"]


@pytest.fixture
def store(stock: Callable[[str], None], tmp_path: Path) -> Iterator[Store]:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    stock(url)
    with open_store(url) as opened:
        yield opened


@pytest.fixture
def own(parts: Parts, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parts]:
    monkeypatch.setenv("MOEPAGER_HOME", str(tmp_path))
    update = {"store": store.name, "keep_unmatched": 30, "reload_seconds": 0.05, "job_memory": 2**30, "threshold": 0.5}
    settings = parts.settings.model_copy(update={**update, "store": f"sqlite:///{tmp_path / 'store.db'}"})
    embedder, model = parts.retriever.embedder, parts.catalogue.model
    with Discovery(store, settings, embedder, parts.metrics, model) as discovery:
        yield reread(replace(parts, settings=settings, store=store, discovery=discovery))


@pytest.fixture
def client(own: Parts) -> Iterator[TestClient]:
    with TestClient(create_app(lambda: nullcontext(own))) as opened:
        wait_for(lambda: opened.get("/readyz").status_code == 200)
        yield opened


def ask(client: TestClient, texts: list[str]) -> None:
    for text in texts:
        assert client.post("/v1/query", json={"query": text, "max_tokens": 1}).status_code == 200


def kept(texts: list[str]) -> list[UnmatchedQuery]:
    return [UnmatchedQuery(f"d{n}-{text}", text, 1, None, datetime.now(UTC)) for n, text in enumerate(texts)]


def exemplars(task: str, texts: list[str]) -> list[Exemplar]:
    return [Exemplar(task, text, HashEmbedder().embed([text])[0], "hash") for text in texts]


def test_groups_are_found_named_and_strays_left_alone() -> None:
    known = exemplars("cooking", ["boil an egg", "boil potatoes", "boil rice"])
    known += exemplars("sql", ["select rows from users", "select rows from orders"])
    found = Proposer(HashEmbedder()).propose(kept([*GARDEN, *STRAY, *TRAINS]), known)
    assert [{query.text for query in one.queries} for one in found] == [set(GARDEN), set(TRAINS)]
    assert set(found[0].name.split("-")) <= {"plant", "garden"}
    assert set(found[1].name.split("-")) <= {"train", "goes", "tonight"}
    assert len({one.id for one in found}) == 2


def test_few_queries_are_no_task() -> None:
    assert Proposer(HashEmbedder()).propose(kept(GARDEN[: LEAST - 1]), []) == []


def test_a_proposal_keeps_its_id_while_traffic_adds_to_it() -> None:
    """Else it would be gone, under traffic, before an operator has read it."""
    once, more = (Proposer(HashEmbedder()).propose(kept(texts), []) for texts in (GARDEN[:8], GARDEN))
    assert (len(once[0].queries), len(more[0].queries)) == (8, len(GARDEN))
    assert once[0].id == more[0].id
    without_the_first = Proposer(HashEmbedder()).propose(kept(GARDEN)[1:], [])
    assert without_the_first[0].id != more[0].id


def brute_level(tasks: list[F64]) -> float:
    inside = [np.mean([a @ b for i, a in enumerate(t) for j, b in enumerate(t) if i != j]) for t in tasks]
    across = [np.mean([a @ b for a in t for b in u]) for n, t in enumerate(tasks) for u in tasks[:n]]
    return float(np.quantile(inside, 0.1) + np.quantile(across, 0.9)) / 2


def test_the_level_is_half_way_between_pairs_inside_and_across_tasks() -> None:
    rng = np.random.default_rng(5)
    tasks = []
    for size in (4, 7, 5):
        rows = rng.normal(size=16) + 0.5 * rng.normal(size=(size, 16))
        tasks.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    stored = [Exemplar(f"t{n}", "x", row.astype(np.float32), "e") for n, rows in enumerate(tasks) for row in rows]
    assert level_of(stored) == pytest.approx(brute_level(tasks), abs=1e-6)
    assert cohesion_of(tasks[0]) == pytest.approx(
        brute_level([tasks[0], tasks[0]]) * 2 - np.mean(tasks[0] @ tasks[0].T)
    )
    assert level_of(stored[:4]) == 0.5  # one task tells nothing


def test_groups_are_those_of_average_linkage() -> None:
    rng = np.random.default_rng(2)
    centres = np.eye(3, 12)
    rows = np.concatenate([centre + 0.1 * rng.normal(size=(LEAST + n, 12)) for n, centre in enumerate(centres)])
    vectors = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    order = rng.permutation(len(vectors))
    groups = grouped(vectors[order], level=0.5)
    found = {frozenset(order[group].tolist()) for group in groups}
    starts = np.cumsum([0, LEAST, LEAST + 1, LEAST + 2])
    assert found == {frozenset(range(a, b)) for a, b in pairwise(starts)}


def test_beyond_those_that_are_clustered_queries_join_the_groups_that_they_are_like(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(8)
    rows = np.eye(3, 12)[np.arange(90) % 3] + 0.05 * rng.normal(size=(90, 12))
    rows[80:] = np.eye(12)[11]  # like nothing before
    vectors = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    monkeypatch.setattr(service.proposals, "MOST_CLUSTERED", 40)
    monkeypatch.setattr(service.proposals, "PORTION", 7)
    found = {frozenset(group.tolist()) for group in joined(grouped(vectors[:40], 0.5), vectors, 0.5)}
    assert found == {frozenset(range(first, 80, 3)) for first in range(3)}


def test_a_key_is_for_one_acceptance(client: TestClient) -> None:
    ask(client, GARDEN)
    [proposal] = client.get("/v1/proposals").json()["proposals"]
    path, headers = f"/v1/proposals/{proposal['id']}/accept", {"idempotency-key": "k"}
    first = client.post(path, json={"name": "garden"}, headers=headers)
    assert first.status_code == 202
    again = client.post(path, json={"name": "garden"}, headers=headers)
    assert (again.status_code, again.json()["job"]["id"]) == (202, first.json()["job"]["id"])
    for other, body in ((path, {"name": "yard"}), (path.replace(proposal["id"], "0" * 16), {"name": "garden"})):
        assert client.post(other, json=body, headers=headers).status_code == 409
    assert client.get("/v1/unmatched").json()["queries"] == []


def test_names_are_never_taken_twice_and_exist_without_words() -> None:
    assert named([["12 34", "56"], ["1"]], [], {"new-task"}) == ["new-task-2", "new-task-3"]
    texts = [["plant beans garden"], ["plant beans garden"]]
    first, second = named(texts, [], set())
    assert first != second


def test_addresses_and_long_numbers_are_not_kept() -> None:
    text = "Mail jo.doe+x@mail.example.org or call +49 171 234 5678 about order 12345678, table 42."
    assert redact(text) == "Mail [redacted] or call [redacted] about order [redacted], table 42."
    assert redact("secret word", r"secret") == "[redacted] word"
    with pytest.raises(InvalidInput, match="regular expression"):
        load_settings(redact="(")


def test_nothing_is_kept_unless_the_operator_chose_to(parts: Parts, store: Store) -> None:
    assert Settings().keep_unmatched == 0
    embedder, model = parts.retriever.embedder, parts.catalogue.model
    with Discovery(store, parts.settings, embedder, parts.metrics, model) as discovery:
        discovery.asked("something new", parts.retriever.decide("something new"))
    assert store.unmatched.list() == []


def test_queries_of_no_task_are_kept_redacted_and_those_of_a_task_are_not(client: TestClient, store: Store) -> None:
    ask(client, ["how long do I boil an egg", "write to a.b@c.de", "write to x.y@c.de"])
    [query] = client.get("/v1/unmatched").json()["queries"]
    assert (query["text"], query["count"]) == ("write to [redacted]", 2)
    assert client.delete("/v1/unmatched/unknown").status_code == 404
    assert client.delete(f"/v1/unmatched/{query['digest']}").json() == {"forgotten": 1}
    ask(client, STRAY)
    assert client.delete("/v1/unmatched").json() == {"forgotten": 3}
    assert client.get("/v1/proposals").json() == {"kept": 0, "limit": 30, "proposals": []}


def test_a_chat_clients_own_chores_are_not_kept(own: Parts) -> None:
    question = Question("q", "query", STRAY[0], (1, 2), Wish(), Sampling(max_tokens=1))
    prepare(replace(question, caller=replace(ANYBODY, priority="background")), own)
    assert own.store.unmatched.list() == []
    prepare(question, own)
    assert [query.text for query in own.store.unmatched.list()] == STRAY[:1]


def test_a_proposal_can_be_rejected(client: TestClient) -> None:
    ask(client, GARDEN)
    [proposal] = client.get("/v1/proposals").json()["proposals"]
    assert client.delete(f"/v1/proposals/{proposal['id']}").json() == {"forgotten": len(GARDEN)}
    assert client.delete(f"/v1/proposals/{proposal['id']}").status_code == 404


@pytest.mark.slow
def test_one_call_turns_a_proposal_into_a_task_in_service(client: TestClient, own: Parts) -> None:
    ask(client, [*GARDEN, *STRAY])
    [proposal] = client.get("/v1/proposals").json()["proposals"]
    assert (proposal["queries"], proposal["asked"]) == (len(GARDEN), len(GARDEN))
    url, body = f"/v1/proposals/{proposal['id']}/accept", {"name": "garden", "own_answers": 4}
    answers = [client.post(url, json=body, headers={"idempotency-key": "k"}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[0].json()["job"]["id"] == answers[1].json()["job"]["id"]
    assert len(own.store.unmatched.list()) == len(STRAY)
    job = answers[0].json()["job"]["id"]
    found = wait_for(lambda: (j := client.get(f"/v1/jobs/{job}").json())["state"] in ("done", "failed") and j)
    assert found["state"] == "done", found["detail"]
    wait_for(lambda: "garden" in [task["task"] for task in client.get("/v1/tasks").json()["tasks"]])
    answer = wait_for(
        lambda: (a := client.post("/v1/query", json={"query": GARDEN[0], "max_tokens": 1}).json())["task"] and a
    )
    assert (answer["task"], answer["receipt"]["mode"]) == ("garden", "mask")


def test_drift_of_a_task_is_an_event_and_keeps_its_queries(
    client: TestClient, own: Parts, generated: Callable[..., FinishedEvent]
) -> None:
    answer = client.post("/v1/query", json={"query": "how long do I boil an egg", "max_tokens": 1}).json()
    assert answer["receipt"]["mode"] == "mask"
    assert client.get("/v1/events").json() == {"events": []}
    serving = serving_of(own, "how long do I boil an egg")
    before = alarms_counted(client)
    finished = generated((1, 2, 3), serving.selection, max_tokens=1)
    for coverage in [0.9] * (WARM_UP + DELAY) + [0.2] * 10:
        own.discovery.served(serving, replace(finished, served=replace(finished.served, coverage=coverage)))
    [event] = wait_for(lambda: client.get("/v1/events").json()["events"])
    assert (event["kind"], event["task"]) == ("drift", "cooking")
    assert event["value"] > event["bound"]
    assert alarms_counted(client) == before + 1  # the counters are the session's, and other tests may ring, too
    ask(client, ["how long do I boil an egg"])
    assert [query["text"] for query in client.get("/v1/unmatched").json()["queries"]] == ["how long do I boil an egg"]


def alarms_counted(client: TestClient) -> float:
    lines = client.get("/metrics").text.splitlines()
    found = [line.split()[-1] for line in lines if line.startswith('moepager_drift_total{task="cooking"}')]
    return float(found[0]) if found else 0.0


def serving_of(parts: Parts, query: str) -> Serving:
    return choose_serving(Wish(), parts.retriever.decide(query), parts.catalogue, parts.policy)
