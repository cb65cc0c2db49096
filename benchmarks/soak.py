"""Mixed traffic with faults against a real service for a long time: no wrong answer, no lease left, memory flat.

Every answer is compared with what the same service said to that question alone, before the rush. Clients ask in mask,
exact and auto mode, streamed and whole, and in between do what clients do: hang up in the middle, send nonsense, ask
for too much. From outside, experts are evicted, tasks are read anew and the process is stopped for a moment.
"""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx

from demo.corpus import read_pairs
from demo.tasks.registry import TASKS
from demo.tour import serving
from store.errors import InvalidInput

MODES = ("mask", "exact", "auto")
QUESTIONS = 4  # of each task
TOKENS = 24
SAMPLE_SECONDS = 2.0
STOPPED_SECONDS = 0.4  # the whole process, now and then
DRAIN_SECONDS = 60
REFUSED = (429, 503)  # with Retry-After: not wrong, come again
GROWTH = 0.02  # of memory, from the second quarter of the time to the last, that counts as flat
FLOOR = 8 * 2**20  # bytes of growth that an allocator may make of nothing


@dataclass(frozen=True, slots=True)
class Question:
    task: str
    text: str
    mode: str

    def body(self, stream: bool = False) -> dict[str, Any]:
        return {"query": self.text, "task": self.task, "mode": self.mode, "max_tokens": TOKENS, "stream": stream}


@dataclass(slots=True)
class Tally:
    """What happened; shared by all clients."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def blame(self, what: str) -> None:
        with self.lock:
            self.wrong.append(what)


@dataclass(frozen=True, slots=True)
class Sample:
    """Of the service's process at one moment; `anonymous` in bytes."""

    at: float
    anonymous: int
    files: int
    threads: int


@dataclass(frozen=True, slots=True)
class Soaked:
    minutes: float
    answers: int
    refused: int
    faults: dict[str, int]
    wrong: list[str]
    leases_left: int
    p50_s: float
    p99_s: float
    anonymous_early: int  # median of the second quarter of the time
    anonymous_late: int  # of the last
    files_early: int
    files_late: int
    threads_early: int
    threads_late: int

    @property
    def flat(self) -> bool:
        grown = self.anonymous_late - self.anonymous_early
        return grown <= max(FLOOR, GROWTH * self.anonymous_early) and self.files_late <= self.files_early + 4

    @property
    def ok(self) -> bool:
        return not self.wrong and not self.leases_left and self.flat


def bench_soak(minutes: float, clients: int, keep: float, seed: int = 0) -> Soaked:
    """Soak a service of the bundled model under a budget of `keep` of its experts."""
    from demo.commands import memory_for, prepare_store  # noqa: PLC0415 - torch comes along
    from store.home import bundled_model  # noqa: PLC0415

    if minutes <= 0:
        raise InvalidInput(f"A soak takes more than 0 minutes, got {minutes:g}.", param="minutes")
    with tempfile.TemporaryDirectory(prefix="moepager-soak-") as folder:
        url = f"sqlite:///{folder}/store.db"
        prepare_store(url)
        with serving(url, memory_for(bundled_model(), keep), Path(folder) / "serve.log") as client:
            expected = {question: ask(client, question) for question in questions()}
            tally, samples = Tally(), list[Sample]()
            with _sampled(_child(), samples), _troubled(client, _child(), tally, seed):
                _rush(str(client.base_url), expected, tally, minutes, clients, seed)
            return _result(minutes, tally, samples, drained(client))


def questions() -> list[Question]:
    pairs = [(task.name, pair.prompt) for task in TASKS for pair in read_pairs(task.name, "test")[:QUESTIONS]]
    return [Question(task, text, MODES[place % len(MODES)]) for place, (task, text) in enumerate(pairs)]


def ask(client: httpx.Client, question: Question) -> str:
    reply = client.post("/v1/query", json=question.body())
    reply.raise_for_status()
    answer: str = reply.json()["answer"]
    return answer


def _rush(url: str, expected: dict[Question, str], tally: Tally, minutes: float, clients: int, seed: int) -> None:
    end = time.monotonic() + 60 * minutes

    def work(number: int) -> None:
        rng = random.Random(f"{seed}-{number}")
        with httpx.Client(base_url=url, timeout=120) as client:
            while time.monotonic() < end:
                behave(client, rng, expected, tally)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def behave(client: httpx.Client, rng: random.Random, expected: dict[Question, str], tally: Tally) -> None:
    """One thing that a client does."""
    question = rng.choice(list(expected))
    what = rng.choices((_whole, _streamed, _hang_up, _nonsense, _too_much), weights=(50, 30, 12, 5, 3))[0]
    try:
        what(client, rng, question, expected[question], tally)
    except httpx.TransportError as error:
        tally.blame(f"{what.__name__[1:]}: {type(error).__name__} {error}")


def _whole(client: httpx.Client, _rng: random.Random, question: Question, wanted: str, tally: Tally) -> None:
    started = time.monotonic()
    reply = client.post("/v1/query", json=question.body())
    if _refused(reply, tally):
        return
    if reply.status_code != 200 or reply.json()["answer"] != wanted:
        tally.blame(f"{question}: wanted {wanted!r}, got {reply.status_code} {reply.text[:200]}")
    tally.note("answers")
    with tally.lock:
        tally.seconds.append(time.monotonic() - started)


