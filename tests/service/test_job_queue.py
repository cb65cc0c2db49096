"""Jobs by way of a real Redis: run by workers, finished once whatever is killed, and nothing lost with Redis."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import pytest
from fastapi.testclient import TestClient
from waiting import wait_for

from service.app import create_app
from service.doctor import check_redis
from service.job_queue import announce, connect, queue_of
from service.jobs import queue_job
from service.parts import Parts, reread
from service.settings import Settings
from store.database import Store, open_store
from store.errors import Conflict, InvalidInput, MoepagerError, StoreUnreachable
from store.records import StoredCorpus, TaskRecord

GARDEN = ("when do I plant tomatoes outside", "when do I plant beans outside", "how deep do I plant a bulb")
SEEDS = StoredCorpus("garden", GARDEN, (), ({"prompt": "sow", "response": "now"},))


class Redis(Protocol):
    """What the fixture `redis` is."""

    url: str

    def start(self) -> None: ...
    def kill(self) -> None: ...


@pytest.fixture
def store(stock: Callable[[str], None], tmp_path: Path) -> Iterator[Store]:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    stock(url)
    with open_store(url) as opened:
        opened.corpora.create(TaskRecord("garden", "plants"), SEEDS, datetime.now(UTC))
        yield opened


@pytest.fixture
def settings(half_settings: Settings, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("MOEPAGER_HOME", str(tmp_path))
    update = {"store": f"sqlite:///{tmp_path / 'store.db'}", "redis": redis.url, "job_memory": 2**30}
    return half_settings.model_copy(update=update)


@contextmanager
def working(settings: Settings) -> Iterator[subprocess.Popen[str]]:
    """A real `moepager worker`."""
    options = [f"--{name}={getattr(settings, name)}" for name in ("redis", "model", "store", "embedder")]
    words = [sys.executable, "-m", "service", "worker", *options, "--max-context=256", "--threads=1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("Waiting for jobs")
            yield process
        finally:
            process.kill()


def queued(store: Store, model: str, **options: Any) -> str:
    return queue_job(store, model, "garden", options).id


def state(store: Store, job: str) -> str:
    return store.jobs.get(job).state


@pytest.mark.slow
def test_a_worker_runs_the_job_that_a_service_announced(
    parts: Parts, settings: Settings, store: Store, redis: Redis
) -> None:
    own = reread(replace(parts, settings=settings, store=store))
    with TestClient(create_app(lambda: nullcontext(own), redis=redis.url)) as client, working(settings):
        wait_for(lambda: client.get("/readyz").status_code == 200)
        body = {"task": "garden", "scorers": ["peu", "random", "frequency"], "keeps": [1.0, 0.5]}
        job = client.post("/v1/jobs", json=body).json()["id"]
        found = wait_for(lambda: (j := client.get(f"/v1/jobs/{job}").json())["state"] in ("done", "failed") and j)
    assert (found["state"], found["detail"]) == ("done", "in service"), json.dumps(found)
    profile = store.profiles.latest(parts.catalogue.model, "garden")
    assert profile is not None
    made = {(each.scorer, each.keep) for each in store.selections.find(profile.id)}
    assert {scorer for scorer, _ in made} == {"peu", "random", "frequency"}
    assert {keep for _, keep in made} == {1.0, 0.5}


@pytest.mark.slow
def test_a_redis_that_loses_everything_loses_no_job(
    parts: Parts, settings: Settings, store: Store, redis: Redis
) -> None:
    own = reread(replace(parts, settings=settings, store=store))
    queue = queue_of(own.catalogue.model, connect(redis.url))
    with TestClient(create_app(lambda: nullcontext(own), redis=redis.url)) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        job = client.post("/v1/jobs", json={"task": "garden"}).json()["id"]
        wait_for(lambda: queue.job_ids == [job])
        redis.kill()
        assert client.get(f"/v1/jobs/{job}").json()["state"] == "queued"  # asked while Redis is away
        redis.start()
        assert queue.job_ids == []
        with working(settings):
            wait_for(lambda: state(store, job) in ("done", "failed"))
    assert state(store, job) == "done", store.jobs.get(job).detail


@pytest.mark.slow
def test_a_redis_that_is_killed_under_a_job_changes_nothing_and_the_worker_goes_on(
    card: Any, settings: Settings, store: Store, redis: Redis
) -> None:
    job = queued(store, card.fingerprint)
    with working(settings) as process:
        wait_for(lambda: state(store, job) == "running")
        redis.kill()
        wait_for(lambda: state(store, job) == "done")
        redis.start()
        again = queued(store, card.fingerprint)
        wait_for(lambda: state(store, again) == "done")
        assert process.poll() is None


@pytest.mark.slow
def test_a_worker_that_is_told_to_stop_puts_its_job_back_and_the_next_finishes_it(
    card: Any, settings: Settings, store: Store
) -> None:
    items = tuple({"prompt": f"plant number {n} " * 8, "response": f"in month {n}"} for n in range(600))
    corpus = replace(SEEDS, task="orchard", calibration=items)
    store.corpora.create(TaskRecord("orchard"), corpus, datetime.now(UTC))
    job = queue_job(store, card.fingerprint, "orchard", {}).id
    with working(settings) as process:
        wait_for(lambda: store.jobs.get(job).detail.startswith("calibrate"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert (state(store, job), store.jobs.get(job).detail) == ("queued", "waits for the next start")
    with working(settings):
        wait_for(lambda: state(store, job) in ("done", "failed"))
    assert state(store, job) == "done", store.jobs.get(job).detail


@pytest.mark.slow
def test_a_job_whose_worker_was_killed_is_finished_by_another(
    card: Any, settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = queued(store, card.fingerprint)
    with working(settings) as process:
        wait_for(lambda: state(store, job) == "running")
        process.kill()
        process.wait()
    assert state(store, job) == "running"  # nobody could say otherwise
    with working(settings):
        wait_for(lambda: state(store, job) in ("done", "failed"))
    assert state(store, job) == "done", store.jobs.get(job).detail


def test_a_job_is_announced_once_and_again_when_its_worker_is_dead(redis: Redis) -> None:
    queue = queue_of("m" * 64, connect(redis.url))
    for _ in range(3):
        announce("job-1", queue)
    assert queue.job_ids == ["job-1"]
    queue.remove("job-1")  # taken by a worker that died before it told the row
    announce("job-1", queue)
    assert queue.job_ids == ["job-1"]
    stored = connect(redis.url).hgetall("rq:job:job-1")
    assert json.loads(zlib.decompress(stored[b"data"])) == ["service.job_queue.perform", None, ["job-1"], {}]


def test_the_doctor_tells_of_redis_and_its_workers(settings: Settings, redis: Redis) -> None:
    with pytest.raises(MoepagerError, match="no worker waits"):
        check_redis(settings)
    redis.kill()
    with pytest.raises(StoreUnreachable, match="No Redis answers"):
        check_redis(settings)
    redis.start()
    assert "itself" in check_redis(settings.model_copy(update={"redis": None}))


def test_what_is_no_redis_url_is_refused() -> None:
    with pytest.raises(InvalidInput, match="redis://host"):
        connect("http://somewhere")


def test_the_same_idempotency_key_gives_the_same_job(store: Store) -> None:
    first = queue_job(store, "m", "garden", {"search": True}, key="a")
    store.jobs.update(first.id, state="done")
    assert queue_job(store, "m", "garden", {"search": True}, key="a").id == first.id
    assert queue_job(store, "m", "garden", {"search": True}, key="b").id != first.id
    with pytest.raises(Conflict, match="Idempotency-Key"):
        queue_job(store, "m", "garden", {}, key="a")
    assert len(store.jobs.list()) == 2
