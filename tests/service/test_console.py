"""The console's files and the routes that were made for it, without a browser."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from engine.engine import Engine
from service.app import create_app
from service.keys import KeyRing, make_key
from service.parts import Parts
from service.routes.console import FOLDER, PAGES
from store.records import Role

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def secrets() -> dict[str, str]:
    return {}


@pytest.fixture
def locked(parts: Parts, secrets: dict[str, str]) -> Iterator[TestClient]:
    keys = []
    roles: tuple[Role, ...] = ("query", "operator")
    for role in roles:
        key, secrets[role] = make_key(f"{role} key", role, None)
        keys.append(key)
    with TestClient(create_app(lambda: nullcontext(replace(parts, keys=KeyRing(keys))))) as client:
        while client.get("/readyz").status_code == 503:
            pass
        yield client


def test_the_root_leads_to_the_console(client: TestClient) -> None:
    for path in ("/", "/console"):
        answer = client.get(path, follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (307, "/console/")


def test_where_people_look_for_the_api_there_is_our_own_page_of_it(locked: TestClient) -> None:
    answer = locked.get("/docs", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (307, "/console/#/api")
    assert locked.get("/redoc").status_code == 401  # as any address that is none


def test_every_file_is_served_with_its_type_and_needs_no_key(locked: TestClient) -> None:
    types = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert {"index.html", "main.js", "console.css"} <= set(PAGES)
    for name in PAGES:
        answer = locked.get(f"/console/{name}")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(types[name.rpartition(".")[2]])
        assert answer.content == (FOLDER / name).read_bytes()
    assert locked.get("/console/").content == (FOLDER / "index.html").read_bytes()
    assert locked.get("/v1/session").status_code == 401


def test_the_console_may_load_its_own_files_and_nothing_else(client: TestClient) -> None:
    policy = client.get("/console/").headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "require-trusted-types-for 'script'" in policy
    assert "unsafe" not in policy
    assert "default-src 'none'" in client.get("/v1/session").headers["content-security-policy"]
    assert "default-src 'none'" in client.get("/consoles").headers["content-security-policy"]


@pytest.mark.parametrize("name", ["nothing.js", "../app.py", "%2e%2e/app.py", "..%2fapp.py", "/etc/passwd"])
def test_no_path_leads_out_of_the_consoles_folder(client: TestClient, name: str) -> None:
    answer = client.get(f"/console/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_a_file_that_did_not_change_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/console/main.js")
    again = client.get("/console/main.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert first.headers["cache-control"] == "no-cache"


def test_the_files_hold_no_markup_from_text_no_inline_code_and_no_foreign_address() -> None:
    for path in sorted(FOLDER.iterdir()):
        text = path.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            path
        )
        addresses = set(re.findall(r"https?://[^\s\"'`)]+", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, path
    page = (FOLDER / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script>", page)


def test_the_wheel_takes_every_file_along() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["service"]
    for path in FOLDER.iterdir():
        assert any(fnmatch(f"console/{path.name}", pattern) for pattern in patterns), path


def test_a_session_says_whose_key_it_is(client: TestClient, locked: TestClient, secrets: dict[str, str]) -> None:
    open_to_all = client.get("/v1/session").json()
    assert (open_to_all["model"], open_to_all["key"], open_to_all["operator"]) == ("tiny", None, True)
    for role, may in (("query", False), ("operator", True)):
        found = locked.get("/v1/session", headers={"authorization": f"Bearer {secrets[role]}"}).json()
        assert found["key"] == {"name": f"{role} key", "role": role, "tasks": None}
        assert found["operator"] is may


def test_residency_tells_the_slot_of_every_expert(client: TestClient, parts: Parts) -> None:
    client.post("/v1/query", json={"query": "boil an egg", "task": "cooking", "max_tokens": 1})
    parts.worker.run(lambda engine: None).result(5)
    found = client.get("/v1/residency?experts=true").json()
    slots = [slot for row in found["table"] for slot in row if slot >= 0]
    assert (len(found["table"]), len(found["table"][0])) == (parts.engine.card.layers, parts.engine.card.experts)
    assert len(slots) == len(set(slots)) == found["resident"]
    assert (found["leased"], found["leased_slots"], found["unfilled_slots"]) == (0, [], [])
    chosen = client.get("/v1/residency/selections").json()["tasks"]["cooking"]
    assert all(found["table"][layer][e] >= 0 for layer, ids in enumerate(chosen["experts"]) for e in ids)
    assert "table" not in client.get("/v1/residency").json()


def test_a_lease_shows_in_the_residency(client: TestClient, parts: Parts) -> None:
    selection = parts.store.selections.get("sql-reap-0.5").selection

    def look(engine: Engine) -> dict[str, object]:
        with engine.lease(selection):
            return client.get("/v1/residency?experts=true").json()  # type: ignore[no-any-return]

    found = parts.worker.run(look).result(30)
    held = {found["table"][key.layer][key.expert] for key in selection}  # type: ignore[index]
    assert set(found["leased_slots"]) == held  # type: ignore[call-overload]


def test_the_selections_are_those_that_serve(client: TestClient, parts: Parts) -> None:
    found = client.get("/v1/residency/selections").json()
    serves = {task["task"]: task["serves"] for task in client.get("/v1/tasks").json()["tasks"] if task["serves"]}
    assert {name: task["selection"] for name, task in found["tasks"].items()} == serves
    stored = parts.store.selections.get(serves["sql"]).selection
    assert found["tasks"]["sql"]["experts"] == [list(ids) for ids in stored.experts]
    assert found["changes"] == client.get("/v1/residency").json()["changes"]


def test_tasks_without_a_profile_are_listed_apart(client: TestClient) -> None:
    found = client.get("/v1/tasks").json()
    assert found["without_profile"] == [{"task": "stranger", "description": "about stranger", "has_text": False}]


def test_accuracy_comes_with_its_interval(client: TestClient) -> None:
    for task in client.get("/v1/tasks").json()["tasks"]:
        for each in task["evidence"]:
            low, high = each["low"], each["high"]
            assert 0 <= low <= each["accuracy"] <= high + 1e-9 <= 1 + 1e-9
            assert high - low > 0.1  # twenty items can't say it more exactly


def test_the_plan_without_a_budget_is_the_services_own(client: TestClient, parts: Parts) -> None:
    found = client.get("/v1/plan").json()
    assert (found["budget"], found["slots"]) == (parts.settings.memory, parts.engine.plan.slots)
    serves = {task["task"]: task["keep"] for task in found["tasks"]}
    assert serves == {"cooking": 0.5, "sql": 0.5, "unproven": None}


def test_a_larger_budget_holds_a_larger_selection(client: TestClient) -> None:
    whole = client.get("/v1/plan").json()["whole_bytes"]
    found = client.get("/v1/plan", params={"memory": str(whole)}).json()
    assert found["slots"] == found["layers"] * found["experts"]
    assert {task["keep"] for task in found["tasks"]} == {1.0, None}
    only = client.get("/v1/plan", params={"memory": str(whole), "task": "sql"}).json()["tasks"]
    assert [task["task"] for task in only] == ["sql"]
    assert only[0]["bytes"] == found["slots"] * found["slot_bytes"]
    assert only[0]["load_seconds"] > 0


@pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        ("memory=2G", 400, "Not a size of memory"),
        ("memory=1KiB", 422, "--memory"),
        ("memory=2GiB&task=none", 404, "No task 'none'"),
        ("memory=" + "9" * 50, 400, "memory"),
    ],
)
def test_a_plan_that_can_not_be_made_says_why(client: TestClient, query: str, status: int, words: str) -> None:
    answer = client.get(f"/v1/plan?{query}")
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]
