"""Tasks and jobs over REST: from a task's text to its profile in service, with a real profiling process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from typer.main import get_command
from waiting import wait_for

import profiler.commands
import service.attempt
import service.jobs
from profiler.asked import Asked
from service.app import create_app
from service.attempt import Attempt, command, without_password
from service.jobs import queue_job, work
from service.model import job_config
from service.parts import Parts, reread
from service.workshop import workshop_of
from store.database import open_store
from store.errors import NotFound
from store.records import Job, StoredCorpus, TaskRecord

GARDEN = ["when do I plant tomatoes outside", "when do I plant beans outside", "how deep do I plant a bulb"]
TASK: dict[str, Any] = {
    "name": "garden",
    "description": "plants",
    "exemplars": GARDEN,
    "calibration": [{"prompt": f"plant {n}", "response": f"in month {n}"} for n in range(4)],
    "evaluation": [{"prompt": f"sow {n}", "response": f"in week {n}"} for n in range(3)],
}


@pytest.fixture
def own(parts: Parts, stock: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parts]:
    """The parts over a store and a data folder of the test's own."""
    monkeypatch.setenv("MOEPAGER_HOME", str(tmp_path))
    url = f"sqlite:///{tmp_path / 'store.db'}"
    stock(url)
    update = {"store": url, "reload_seconds": 0.05, "job_memory": 2**30}
    with open_store(url) as store:
        yield reread(replace(parts, settings=parts.settings.model_copy(update=update), store=store))


@pytest.fixture
def running(own: Parts) -> Iterator[TestClient]:
    with TestClient(create_app(lambda: nullcontext(own))) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        yield client


def state_of(client: TestClient, job: str) -> str:
    state: str = client.get(f"/v1/jobs/{job}").json()["state"]
    return state


