"""Profiling jobs: claimed in the store, so that of two runners one gets a job, and run one at a time.

The row in the store is the truth. A runner that dies leaves a running row behind whose time stands still; any runner of
the same model then takes it up again, a few times, and the profiling goes on where its partial sums on disk end. Every
note carries the number of its attempt: a runner that stood still and wakes can change nothing. A cancelled row
stops its process, whoever cancelled it.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from service.attempt import LONGEST_DETAIL, Attempt
from service.context import Opening
from service.job_folder import job_folder
from service.lookout import Lookout
from service.workshop import Workshop, workshop_of
from store.database import Store
from store.errors import Conflict, Held, MoepagerError, NotFound, StoreUnreachable
from store.records import GENERALIST, Exemplar, Job, JobState, StoredCorpus

log = logging.getLogger("moepager.service")

ACTIVE: tuple[JobState, ...] = ("queued", "running")
STALE = timedelta(seconds=15)  # without a note: its runner is dead
MOST_DEATHS = 3  # of a job's runners: whatever kills them would kill the next one


def queue_job(store: Store, model: str, task: str, options: Mapping[str, Any], key: str | None = None) -> Job:
    """A new job of the task, or, asked again with the same idempotency `key`, the job of the first time.

    Raises NotFound for a task without text, Conflict where a job of the task has not ended, and for a key that was
    used for something else.
    """
    if key is not None and (known := _asked_before(store, key, model, task, options)) is not None:
        return known
    if task != GENERALIST:
        store.corpora.get(task)
    job = new_job(model, task, options, key)
    try:
        refuse_active(store, task)
        store.jobs.put(job)
    except Conflict:  # of an older job, of the same request at once, or of another that came between our look and put
        if key is not None and (known := _asked_before(store, key, model, task, options)) is not None:
            return known
        refuse_active(store, task)  # in words that name the job
        raise
    return job


def new_job(model: str, task: str, options: Mapping[str, Any], key: str | None) -> Job:
    """One that is not in the store yet."""
    name = f"job-{uuid.uuid4().hex}" if key is None else _name_by(key)
    now = datetime.now(UTC)
    return Job(name, model, task, "queued", 0.0, "waits for its turn", now, now, options)


def job_named(store: Store, key: str) -> Job | None:
    """The job that was queued with this idempotency key, if one was."""
    try:
        return store.jobs.get(_name_by(key))
    except NotFound:
        return None


def _name_by(key: str) -> str:
    return f"job-{hashlib.sha256(key.encode()).hexdigest()[:32]}"


def _asked_before(store: Store, key: str, model: str, task: str, options: Mapping[str, Any]) -> Job | None:
    job = job_named(store, key)
    if job is None:
        return None
    if (job.model, job.task, dict(job.options)) != (model, task, dict(options)):
        raise Conflict(
            f"This Idempotency-Key was used for job {job.id} of task {job.task!r} with other options. Send a key of "
            "its own with every new request."
        )
    return job


def refuse_active(store: Store, task: str) -> None:
    for job in store.jobs.list(ACTIVE):
        if job.task == task:
            raise Conflict(f"Job {job.id} of task {task!r} is {job.state}. Wait for its end, or cancel it.")


def waiting(workshop: Workshop) -> Sequence[Job]:
    """The model's queued jobs, the oldest first, among them those whose runner is dead: they are queued again."""
    workshop.store.jobs.revive(workshop.model, STALE, MOST_DEATHS)
    queued = workshop.store.jobs.list(["queued"])
    return [job for job in reversed(queued) if job.model == workshop.model]


def work(name: str, workshop: Workshop, stop: threading.Event) -> bool:
    """Run the job, if nobody else has it; whether to look for more at once. It is put back when `stop` is set, and
    where another process is at the same task. Whoever was thought dead and was not changes nothing: the attempt is
    another's.
    """
    if (job := workshop.store.jobs.claim(name)) is None:
        return False
    log.info("job %s: profiling %r", job.id, job.task)
    change = partial(workshop.store.jobs.change, job.id, ["running"], attempt=job.attempt)
    try:
        failure = _attempt(job, workshop, stop)
    except StoreUnreachable:  # no failure of the job. Where the store is still away, its row stands still and is found
        change(state="queued", detail="waits for the store")
        raise
    except Held as error:
        change(state="queued", detail=f"waits: {error}"[:LONGEST_DETAIL])
        return False
    if stop.is_set() and failure is not None:
        change(state="queued", detail="waits for the next start")
    elif failure is None:
        change(state="done", progress=1.0, detail=_ending(job, workshop.store))
    elif change(state="failed", detail=failure[-LONGEST_DETAIL:]):
        log.warning("job %s failed: %s", job.id, failure)
    return True


def _ending(job: Job, store: Store) -> str:
    """What the profile is good for: without evaluation text nothing was measured, so nothing may be left out."""
    if job.task == GENERALIST or store.corpora.get(job.task).evaluation:
        return "in service"
    return (
        "in service; the task has no evaluation text, so no size has evidence and exact mode alone serves this profile"
    )


def _attempt(job: Job, workshop: Workshop, stop: threading.Event) -> str | None:
    """None when it is done; else why not. Raises StoreUnreachable and Held: neither is a failure of the job."""
    try:
        corpus = (
            StoredCorpus(GENERALIST, (), (), ()) if job.task == GENERALIST else workshop.store.corpora.get(job.task)
        )
        with job_folder() as folder:
            failure = Attempt(job, workshop, corpus, folder).run(stop)
        if failure is None and corpus.exemplars:
            put_exemplars(corpus, workshop)
    except (StoreUnreachable, Held):
        raise
    except (MoepagerError, OSError) as error:  # OSError: no room for the files, or for a process
        return str(error)
    return failure


def put_exemplars(corpus: StoredCorpus, workshop: Workshop) -> None:
    """The task's own exemplars in the place of those that profiling took from its text."""
    vectors = workshop.embedder.embed(corpus.exemplars)  # [n, d]
    made = [
        Exemplar(corpus.task, text, v, workshop.embedder.id) for text, v in zip(corpus.exemplars, vectors, strict=True)
    ]
    workshop.store.exemplars.replace(corpus.task, made)


def run_here(opening: Opening) -> Lookout:
    """Runs jobs in a thread of the service. `wake` it after a job was queued; `close` puts a running job back."""

    def look(stop: threading.Event) -> bool:
        """Run the oldest job that waits; whether there was one."""
        try:
            if not opening.ready:
                return False
            workshop = workshop_of(opening.current())
            jobs = waiting(workshop)
            return bool(jobs) and work(jobs[0].id, workshop, stop)
        except MoepagerError as error:  # the store is away: the row waits for it
            log.warning("jobs wait: %s", error)
            return False

    return Lookout("moepager-jobs", look)
