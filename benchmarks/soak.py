"""Mixed traffic with faults against a real service for a long time: no wrong answer, nothing left behind, memory flat.

Every answer is compared with what the same service said to that question alone, before the rush (`soak_questions`).
Clients (`soak_traffic`) name tasks and have them found, in mask, exact and auto mode, whole and streamed, in
conversations, bound to a schema, in the background; they hang up, send nonsense and ask for too much. From outside
(`soak_trouble`) experts are evicted, tasks and keys change, the service is drained and stopped for moments, its disk
fails and stalls, and tasks are profiled beside it. At the end every question is asked once more, alone.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import httpx

from benchmarks.soak_questions import questions, talks
from benchmarks.soak_traffic import Clients, Reference, Tally
from benchmarks.soak_trouble import Trouble, beside
from demo.tour import serving
from service.keys import make_key
from store.database import open_store
from store.errors import InvalidInput

SAMPLE_SECONDS = 2.0
DRAIN_SECONDS = 60
TIMEOUT = 120
GROWTH = 0.02  # of memory, from the second quarter of the time to the last, that counts as flat
FLOOR = 8 * 2**20  # bytes of growth that an allocator may make of nothing
SPARE_FILES, SPARE_THREADS = 4, 2
THRESHOLD = 0.4  # fixed: tasks that come and go must not move it
PLAIN = ("answers", "whole", "streamed", "refused")

IDLE = ("moepager_running", "moepager_queue_length", "moepager_slots_leased")


@dataclass(frozen=True, slots=True)
class Sample:
    """Of the service's process at one moment; `anonymous` in bytes."""

    at: float
    anonymous: int
    files: int
    threads: int


@dataclass(frozen=True, slots=True)
class Soaked:
    """`answers` of each kind of question; `left` is what the service still counts when nobody asks any more."""

    minutes: float
    answers: dict[str, int]
    streamed: int
    refused: int
    faults: dict[str, int]
    wrong: list[str]
    left: dict[str, float]
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
        files, threads = self.files_late - self.files_early, self.threads_late - self.threads_early
        memory = grown <= max(FLOOR, GROWTH * self.anonymous_early)
        return memory and files <= SPARE_FILES and threads <= SPARE_THREADS

    @property
    def ok(self) -> bool:
        return not self.wrong and not any(self.left.values()) and self.flat


def bench_soak(minutes: float, clients: int, keep: float, seed: int = 0) -> Soaked:
    """Soak a service of the bundled model under a budget of `keep` of its experts."""
    from demo.commands import memory_for, prepare_store  # noqa: PLC0415 - torch comes along
    from store.home import bundled_model  # noqa: PLC0415

    if minutes <= 0:
        raise InvalidInput(f"A soak takes more than 0 minutes, got {minutes:g}.", param="minutes")
    with tempfile.TemporaryDirectory(prefix="moepager-soak-") as name:
        folder = Path(name)
        url = f"sqlite:///{folder / 'store.db'}"
        prepare_store(url)
        operator, asker = keys_in(url)
        program = ("-m", "benchmarks.faulty_server", str(folder / "disk"))
        memory, options = memory_for(bundled_model(), keep), ("--threshold", str(THRESHOLD))
        with serving(url, memory, folder / "serve.log", program, options) as client:
            client.headers["authorization"] = f"Bearer {operator}"
            tally, samples = Tally(), list[Sample]()
            trouble = Trouble(client, _child(), url, folder / "disk", tally)
            crowd = Clients(Reference.taken(client, questions(), talks()), tally, trouble.disk_failed)
            with _sampled(_child(), samples), trouble.going_on(seed):
                crowd.rush(lambda: _asking(str(client.base_url), asker), 60 * minutes, clients, seed)
            left = leftovers(client)
            crowd.check_all(client)
            errors_logged(folder / "serve.log", tally)
            return _result(minutes, tally, samples, left)


def keys_in(url: str) -> tuple[str, str]:
    """A new operator's key and one that may ask; all clients share the latter, so names alone tell them apart."""
    made = [make_key("soak", role, None) for role in ("operator", "query")]
    with open_store(url) as store:
        for key, _ in made:
            store.keys.put(key)
    return made[0][1], made[1][1]


def _asking(url: str, key: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=TIMEOUT, headers={"authorization": f"Bearer {key}"})


@contextmanager
def _sampled(process: int, samples: list[Sample]) -> Iterator[None]:
    def work(stop: threading.Event) -> None:
        while not stop.wait(SAMPLE_SECONDS):
            samples.append(sample(process))

    with beside(work):
        yield
    samples.append(sample(process))


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


def leftovers(client: httpx.Client) -> dict[str, float]:
    """What the service still counts when nobody asks any more, after waiting for it to be nothing."""
    deadline = time.monotonic() + DRAIN_SECONDS
    while any((left := _idle(client.get("/metrics").text)).values()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def _idle(metrics: str) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#")]
    return {name: sum(float(value) for one, value in lines if one.split("{")[0] == name) for name in IDLE}


def errors_logged(log: Path, tally: Tally) -> None:
    """What the service itself calls a failure of its own is one, whatever its client saw."""
    for line in log.read_text(errors="replace").splitlines():
        if '"level": "error"' in line or "Traceback" in line:
            tally.blame(f"logged: {line[:300]}")


def _result(minutes: float, tally: Tally, samples: Sequence[Sample], left: dict[str, float]) -> Soaked:
    quarter = max(1, len(samples) // 4)
    early, late = samples[quarter : 2 * quarter] or samples, samples[-quarter:]
    times, counts = sorted(tally.seconds) or [0.0], sorted(tally.counts.items())
    return Soaked(
        minutes=minutes,
        answers={name.removeprefix("answers: "): count for name, count in counts if name.startswith("answers")},
        streamed=tally.counts["streamed"],
        refused=tally.counts["refused"],
        faults={name: count for name, count in counts if not name.startswith(PLAIN)},
        wrong=tally.wrong[:20],
        left=left,
        p50_s=median(times),
        p99_s=quantiles(times, n=100)[98] if len(times) > 1 else times[0],
        anonymous_early=round(median(one.anonymous for one in early)),
        anonymous_late=round(median(one.anonymous for one in late)),
        files_early=round(median(one.files for one in early)),
        files_late=round(median(one.files for one in late)),
        threads_early=round(median(one.threads for one in early)),
        threads_late=round(median(one.threads for one in late)),
    )