@pytest.fixture
def sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the place of the profiling, a process that tells its id and one step, then waits for its parent's end."""
    pid = tmp_path / "pid"
    told = json.dumps({"progress": {"task": "garden", "stage": "calibrate", "done": 1, "total": 4}})
    tell = f"print({told!r}, flush=True); pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))"
    code = f"import os, pathlib; {tell}; os.read(0, 1)"
    monkeypatch.setattr(service.attempt, "command", lambda job, workshop, folder: [sys.executable, "-c", code])
    monkeypatch.setattr(service.attempt, "BEAT_SECONDS", 0.05)
    return pid


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_task_is_created_profiled_watched_served_and_deleted(
    running: TestClient, own: Parts, events_of: Callable[[str], list[tuple[str, Any]]]
) -> None:
    assert running.post("/v1/tasks", json=TASK).status_code == 201
    started = running.post("/v1/jobs", json={"task": "garden"})
    assert (started.status_code, started.json()["state"]) == (202, "queued")
    events = events_of(running.get(f"/v1/jobs/{started.json()['id']}/events").text)
    last = events[-1][1]
    assert (events[-1][0], last["state"], last["progress"]) == ("job", "done", 1.0), last
    wait_for(lambda: "garden" in [t["task"] for t in running.get("/v1/tasks").json()["tasks"]])
    query = {"query": GARDEN[0], "max_tokens": 2}
    wait_for(lambda: running.post("/v1/query", json=query).json()["task"] == "garden")
    assert running.post("/v1/query", json=query).json()["receipt"]["mode"] == "mask"
    assert [e.text for e in own.store.exemplars.list(task="garden")] == GARDEN
    assert running.delete("/v1/tasks/garden").json() == {"task": "garden", "deleted": True}
    assert running.post("/v1/query", json=query).json()["task"] is None
    assert running.post("/v1/jobs", json={"task": "garden"}).status_code == 404


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"exemplars": [], "calibration": []}, None),
        ({"name": "generalist"}, "name"),
        ({"name": " x "}, "task"),
        ({"path": "/etc/passwd"}, "path"),
        ({"calibration": [{"response": "no prompt"}]}, "calibration[0]"),
        ({"calibration": [{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}]}, "calibration[0]"),
        ({"exemplars": ["x"] * 1001}, "exemplars"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused(running: TestClient, change: dict[str, Any], param: str | None) -> None:
    answer = running.post("/v1/tasks", json=TASK | change)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_task_without_text_is_told_what_a_task_needs(running: TestClient) -> None:
    answer = running.post("/v1/tasks", json={"name": "empty"})
    assert answer.status_code == 400
    assert "a task needs exemplars, calibration items, or both" in answer.json()["error"]["message"]


def test_names_are_taken_once_and_jobs_run_once_a_task(running: TestClient, sleeper: Path) -> None:
    assert running.post("/v1/tasks", json=TASK).status_code == 201
    assert running.post("/v1/tasks", json=TASK).status_code == 409
    job = running.post("/v1/jobs", json={"task": "garden"}).json()["id"]
    assert running.post("/v1/jobs", json={"task": "garden"}).status_code == 409
    assert running.delete("/v1/tasks/garden").status_code == 409
    running.delete(f"/v1/jobs/{job}")
    assert running.delete("/v1/tasks/garden").status_code == 200


def at_once(count: int, ask: Callable[[int], Any]) -> list[Any]:
    together = threading.Barrier(count)

    def one(number: int) -> Any:
        together.wait()
        return ask(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@pytest.fixture
def slow_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody has looked before anybody writes."""
    look = service.jobs.refuse_active
    monkeypatch.setattr(service.jobs, "refuse_active", lambda store, task: (look(store, task), time.sleep(0.2)))


@pytest.mark.usefixtures("sleeper", "slow_looks")
def test_of_jobs_of_one_task_asked_for_at_once_one_is_made(running: TestClient) -> None:
    running.post("/v1/tasks", json=TASK)
    answers = at_once(6, lambda _: running.post("/v1/jobs", json={"task": "garden"}))
    assert sorted(answer.status_code for answer in answers) == [202, *[409] * 5]
    refused = next(answer for answer in answers if answer.status_code == 409)
    assert "Wait for its end, or cancel it" in refused.json()["error"]["message"]
    [job] = running.get("/v1/jobs").json()["jobs"]
    running.delete(f"/v1/jobs/{job['id']}")


@pytest.mark.usefixtures("sleeper", "slow_looks")
def test_one_idempotency_key_sent_at_once_gives_one_job_to_all(running: TestClient) -> None:
    running.post("/v1/tasks", json=TASK)
    header = {"idempotency-key": "same"}
    answers = at_once(6, lambda _: running.post("/v1/jobs", json={"task": "garden"}, headers=header))
    assert {answer.status_code for answer in answers} == {202}
    [job] = {answer.json()["id"] for answer in answers}
    running.delete(f"/v1/jobs/{job}")


def test_a_key_makes_one_task_and_is_refused_for_another_body(running: TestClient) -> None:
    header = {"idempotency-key": "same"}
    answers = at_once(4, lambda _: running.post("/v1/tasks", json=TASK, headers=header))
    assert {answer.status_code for answer in answers} == {201}
    for change in ({"name": "orchard"}, {"description": "trees"}):
        other = running.post("/v1/tasks", json=TASK | change, headers=header)
        assert (other.status_code, "Idempotency-Key" in other.text) == (409, True)
    assert running.post("/v1/tasks", json=TASK).status_code == 409
    assert running.post("/v1/tasks", json=TASK, headers={"idempotency-key": "new"}).status_code == 409


def test_a_running_job_tells_its_progress_and_ends_when_it_is_cancelled(running: TestClient, sleeper: Path) -> None:
    running.post("/v1/tasks", json=TASK)
    job = running.post("/v1/jobs", json={"task": "garden"}).json()["id"]
    wait_for(lambda: running.get(f"/v1/jobs/{job}").json()["detail"] == "calibrate 1 of 4")
    assert running.get("/v1/jobs").json()["jobs"][0]["progress"] == 0.125
    pid = int(sleeper.read_text())
    assert running.delete(f"/v1/jobs/{job}").json()["state"] == "cancelled"
    wait_for(lambda: not alive(pid))
    assert state_of(running, job) == "cancelled"
    assert running.delete(f"/v1/jobs/{job}").status_code == 409


def test_a_profiling_that_is_killed_fails_and_says_so(running: TestClient, sleeper: Path) -> None:
    running.post("/v1/tasks", json=TASK)
    job = running.post("/v1/jobs", json={"task": "garden"}).json()["id"]
    wait_for(lambda: sleeper.exists() and sleeper.read_text() != "")
    os.kill(int(sleeper.read_text()), signal.SIGKILL)
    wait_for(lambda: state_of(running, job) == "failed")
    assert "exit code -9" in running.get(f"/v1/jobs/{job}").json()["detail"]


def test_a_budget_that_is_too_small_for_a_job_is_told_in_the_services_words(
    running: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process takes --memory; who runs a service gives MOEPAGER_JOB_MEMORY."""
    code = "import sys; sys.exit('moepager: A budget of 1 MiB is too small. Give --memory 126MiB or more.')"
    monkeypatch.setattr(service.attempt, "command", lambda job, workshop, folder: [sys.executable, "-c", code])
    running.post("/v1/tasks", json=TASK)
    job = running.post("/v1/jobs", json={"task": "garden"}).json()["id"]
    wait_for(lambda: state_of(running, job) == "failed")
    assert running.get(f"/v1/jobs/{job}").json()["detail"].endswith("Give MOEPAGER_JOB_MEMORY 126MiB or more.")


def test_a_service_that_stops_puts_its_job_back_and_the_next_takes_it_up(own: Parts, sleeper: Path) -> None:
    with TestClient(create_app(lambda: nullcontext(own))) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        client.post("/v1/tasks", json=TASK)
        job = client.post("/v1/jobs", json={"task": "garden"}).json()["id"]
        wait_for(lambda: sleeper.exists() and sleeper.read_text() != "")
    pid = int(sleeper.read_text())
    assert not alive(pid)
    assert own.store.jobs.get(job).state == "queued"
    sleeper.unlink()
    with TestClient(create_app(lambda: nullcontext(own))) as client:
        wait_for(lambda: sleeper.exists() and state_of(client, job) == "running")
        client.delete(f"/v1/jobs/{job}")


def test_a_job_whose_runner_died_is_taken_up_again(own: Parts, sleeper: Path) -> None:
    now = datetime.now(UTC)
    own.store.corpora.create(TaskRecord("garden"), StoredCorpus("garden", tuple(GARDEN), (), ()), now)
    long_ago = now - timedelta(hours=1)
    model = own.catalogue.model
    own.store.jobs.put(Job("dead", model, "garden", "running", 0.4, "calibrate", long_ago, long_ago))
    own.store.jobs.put(Job("alive", model, "sql", "running", 0.4, "calibrate", now, now + timedelta(hours=1)))
    own.store.jobs.put(Job("stranger", "another-model", "sql", "running", 0.4, "", long_ago, long_ago))
    with TestClient(create_app(lambda: nullcontext(own))) as client:
        wait_for(sleeper.exists)
        assert state_of(client, "dead") == "running"
        client.delete("/v1/jobs/dead")
    assert [own.store.jobs.get(name).state for name in ("alive", "stranger")] == ["running", "running"]


def test_a_job_whose_task_another_process_is_at_is_put_back(own: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; print('moepager: Another run is profiling the same task', file=sys.stderr); sys.exit(69)"
    monkeypatch.setattr(service.attempt, "command", lambda job, workshop, folder: [sys.executable, "-c", code])
    own.store.corpora.create(TaskRecord("garden"), StoredCorpus("garden", tuple(GARDEN), (), ()), datetime.now(UTC))
    job = queue_job(own.store, own.catalogue.model, "garden", {})
    assert not work(job.id, workshop_of(own), threading.Event())
    found = own.store.jobs.get(job.id)
    assert (found.state, found.deaths, "Another run" in found.detail) == ("queued", 0, True)


RUNNER = """
import sys, threading
import service.attempt
from service.jobs import work
from service.settings import Settings
from service.workshop import open_workshop

service.attempt.BEAT_SECONDS = 0.05
code = "import os; print('up', flush=True); os.read(0, 1)"
service.attempt.command = lambda job, workshop, folder: [sys.executable, "-c", code]
with open_workshop(Settings(model=sys.argv[1], store=sys.argv[2], embedder="hash")) as workshop:
    work(sys.argv[3], workshop, threading.Event())
"""


@pytest.mark.slow
def test_a_runner_that_stood_still_while_another_took_its_job_changes_nothing(own: Parts) -> None:
    own.store.corpora.create(TaskRecord("garden"), StoredCorpus("garden", tuple(GARDEN), (), ()), datetime.now(UTC))
    job = queue_job(own.store, own.catalogue.model, "garden", {}).id
    words = [sys.executable, "-c", RUNNER, str(own.folder), str(own.settings.store), job]
    with subprocess.Popen(words) as stalled:
        try:
            wait_for(lambda: own.store.jobs.get(job).updated > own.store.jobs.get(job).created)
            stalled.send_signal(signal.SIGSTOP)
            own.store.jobs.revive(own.catalogue.model, timedelta(seconds=-1), 3)
            taken = own.store.jobs.claim(job)
            assert taken is not None
            stalled.send_signal(signal.SIGCONT)
            assert stalled.wait(30) == 0  # its next note is refused, and it ends its process
        finally:
            stalled.kill()
    assert own.store.jobs.get(job) == taken


def test_the_profiling_process_ends_with_its_parent(own: Parts, tmp_path: Path, sleeper: Path) -> None:
    """The same reading of standard input as in `profiler.lines`, whose own test kills a real one."""
    job = Job("j", own.catalogue.model, "garden", "running", 0.0, "", datetime.now(UTC), datetime.now(UTC))
    own.store.tasks.put(TaskRecord("garden"))
    own.store.jobs.put(job)
    stop = threading.Event()
    attempt = Attempt(job, workshop_of(own), StoredCorpus("garden", tuple(GARDEN), (), ()), tmp_path)
    threading.Timer(0.5, stop.set).start()
    assert attempt.run(stop) == "stopped"
    written = [json.loads(line) for line in (tmp_path / "calibration.jsonl").read_text().splitlines()]
    assert written == [{"prompt": text} for text in GARDEN]


def test_a_command_shows_no_password_and_takes_names_for_no_options(own: Parts, tmp_path: Path) -> None:
    own.store.tasks.put(TaskRecord("--store", "-x"))
    for name in ("calibration", "evaluation"):
        (tmp_path / f"{name}.jsonl").write_text("")
    now = datetime.now(UTC)
    options = {"scorers": ["peu", "reap"], "keeps": [0.5], "search": True, "own_answers": 8, "draws": 3}
    job = Job("j", own.catalogue.model, "--store", "queued", 0.0, "", now, now, options)
    words = command(job, workshop_of(own), tmp_path)
    assert words[-4:] == ["--search", "--scorer=peu", "--scorer=reap", "--keep=0.5"]
    assert "--own-answers=8" in words
    assert f"--fingerprint={own.catalogue.model}" in words  # the process refuses another model in its folder
    assert "--draws=3" in words
    assert "--task=--store" in words
    assert not any(word.startswith("--eval") for word in words)
    assert without_password("postgresql://u:p%40ss@host:1/db") == ("postgresql://u@host:1/db", "p@ss")
    assert without_password("sqlite:////srv/store.db") == ("sqlite:////srv/store.db", None)


@pytest.mark.parametrize("memory", [None, 2**30])
def test_the_doctor_plans_a_job_as_its_process_does(own: Parts, tmp_path: Path, memory: int | None) -> None:
    settings = own.settings.model_copy(update={"memory": memory, "job_memory": None, "max_batch": 3})
    own.store.tasks.put(TaskRecord("garden"))
    (tmp_path / "evaluation.jsonl").write_text("")
    job = service.jobs.new_job(own.catalogue.model, "garden", {}, None)
    words = command(job, replace(workshop_of(own), settings=settings), tmp_path)[4:]
    context = get_command(profiler.commands.app).commands["profile"].make_context("profile", words)
    asked = Asked(**{name: value for name, value in context.params.items() if name in Asked.__slots__})
    assert job_config(settings) == replace(asked.config(), model=job_config(settings).model)


def test_a_job_may_ask_what_its_selections_cost_the_other_tasks(own: Parts, tmp_path: Path) -> None:
    beans, wheels = ({"prompt": text} for text in ("when do I plant beans", "how do I true a wheel"))
    for name, item in (("garden", beans), ("bicycles", wheels)):
        corpus = StoredCorpus(name, tuple(GARDEN), (), (item,) * 20)
        own.store.corpora.create(TaskRecord(name, ""), corpus, datetime.now(UTC))
    job = service.jobs.new_job(
        own.catalogue.model, "garden", {"off_task": True, "stand_ins": ["novice"], "active": [0.5]}, None
    )
    Attempt(job, workshop_of(own), corpus, tmp_path)
    written = [json.loads(line) for line in (tmp_path / "others.jsonl").read_text().splitlines()]
    assert written == [wheels] * service.attempt.OFF_TASK_ITEMS
    words = command(job, workshop_of(own), tmp_path)
    assert f"--others={tmp_path / 'others.jsonl'}" in words
    assert "--stand-in=novice" in words
    assert "--active=0.5" in words


def test_an_unknown_job_is_not_found(running: TestClient, own: Parts) -> None:
    for method, path in (("GET", "/v1/jobs/no"), ("DELETE", "/v1/jobs/no"), ("GET", "/v1/jobs/no/events")):
        assert running.request(method, path).status_code == 404
    with pytest.raises(NotFound):
        own.store.jobs.get("no")


@pytest.mark.parametrize("evaluation", [(), ({"prompt": "when do I plant beans"},)])
def test_a_job_without_evaluation_text_says_that_exact_mode_alone_serves_it(
    own: Parts, evaluation: tuple[Any, ...]
) -> None:
    corpus = StoredCorpus("garden", tuple(GARDEN), (), evaluation)
    own.store.corpora.create(TaskRecord("garden", ""), corpus, datetime.now(UTC))
    job = service.jobs.new_job(own.catalogue.model, "garden", {}, None)
    said = service.jobs._ending(job, own.store)
    assert (said == "in service") == bool(evaluation)
    assert ("exact mode alone" in said) == (not evaluation)