def _streamed(client: httpx.Client, _rng: random.Random, question: Question, wanted: str, tally: Tally) -> None:
    with client.stream("POST", "/v1/query", json=question.body(stream=True)) as reply:
        text = reply.read().decode()
    if _refused(reply, tally):
        return
    done = [frame for frame in text.split("\n\n") if frame.startswith("event: done")]
    answer = json.loads(done[0].split("data: ", 1)[1])["answer"] if done else None
    # Mode auto may only go on exactly from the token where it strays, once tokens are out; a whole answer starts anew.
    if answer is None or (answer != wanted and question.mode != "auto"):
        tally.blame(f"{question}, streamed: wanted {wanted!r}, got {text[-300:]!r}")
    tally.note("answers")


def _hang_up(client: httpx.Client, rng: random.Random, question: Question, _wanted: str, tally: Tally) -> None:
    with client.stream("POST", "/v1/query", json=question.body(stream=True)) as reply:
        if not _refused(reply, tally):
            for count, _ in enumerate(reply.iter_raw()):
                if count >= rng.randrange(4):
                    break
    tally.note("hung up")


def _nonsense(client: httpx.Client, rng: random.Random, question: Question, _wanted: str, tally: Tally) -> None:
    bodies: Sequence[dict[str, Any]] = (
        question.body() | {"mode": "sideways"},
        question.body() | {"task": "no such task"},
        question.body() | {"max_tokens": -1},
        question.body() | {"keep": 2.0},
        {"queery": question.text},
    )
    _turned_away(client, rng.choice(bodies), "nonsense", tally)


def _too_much(client: httpx.Client, _rng: random.Random, question: Question, _wanted: str, tally: Tally) -> None:
    _turned_away(client, question.body() | {"query": question.text * 200}, "too long", tally)


def _turned_away(client: httpx.Client, body: dict[str, Any], what: str, tally: Tally) -> None:
    reply = client.post("/v1/query", json=body)
    if not _refused(reply, tally) and not 400 <= reply.status_code < 500:
        tally.blame(f"a query that was {what} was answered with {reply.status_code}: {reply.text[:200]}")
    tally.note(what)


def _refused(reply: httpx.Response, tally: Tally) -> bool:
    if reply.status_code not in REFUSED:
        return False
    if "retry-after" not in reply.headers:
        tally.blame(f"{reply.status_code} without Retry-After")
    tally.note("refused")
    time.sleep(0.2)
    return True


@contextmanager
def _troubled(client: httpx.Client, process: int, tally: Tally, seed: int) -> Iterator[None]:
    """Faults from outside, every second or so."""

    def evict() -> None:
        client.delete("/v1/residency")

    def reload() -> None:
        client.post("/v1/tasks/reload")

    def halt() -> None:
        os.kill(process, signal.SIGSTOP)
        time.sleep(STOPPED_SECONDS)
        os.kill(process, signal.SIGCONT)

    def work(stop: threading.Event) -> None:
        rng = random.Random(seed)
        deeds: Sequence[tuple[str, Callable[[], None]]] = (("evicted", evict), ("reread", reload), ("stopped", halt))
        while not stop.wait(rng.uniform(0.5, 2.0)):
            name, deed = rng.choice(deeds)
            deed()
            tally.note(name)

    with _beside(work):
        yield


@contextmanager
def _sampled(process: int, samples: list[Sample]) -> Iterator[None]:
    def work(stop: threading.Event) -> None:
        while not stop.wait(SAMPLE_SECONDS):
            samples.append(sample(process))

    with _beside(work):
        yield
    samples.append(sample(process))


@contextmanager
def _beside(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """`work` in a thread for as long as the block; it ends when its event is set."""
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def sample(process: int) -> Sample:
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines() if ":" in line
    )
    anonymous = int(status["RssAnon"].split()[0]) * 1024
    files = len(list(Path(f"/proc/{process}/fd").iterdir()))
    return Sample(time.monotonic(), anonymous, files, int(status["Threads"]))


def _child() -> int:
    """The service: this process has no other child."""
    [child] = {int(one) for file in Path("/proc/self/task").glob("*/children") for one in file.read_text().split()}
    return child


def drained(client: httpx.Client) -> int:
    """How many slots are still leased when nobody asks any more, after waiting for it to be none."""
    deadline = time.monotonic() + DRAIN_SECONDS
    while (left := int(client.get("/v1/residency").json()["leased"])) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def _result(minutes: float, tally: Tally, samples: Sequence[Sample], left: int) -> Soaked:
    quarter = max(1, len(samples) // 4)
    early, late = samples[quarter : 2 * quarter] or samples, samples[-quarter:]
    times = sorted(tally.seconds) or [0.0]
    return Soaked(
        minutes=minutes,
        answers=tally.counts["answers"],
        refused=tally.counts["refused"],
        faults={name: count for name, count in sorted(tally.counts.items()) if name not in ("answers", "refused")},
        wrong=tally.wrong[:20],
        leases_left=left,
        p50_s=median(times),
        p99_s=quantiles(times, n=100)[98] if len(times) > 1 else times[0],
        anonymous_early=round(median(one.anonymous for one in early)),
        anonymous_late=round(median(one.anonymous for one in late)),
        files_early=round(median(one.files for one in early)),
        files_late=round(median(one.files for one in late)),
        threads_early=round(median(one.threads for one in early)),
        threads_late=round(median(one.threads for one in late)),
    )
