"""What HTTP adds to the engine's time, and what idle streams cost those that work.

engine     the engine alone, on its thread
named      the same prompts over HTTP, the task named: reading, checking, sampling options, the receipt, JSON
retrieved  the same, the task found by the embedder and FAISS, and every decision stored
streamed   named, as server-sent events, to the last of them

Clients are processes of their own, so that they take no time of the service's interpreter. Arms take turns, prompt by
prompt. Then as many clients as the batch has rows ask for tokens, once with nobody else and
once beside idle streams: open connections whose answers never begin, each of which the service watches and comments on.
"""

from __future__ import annotations

import json
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from urllib.parse import urlsplit

from benchmarks.http_client import HttpClient, client_of
from benchmarks.live_server import served
from demo.prepare import DTYPE, THREADS, corpus, prepare
from demo.tasks.registry import TASKS
from engine.embedder import open_embedder
from engine.engine import Engine
from engine.requests import Event, FinishedEvent, GenerationRequest, Sampling
from engine.stream import TokenStream
from engine.worker import EngineWorker
from service.app import create_app
from service.model import BUNDLED
from service.parts import Parts, open_parts
from service.retrieval import pinned
from service.serving import Wish, choose_serving
from service.settings import Settings
from store.database import open_store
from store.home import bundled_model

ARMS = ("engine", "named", "retrieved", "streamed")


@dataclass(frozen=True, slots=True)
class Work:
    requests: int = 60
    tokens: int = 16
    clients: int = 4
    idle: int = 200
    rounds: int = 5
    seconds: float = 4.0  # of each throughput run
    embedder: str = "minilm"


@dataclass(frozen=True, slots=True)
class Arm:
    """`added_ms` is the median of what each prompt took longer than in the engine alone, in the same turn;
    `added_cpu_ms` the same in processor time of client and service: what is left of it on a busy machine.
    """

    name: str
    p50_ms: float
    p90_ms: float
    added_ms: float
    added_cpu_ms: float


class HeldWorker:
    """The engine's worker, but for requests of a single token, which stay in the queue for ever."""

    def __init__(self, worker: EngineWorker) -> None:
        self._worker = worker
        self.held: list[TokenStream] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)

    def submit_all(self, requests: Sequence[GenerationRequest]) -> list[TokenStream]:
        if any(request.sampling.max_tokens != 1 for request in requests):
            return self._worker.submit_all(requests)
        streams = [TokenStream(request) for request in requests]
        self.held += streams
        return streams


