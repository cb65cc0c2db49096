"""A task's text as files of a form: the same task as from JSON, and what is wrong is told with part and line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.middleware import MOST_BYTES
from service.parts import Parts, reread
from store.database import Store, open_store

ITEMS: list[dict[str, Any]] = [
    {"prompt": "plant 1", "response": "in month 1"},
    {"prompt": "grün"},
    {"messages": [{"role": "user", "content": "plant 2"}, {"role": "assistant", "content": "in month 2"}]},
]
LINES = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in ITEMS)


@pytest.fixture
def own(parts: Parts, stock: Callable[[str], None], tmp_path: Path) -> Iterator[Parts]:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    stock(url)
    with open_store(url) as store:
        yield reread(replace(parts, settings=parts.settings.model_copy(update={"store": url}), store=store))


@pytest.fixture
def store(own: Parts) -> Store:
    return own.store


@pytest.fixture
def client(own: Parts) -> Iterator[TestClient]:
    with TestClient(create_app(lambda: nullcontext(own))) as opened:
        while opened.get("/readyz").status_code == 503:
            pass
        yield opened


def send(client: TestClient, **files: str | bytes) -> Any:
    forms = {part: (f"../../{part}.jsonl", text) for part, text in files.items()}
    return client.post("/v1/tasks/upload", data={"name": "garden", "description": "plants"}, files=forms)


def test_files_make_the_task_that_the_same_texts_make_as_json(client: TestClient, store: Store) -> None:
    made = send(client, exemplars="how do I plant\n\n when do I sow \n", calibration="\ufeff" + LINES, evaluation=LINES)
    assert (made.status_code, made.json()) == (
        201,
        {"task": "garden", "description": "plants", "exemplars": 2, "calibration": 3, "evaluation": 3},
    )
    body = {"description": "plants", "exemplars": ["how do I plant", "when do I sow"]}
    items = {"calibration": ITEMS, "evaluation": ITEMS}
    assert client.post("/v1/tasks", json={"name": "plain", **body, **items}).status_code == 201
    uploaded, plain = store.corpora.get("garden"), store.corpora.get("plain")
    assert replace(uploaded, task="") == replace(plain, task="")
    assert send(client, calibration=LINES).status_code == 409


@pytest.mark.parametrize(
    ("files", "said", "param"),
    [
        ({"calibration": LINES + "{no json"}, "calibration, line 4: Invalid JSON", "calibration"),
        ({"calibration": LINES, "evaluation": '{"response": "x"}'}, "evaluation, line 1: an item is", "evaluation"),
        ({"calibration": '{"prompt": "a", "path": "/etc/passwd"}'}, "line 1: path: Extra inputs", "calibration"),
        ({"calibration": "\n\n" + '{"prompt": 7}'}, "calibration, line 3: prompt", "calibration"),
        ({"calibration": b"\xff\xfe"}, "calibration: not UTF-8 at byte 0", "calibration"),
        ({"exemplars": "\n"}, "a task needs exemplars, calibration items, or both", None),
        ({}, "a task needs exemplars, calibration items, or both", None),
    ],
)
def test_what_is_wrong_is_told_with_its_file_and_line(
    client: TestClient, store: Store, files: dict[str, str | bytes], said: str, param: str | None
) -> None:
    answer = send(client, **files)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert said in error["message"]
    assert "garden" not in {task.name for task in store.tasks.list()}


def test_a_form_without_a_name_or_that_is_none_is_refused_in_words(client: TestClient) -> None:
    answer = client.post("/v1/tasks/upload", files={"calibration": ("c", LINES)})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "name")
    header = {"content-type": "multipart/form-data; boundary=x"}
    answer = client.post("/v1/tasks/upload", content=b"--x\r\nbroken", headers=header)
    assert answer.status_code == 400
    assert "JSON" not in answer.json()["error"]["message"]


def test_parts_that_are_none_of_the_form_are_refused_and_not_ignored(client: TestClient) -> None:
    answer = send(client, calibration=LINES, calibraton=LINES)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "calibraton")
    form = {"name": "garden", "calibration": LINES}
    answer = client.post("/v1/tasks/upload", data=form, files={"evaluation": ("e", LINES)})
    assert "calibration must be one file" in answer.json()["error"]["message"]
    twice = [("calibration", ("a", LINES)), ("calibration", ("b", LINES))]
    assert client.post("/v1/tasks/upload", data={"name": "garden"}, files=twice).status_code == 400


def test_a_form_above_the_limit_of_bodies_is_refused(client: TestClient) -> None:
    assert send(client, calibration="x" * MOST_BYTES).status_code == 413


def test_the_same_upload_under_one_key_is_done_once(client: TestClient) -> None:
    header = {"idempotency-key": "once"}
    forms = {"calibration": ("c.jsonl", LINES)}
    answers = [client.post("/v1/tasks/upload", data={"name": "garden"}, files=forms, headers=header) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 201]
    forms = {"calibration": ("c.jsonl", LINES + LINES.replace("1", "2"))}
    other = client.post("/v1/tasks/upload", data={"name": "garden"}, files=forms, headers=header)
    assert other.status_code == 409
