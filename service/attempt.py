"""One attempt at a profiling job: `moepager profile` in a process of its own, followed and ended.

Texts reach the process as files of the service's own naming, options as words of the job's own row: no field of a
request names a path.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from service.cli import AWAY, HELD
from service.workshop import Workshop
from store.errors import Held, StoreUnreachable
from store.home import default_store_url
from store.records import GENERALIST, Job, StoredCorpus

BEAT_SECONDS = 1.0  # between two notes that a job lives
KILL_SECONDS = 10.0  # for a process to end when it is asked to
LONGEST_DETAIL = 2000
STAGES = {"answer": 0.0, "calibrate": 0.0, "evaluate": 0.5}  # how far a job is when one begins
OFF_TASK_ITEMS = 8  # of each other task
REPEATED = {
    "scorers": "--scorer",
    "allocators": "--allocator",
    "keeps": "--keep",
    "stand_ins": "--stand-in",
    "active": "--active",
}  # options of a job that are lists


class Attempt:
    """One process. Its progress goes into the job's row; that row, or the service's stop, ends it."""

    def __init__(self, job: Job, workshop: Workshop, corpus: StoredCorpus, folder: Path) -> None:
        self._job, self._workshop, self._folder = job, workshop, folder
        self._progress, self._detail = job.progress, "starting"
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        write_items(folder / "calibration.jsonl", corpus.calibration or [{"prompt": text} for text in corpus.exemplars])
        write_items(folder / "evaluation.jsonl", corpus.evaluation)
        write_items(folder / "others.jsonl", off_task(job, workshop) if job.options.get("off_task") else [])

    def run(self, stop: threading.Event) -> str | None:
        """None when it is done; else why not. Raises StoreUnreachable where the process lost the store,
        and Held where another one is at the same task."""
        errors = self._folder / "errors.txt"
        with errors.open("wb") as sink:
            process = subprocess.Popen(  # noqa: S603 - our own module, names and numbers of our own settings
                command(self._job, self._workshop, self._folder),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, text=True, env=environment(self._workshop),
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
            said = in_settings(errors.read_text(errors="replace").strip())[-LONGEST_DETAIL:]
            if process.returncode == AWAY:
                raise StoreUnreachable(said)
            if process.returncode == HELD:
                raise Held(said)
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
                if not self._note():
                    return False  # cancelled, or taken up by another runner
        return True

    def _note(self) -> bool:
        change, job = self._workshop.store.jobs.change, self._job
        return change(job.id, ["running"], attempt=job.attempt, progress=self._progress, detail=self._detail)

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
                begun = STAGES[step["stage"]]
                self._progress = min(1.0, begun + share * (1.0 - begun) / 2)
                self._detail = f"{step['stage']} {step['done']} of {step['total']}"


def in_settings(said: str) -> str:
    """What the process said of its memory, in the name by which the operator of a service gives it."""
    return said.replace("--memory", "MOEPAGER_JOB_MEMORY")


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


def command(job: Job, workshop: Workshop, folder: Path) -> list[str]:
    settings, url = workshop.settings, workshop.settings.store or default_store_url()
    memory = settings.job_memory or settings.memory
    options: dict[str, object] = {
        "--task": job.task,
        "--description": workshop.store.tasks.get(job.task).description if job.task != GENERALIST else None,
        "--calibration": folder / "calibration.jsonl" if job.task != GENERALIST else None,
        "--eval": _unless_empty(folder / "evaluation.jsonl"),
        "--others": _unless_empty(folder / "others.jsonl"),
        "--model": workshop.folder,
        "--fingerprint": job.model,
        "--store": without_password(url)[0],
        "--embedder": settings.embedder,
        "--memory": memory,
        "--batch": settings.max_batch,
        "--device": settings.device,
        "--dtype": settings.dtype,
        "--threads": settings.threads,
        "--max-context": settings.max_context,
        "--own-answers": job.options.get("own_answers"),
        "--draws": job.options.get("draws"),
    }
    given = [f"{name}={value}" for name, value in options.items() if value is not None]  # a value may begin with a dash
    chosen = ["--search"] if job.options.get("search") else []
    return [sys.executable, "-m", "service", "profile", "--progress-lines", *given, *chosen, *repeated(job)]


def off_task(job: Job, workshop: Workshop) -> list[Mapping[str, object]]:
    """The first evaluation items of every other task of the store: what the job's selections cost off their task."""
    corpora = workshop.store.corpora
    texts = [corpora.get(name) for name in sorted(corpora.tasks() - {job.task, GENERALIST})]
    return [item for text in texts for item in text.evaluation[:OFF_TASK_ITEMS]]


def _unless_empty(file: Path) -> Path | None:
    return file if file.exists() and file.stat().st_size else None


def repeated(job: Job) -> Iterator[str]:
    for field, name in REPEATED.items():
        yield from (f"{name}={value}" for value in job.options.get(field) or ())


def environment(workshop: Workshop) -> dict[str, str]:
    password = without_password(workshop.settings.store or default_store_url())[1]
    return {**os.environ, **({"PGPASSWORD": password} if password else {})}


def without_password(url: str) -> tuple[str, str | None]:
    """A database URL as other users of the machine may see it in a list of processes, and its password."""
    split = urlsplit(url)
    if split.password is None:
        return url, None
    user = quote(unquote(split.username or ""), safe="")
    return split._replace(netloc=f"{user}@{split.netloc.rpartition('@')[2]}").geturl(), unquote(split.password)
