"""Profiling jobs: taken from the store one at a time, run by `moepager profile` in a process of its own.

The row in the store is the truth. A runner that dies leaves a running row behind whose time stands still; any runner of
the same model then takes it up again, and the profiling goes on where its partial sums on disk end. A cancelled row
stops its process, whoever cancelled it.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from service.context import Opening
from service.parts import Parts
from store.errors import MoepagerError
from store.home import default_store_url
from store.records import Exemplar, Job, StoredCorpus

log = logging.getLogger("moepager.service")

IDLE_SECONDS = 1.0  # between two looks for a job
BEAT_SECONDS = 1.0  # between two notes that a job lives
STALE = timedelta(seconds=15)  # without a note: its runner is dead
KILL_SECONDS = 10.0  # for a process to end when it is asked to
LONGEST_DETAIL = 2000


class JobRunner:
    """One thread. `wake` after a job was queued; `close` puts a running job back for the next start."""

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._stop, self._woken = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name="moepager-jobs", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._woken.set()

    def close(self) -> None:
        self._stop.set()
        self._woken.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._stop.is_set():
            try:
                worked = self._opening.ready and self._step(self._opening.current())
            except MoepagerError as error:  # the store is away: the row waits for it
                log.warning("jobs wait: %s", error)
                worked = False
            if not worked:
                self._woken.wait(IDLE_SECONDS)
                self._woken.clear()

    def _step(self, parts: Parts) -> bool:
        """Run the oldest job that waits; whether there was one."""
        jobs = [job for job in parts.store.jobs.list() if job.model == parts.catalogue.model]
        for job in jobs:
            if job.state == "running" and datetime.now(UTC) - job.updated > STALE:
                parts.store.jobs.change(job.id, ["running"], state="queued", detail="taken up again: its runner died")
        waiting = [job for job in reversed(jobs) if job.state == "queued"]
        if not waiting or not parts.store.jobs.change(waiting[0].id, ["queued"], state="running", detail="starting"):
            return False
        self._run(waiting[0], parts)
        return True

    def _run(self, job: Job, parts: Parts) -> None:
        log.info("job %s: profiling %r", job.id, job.task)
        try:
            corpus = parts.store.corpora.get(job.task)
            with tempfile.TemporaryDirectory(prefix="moepager-job-") as folder:
                attempt = Attempt(job, parts, corpus, Path(folder))
                failure = attempt.run(self._stop)
            if failure is None and corpus.exemplars:
                put_exemplars(corpus, parts)
        except (MoepagerError, OSError) as error:  # OSError: no room for the files, or for a process
            failure = str(error)
        if self._stop.is_set() and failure is not None:
            parts.store.jobs.change(job.id, ["running"], state="queued", detail="waits for the next start")
        elif failure is None:
            parts.store.jobs.change(job.id, ["running"], state="done", progress=1.0, detail="in service")
        else:
            log.warning("job %s failed: %s", job.id, failure)
            parts.store.jobs.change(job.id, ["running"], state="failed", detail=failure[-LONGEST_DETAIL:])


class Attempt:
    """One process. Its progress goes into the job's row; that row, or the service's stop, ends it."""

    def __init__(self, job: Job, parts: Parts, corpus: StoredCorpus, folder: Path) -> None:
        self._job, self._parts, self._folder = job, parts, folder
        self._progress, self._detail = job.progress, "starting"
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        write_items(folder / "calibration.jsonl", corpus.calibration or [{"prompt": text} for text in corpus.exemplars])
        write_items(folder / "evaluation.jsonl", corpus.evaluation)

    def run(self, stop: threading.Event) -> str | None:
        """None when it is done; else why not."""
        errors = self._folder / "errors.txt"
        with errors.open("wb") as sink:
            process = subprocess.Popen(  # noqa: S603 - our own module, names and numbers of our own settings
                command(self._job.task, self._parts, self._folder),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, text=True, env=environment(self._parts),
            )  # fmt: skip
            reader = threading.Thread(target=self._read, args=(process,), daemon=True)
            reader.start()
            try:
                ended = self._watch(process, stop)
            finally:
                end(process)
                reader.join()
        if not ended:
            return "stopped"
        if process.returncode:
            said = errors.read_text(errors="replace").strip()[-LONGEST_DETAIL:]
            return said or f"the profiling ended with exit code {process.returncode}"
        return None

    def _watch(self, process: subprocess.Popen[str], stop: threading.Event) -> bool:
        """True when the process has ended by itself; False when it has to."""
        noted = 0.0
        while process.poll() is None:
            if stop.wait(0.05):
                return False
            self._follow()
            if time.monotonic() - noted > BEAT_SECONDS:
                noted = time.monotonic()
                change = self._parts.store.jobs.change
                if not change(self._job.id, ["running"], progress=self._progress, detail=self._detail):
                    return False  # cancelled
        return True

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None, "it is a pipe"
        with process.stdout:
            for line in process.stdout:
                self._lines.put(line)

    def _follow(self) -> None:
        while not self._lines.empty():
            line = self._lines.get()
            if line.startswith('{"progress"'):
                step = json.loads(line)["progress"]
                share = step["done"] / max(step["total"], 1)
                self._progress = min(1.0, share / 2 + (0.5 if step["stage"] == "evaluate" else 0.0))
                self._detail = f"{step['stage']} {step['done']} of {step['total']}"


def end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdin is not None:
        process.stdin.close()


def write_items(path: Path, items: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def command(task: str, parts: Parts, folder: Path) -> list[str]:
    settings, url = parts.settings, parts.settings.store or default_store_url()
    memory = settings.job_memory or settings.memory
    options: dict[str, object] = {
        "--task": task,
        "--description": parts.store.tasks.get(task).description,
        "--calibration": folder / "calibration.jsonl",
        "--eval": folder / "evaluation.jsonl" if (folder / "evaluation.jsonl").stat().st_size else None,
        "--model": parts.folder,
        "--store": without_password(url)[0],
        "--embedder": settings.embedder,
        "--memory": memory,
        "--batch": settings.max_batch,
        "--device": settings.device,
        "--dtype": settings.dtype,
        "--threads": settings.threads,
        "--max-context": settings.max_context,
    }
    given = [f"{name}={value}" for name, value in options.items() if value is not None]  # a value may begin with a dash
    return [sys.executable, "-m", "service", "profile", "--progress-lines", *given]


def environment(parts: Parts) -> dict[str, str]:
    password = without_password(parts.settings.store or default_store_url())[1]
    return {**os.environ, **({"PGPASSWORD": password} if password else {})}


def without_password(url: str) -> tuple[str, str | None]:
    """A database URL as other users of the machine may see it in a list of processes, and its password."""
    split = urlsplit(url)
    if split.password is None:
        return url, None
    user = quote(unquote(split.username or ""), safe="")
    return split._replace(netloc=f"{user}@{split.netloc.rpartition('@')[2]}").geturl(), unquote(split.password)


def put_exemplars(corpus: StoredCorpus, parts: Parts) -> None:
    """The task's own exemplars in the place of those that profiling took from its text."""
    embedder = parts.retriever.embedder
    vectors = embedder.embed(corpus.exemplars)  # [n, d]
    made = [Exemplar(corpus.task, text, v, embedder.id) for text, v in zip(corpus.exemplars, vectors, strict=True)]
    parts.store.exemplars.replace(corpus.task, made)
