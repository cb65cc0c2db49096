"""Fewer calls of experts a token: asked for by a request or a setting, served by evidence, told in receipt and plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from engine.plan import MemoryPlan
from engine.requests import FinishedEvent, GenerationRequest, Sampling
from service.app import create_app
from service.parts import Parts, open_parts
from service.planning import plan_task
from service.serving import Candidate, Policy, ProfiledTask, best_by_size, choose_candidate
from service.settings import Settings
from store.database import open_store
from store.errors import InvalidInput
from store.records import Evaluation, Selection, StoredSelection

EGG = "how long do I boil an egg"
CALLS = (1, 2, 1)  # of 2 in each of three layers
NAME = "cooking-reap-0.5"


@pytest.fixture(scope="module")
def own(
    half_settings: Settings, stock: Callable[[str], None], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Parts]:
    """The tasks of every other test, and of one selection two copies of fewer calls, the worse by the rule `equal`."""
    url = f"sqlite:///{tmp_path_factory.mktemp('calls')}/s.db"
    stock(url)
    with open_store(url) as store:
        plain = store.selections.get(NAME)
        for rule, calls, accuracy in (("lexi", CALLS, 0.5), ("equal", (2, 1, 1), 0.4)):
            fewer = replace(plain.selection, calls=calls)
            one = replace(plain, id=f"{NAME}-{rule}", selection=fewer, active=0.667, calls_by=rule)
            store.selections.put(one)
            store.evaluations.put(Evaluation(one.id, "held-out", 20, accuracy, 1.0, 3.0, 0.9, (0.0,) * 20))
    with open_parts(half_settings.model_copy(update={"store": url})) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(own: Parts) -> Iterator[TestClient]:
    with TestClient(create_app(lambda: nullcontext(own))) as opened:
        while opened.get("/readyz").status_code == 503:
            pass
        yield opened


def ask(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/query", json={"max_tokens": 8, "query": EGG, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def alone(parts: Parts, selection: Selection) -> str:
    prompt = parts.engine.tokenizer.encode_chat([{"role": "user", "content": EGG}])
    *_, last = parts.worker.submit(GenerationRequest(tuple(prompt), selection, "mask", Sampling(max_tokens=8)))
    assert isinstance(last, FinishedEvent)
    return last.text


def test_a_request_gets_fewer_calls_where_it_asks_for_them_and_its_receipt_says_so(
    client: TestClient, own: Parts
) -> None:
    plain = own.store.selections.get(NAME).selection
    usual, fewer = ask(client), ask(client, active=0.667)
    assert usual["answer"] == alone(own, plain)
    assert fewer["answer"] == alone(own, replace(plain, calls=CALLS)) != usual["answer"]
    assert (usual["receipt"]["active"], usual["receipt"]["calls"]) == (1.0, None)
    assert (fewer["receipt"]["active"], fewer["receipt"]["calls"]) == (0.667, list(CALLS))
    assert fewer["receipt"]["selection"] != usual["receipt"]["selection"]
    assert fewer["receipt"]["experts"] == usual["receipt"]["experts"]
    assert [one.active for one in own.store.decisions.list(2)] == [0.667, 1.0]  # and so does the audit


def test_chats_and_prefetches_ask_for_them_too(client: TestClient) -> None:
    body = {"model": "tiny:cooking", "messages": [{"role": "user", "content": EGG}], "max_tokens": 2}
    found = client.post("/v1/chat/completions", json={**body, "expert": {"active": 0.667}}).json()
    assert found["usage"]["expert"]["calls"] == list(CALLS)
    found = client.post("/v1/residency/prefetch", json={"task": "cooking", "active": 0.667}).json()
    assert found["selection"] == f"{NAME}-lexi"


def test_a_share_without_evidence_and_one_beside_exact_mode_are_refused(client: TestClient) -> None:
    for body, words in (
        ({"active": 0.25}, "makes 0.25 of a token's calls of experts; it has: 0.667, 1."),
        ({"active": 0.667, "mode": "exact"}, "exact mode uses none"),
        ({"active": 0.667, "keep": 0.25}, "keeps 0.25 of the experts; it has: 0.5."),
    ):
        answer = client.post("/v1/query", json={"query": EGG, "task": "cooking", **body})
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]


def test_tasks_and_plan_tell_what_a_token_reads(client: TestClient, own: Parts) -> None:
    tasks = {one["task"]: one for one in client.get("/v1/tasks").json()["tasks"]}
    rows = {one["selection"]: one for one in tasks["cooking"]["evidence"]}
    slot = own.engine.plan.slot_bytes
    assert (rows[NAME]["calls"], rows[NAME]["token_bytes"]) == (None, 6 * slot)
    fewer = rows[f"{NAME}-lexi"]
    assert (fewer["active"], fewer["calls"], fewer["calls_by"]) == (0.667, list(CALLS), "lexi")
    assert (fewer["token_bytes"], fewer["bytes"]) == (4 * slot, rows[NAME]["bytes"])
    [plan] = client.get("/v1/plan", params={"task": "cooking"}).json()["tasks"]
    assert (plan["active"], plan["calls"], plan["as_good_keep"]) == (1.0, None, 0.25)
    assert [size["calls_by"] for size in plan["sizes"] if size["active"] < 1] == ["lexi"]


def _task(*ways: tuple[float, float, float]) -> ProfiledTask:
    """Candidates of (keep, active, accuracy)."""
    made = []
    for keep, active, accuracy in ways:
        calls = None if active == 1 else (1, 1)
        selection = Selection.of([range(round(8 * keep))] * 2)
        stored = StoredSelection(f"{keep}-{active}", "p", "gate", "uniform", keep, replace(selection, calls=calls))
        stored = replace(stored, active=active)
        made.append(Candidate(stored, Evaluation(stored.id, "h", 20, accuracy, 1.0, 1.0, 0.9)))
    return ProfiledTask("t", "", "p", tuple(made))


def test_better_evidence_does_not_make_fewer_calls_serve_unless_they_are_asked_for(parts: Parts) -> None:
    task = _task((1.0, 1.0, 0.8), (1.0, 0.5, 0.9), (0.5, 0.5, 0.9))
    plan: MemoryPlan = replace(parts.engine.plan, slots=16, layers=2)
    policy, lower = Policy(plan), Policy(plan, active=0.5)
    assert choose_candidate(task, None, None, policy).stored.id == "1.0-1.0"
    assert choose_candidate(task, None, None, lower).stored.id == "1.0-0.5"
    assert choose_candidate(task, None, None, lower, 1.0).stored.id == "1.0-1.0"
    assert choose_candidate(task, 0.5, None, policy, 0.5).stored.id == "0.5-0.5"
    with pytest.raises(InvalidInput, match="it has: 1"):
        choose_candidate(_task((1.0, 1.0, 0.8)), None, None, lower)
    assert [one.stored.id for one in best_by_size(task, None)] == ["1.0-1.0"]


def test_a_smaller_size_is_as_good_only_beside_as_many_calls(parts: Parts) -> None:
    plan = replace(parts.engine.plan, slots=16, layers=2)
    found = plan_task(_task((1.0, 1.0, 0.8), (0.5, 0.5, 0.9)), Policy(plan))
    assert [one.stored.id for one in found.sizes] == ["1.0-1.0", "0.5-0.5"]
    assert found.as_good is None
    assert plan_task(_task((1.0, 0.5, 0.8), (0.5, 0.5, 0.9)), Policy(plan, active=0.5)).as_good is not None


def test_a_setting_asks_for_them_in_every_request_s_place(half_settings: Settings, tmp_path: Path) -> None:
    policy = Policy.of(half_settings.model_copy(update={"active": 0.5}), None)  # type: ignore[arg-type]
    assert policy.active == 0.5
