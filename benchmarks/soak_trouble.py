"""What a soak does to a service from outside: evictions, reloads, drains, halts, a failing disk, keys, and jobs."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from benchmarks.faulty_server import EIO, STALL
from benchmarks.soak_traffic import Tally
from service.keys import make_key
from store.database import open_store

STOPPED_SECONDS = 0.4  # the whole process
DRAINED_SECONDS = 0.3
DISK_SECONDS = (0.1, 0.6)  # that it fails, or stalls
FORGIVEN_SECONDS = 20.0  # after the disk failed a request may still tell of it: it waited in the queue meanwhile
KEY_SECONDS = 20.0  # for a new key to be known, and a revoked one to be forgotten
JOB_SECONDS = 150.0  # between two jobs
JOB_PATIENCE = 600.0
TASK = "soak"
STRANGE = ["zq xv wk jj", "vv qq zz xk", "kx zz jq wv", "qz vx kk jw", "wq zk xx vj", "jz kq vw xz"]  # near to nothing


class Trouble:
    """`control` is the file that tells the service's disk to fail; `client` is an operator's."""

    def __init__(self, client: httpx.Client, process: int, store: str, control: Path, tally: Tally) -> None:
        self._client, self._process, self._store, self._control = client, process, store, control
        self._tally = tally
        self._failed_at = float("-inf")
        self._rng = random.Random(0)

    def disk_failed(self) -> bool:
        return time.monotonic() - self._failed_at < FORGIVEN_SECONDS

    @contextmanager
    def going_on(self, seed: int) -> Iterator[None]:
        """Every second or so one deed, and now and then a job, for as long as the block."""
        self._rng = random.Random(seed)
        with ExitStack() as stack:
            stack.enter_context(beside(self._deeds))
            stack.enter_context(beside(self._jobs))
            yield

    def _deeds(self, stop: threading.Event) -> None:
        deeds: Sequence[tuple[str, Callable[[], None]]] = (
            ("evicted", self._evict),
            ("reread", self._reread),
            ("stopped", self._halt),
            ("disk failed", self._fail),
            ("disk stalled", self._stall),
            ("drained", self._drain),
            ("keys changed", self._change_keys),
        )
        while not stop.wait(self._rng.uniform(0.5, 2.0)):
            name, deed = self._rng.choice(deeds)
            try:
                deed()
            except httpx.HTTPError as error:
                self._tally.blame(f"{name}: {type(error).__name__} {error}")
            self._tally.note(name)

    def _evict(self) -> None:
        self._told(self._client.delete("/v1/residency"))

    def _reread(self) -> None:
        self._told(self._client.post("/v1/tasks/reload"))

    def _halt(self) -> None:
        os.kill(self._process, signal.SIGSTOP)
        time.sleep(STOPPED_SECONDS)
        os.kill(self._process, signal.SIGCONT)

    def _fail(self) -> None:
        self._failed_at = float("inf")
        try:
            self._disk(EIO)
        finally:
            self._failed_at = time.monotonic()

    def _stall(self) -> None:
        self._disk(STALL)

    def _disk(self, word: str) -> None:
        self._control.write_text(word)
        time.sleep(self._rng.uniform(*DISK_SECONDS))
        self._control.unlink()

    def _drain(self) -> None:
        self._client.post("/v1/drain").raise_for_status()
        time.sleep(DRAINED_SECONDS)
        self._client.delete("/v1/drain").raise_for_status()

    def _change_keys(self) -> None:
        """A new key is known soon, and once revoked it is nobody's."""
        key, secret = make_key("guest", "query", None)
        with open_store(self._store) as store:
            store.keys.put(key)
            self._wait_for(secret, 200)
            store.keys.delete(key.id)
        self._wait_for(secret, 401)

    def _wait_for(self, secret: str, status: int) -> None:
        deadline, headers = time.monotonic() + KEY_SECONDS, {"authorization": f"Bearer {secret}"}
        while (found := self._client.get("/v1/models", headers=headers).status_code) != status:
            if time.monotonic() > deadline:
                self._tally.blame(f"a key was answered with {found} after {KEY_SECONDS:g} s, wanted {status}")
                return
            time.sleep(0.2)

    def _told(self, reply: httpx.Response) -> None:
        """Refusals are no fault: a full queue, a drain, a disk that fails."""
        if reply.is_error and reply.status_code != 503:
            self._tally.blame(f"{reply.request.method} {reply.url.path}: {reply.status_code} {reply.text[:200]}")

    def _jobs(self, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                self._profile(stop)
            except httpx.HTTPError as error:
                self._tally.blame(f"job: {type(error).__name__} {error}")
            stop.wait(JOB_SECONDS)

    def _profile(self, stop: threading.Event) -> None:
        """A task that nobody's query is near is made, profiled, and deleted again; at the end it is cancelled."""
        self._insist("POST", "/v1/tasks", {"name": TASK, "exemplars": STRANGE})
        job = self._insist("POST", "/v1/jobs", {"task": TASK})["id"]
        deadline, state = time.monotonic() + JOB_PATIENCE, "queued"
        while state in ("queued", "running") and time.monotonic() < deadline and not stop.wait(0.5):
            found = self._insist("GET", f"/v1/jobs/{job}")
            state = found["state"]
        if stop.is_set() and state in ("queued", "running"):
            self._client.delete(f"/v1/jobs/{job}")
        elif state != "done":
            self._tally.blame(f"a job ended as {state}: {found}")
        else:
            self._tally.note("jobs done")
        self._insist("DELETE", f"/v1/tasks/{TASK}")

    def _insist(self, method: str, path: str, body: object = None) -> dict[str, str]:
        """Again where the service takes no work at the moment."""
        deadline = time.monotonic() + KEY_SECONDS
        while (reply := self._client.request(method, path, json=body)).status_code in (409, 503):
            if time.monotonic() > deadline:
                break
            time.sleep(0.3)
        reply.raise_for_status()
        said: dict[str, str] = reply.json() if reply.content else {}
        return said


@contextmanager
def beside(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """`work` in a thread for as long as the block; it ends when its event is set."""
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