def bench_service(work: Work) -> tuple[list[Arm], dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        parts = stack.enter_context(_opened(Path(folder), work))
        held = HeldWorker(parts.worker)
        url = stack.enter_context(served(create_app(lambda: nullcontext(replace(parts, worker=held)))))  # type: ignore[arg-type]
        client = stack.enter_context(client_of(url))
        arms = _latencies(parts, client, work)
        return arms, _throughput(url, client, held, work)


@contextmanager
def _opened(folder: Path, work: Work) -> Iterator[Parts]:
    """The bundled model with a small profile of every task: which experts they keep does not matter here."""
    url = f"sqlite:///{folder / 'store.db'}"
    with open_store(url) as store:
        prepare(store, open_embedder(work.embedder), bundled_model(), scorers=["tcess"], items=4, generalist=False)
    settings = Settings(
        store=url, embedder=work.embedder, max_context=256, max_batch=work.clients, dtype=DTYPE, threads=THREADS
    )
    with open_parts(settings) as parts:
        yield parts


def _latencies(parts: Parts, client: HttpClient, work: Work) -> list[Arm]:
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    cpu: dict[str, list[float]] = {name: [] for name in ARMS}
    prompts = [(task.name, item.prompt) for task in TASKS for item in corpus(task.name, "evaluation", 8).items]
    for number in range(work.requests + 4):
        task, prompt = prompts[number % len(prompts)]
        named = f"{parts.model_id}:{task}"
        bodies = {
            "named": chat_body(named, prompt, work.tokens),
            "retrieved": chat_body(parts.model_id, prompt, work.tokens),
            "streamed": chat_body(named, prompt, work.tokens, stream=True),
        }
        for place in range(len(ARMS)):
            name = ARMS[(place + number) % len(ARMS)]
            worked = time.process_time()
            if name == "engine":
                took, elsewhere = _by_engine(parts, task, prompt, work.tokens), 0.0
            else:
                took, elsewhere = client.ask(bodies[name])
            if number >= 4:  # the first ones warm up
                seconds[name].append(took)
                cpu[name].append(time.process_time() - worked + elsewhere)
    return [_arm(name, seconds, cpu) for name in ARMS]


def _arm(name: str, seconds: dict[str, list[float]], cpu: dict[str, list[float]]) -> Arm:
    own = seconds[name]
    return Arm(name, 1000 * median(own), 1000 * quantiles(own, n=10)[8], _added(own, seconds), _added(cpu[name], cpu))


def _added(own: list[float], all_arms: dict[str, list[float]]) -> float:
    return median(1000 * (one - engine) for one, engine in zip(own, all_arms["engine"], strict=True))


def _by_engine(parts: Parts, task: str, prompt: str, tokens: int) -> float:
    """Seconds from the first look at the prompt to its last token, on the thread that owns the device."""
    retrieval = pinned(task, parts.retriever.threshold)
    serving = choose_serving(Wish(task), retrieval, parts.catalogue, parts.policy)
    ids = parts.engine.tokenizer.encode_chat([{"role": "user", "content": prompt}])
    request = GenerationRequest(ids, serving.selection, serving.mode, Sampling(max_tokens=tokens, ignore_eos=True))

    def generate(engine: Engine) -> tuple[float, Event]:
        began = time.perf_counter()
        *_, last = engine.generate([request])
        return time.perf_counter() - began, last

    took, last = parts.worker.run(generate).result()
    if not (isinstance(last, FinishedEvent) and last.completion_tokens == tokens):
        raise RuntimeError(f"The engine did not give {tokens} tokens, but {last}.")
    return took


def chat_body(model: str, prompt: str, tokens: int, stream: bool = False) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": model, "messages": messages, "max_tokens": tokens, "ignore_eos": True, "stream": stream}


def _throughput(url: str, client: HttpClient, held: HeldWorker, work: Work) -> dict[str, float]:
    """Tokens a second, and the ratio beside idle streams: medians over the rounds, in which both take turns."""
    rates: dict[bool, list[float]] = {False: [], True: []}
    task = TASKS[0].name
    prompts = [item.prompt for item in corpus(task, "evaluation", 8).items]
    bodies = [chat_body(f"{BUNDLED}:{task}", prompt, work.tokens) for prompt in prompts]
    for round_ in range(work.rounds):
        for idle in (False, True) if round_ % 2 else (True, False):
            with _idle(url, held, work.idle if idle else 0):
                rates[idle].append(client.tokens_per_second(work.clients, work.seconds, bodies))
    alone, beside = median(rates[False]), median(rates[True])
    ratios = [with_idle / without for with_idle, without in zip(rates[True], rates[False], strict=True)]
    return {
        "tok_per_s_alone": alone,
        "tok_per_s_beside_idle": beside,
        "ratio_beside_idle": median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "idle_streams": float(work.idle),
    }


@contextmanager
def _idle(url: str, held: HeldWorker, count: int) -> Iterator[None]:
    """`count` open streams that the service has accepted and that stay silent; gone again afterwards."""
    task = TASKS[0].name
    messages = [{"role": "user", "content": "x"}]
    body = json.dumps({"model": f"{BUNDLED}:{task}", "messages": messages, "max_tokens": 1, "stream": True})
    place = urlsplit(url)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {place.netloc}\r\ncontent-length: {len(body)}"
    head += "\r\ncontent-type: application/json"
    held.held.clear()
    with ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(socket.create_connection((place.hostname or "", place.port or 0)))
            connection.sendall(f"{head}\r\n\r\n{body}".encode())
        while len(held.held) < count:
            time.sleep(0.01)
        time.sleep(0.5)  # until each has sent its first comment
        yield
    while not all(stream.request.cancelled.is_set() for stream in held.held):
        time.sleep(0.01)
