"""Jobs by way of Redis: announced to a queue that workers on any machine take them from. The only file that knows rq.

Redis holds names of jobs and nothing else, as JSON, never pickled. It may lose them all: whoever announces looks at the
store every second, and announces again what waits there and is not in the queue.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import FrameType

from redis import Redis, RedisError
from rq import Queue, SimpleWorker
from rq.exceptions import NoSuchJobError, StopRequested
from rq.job import Job as Announcement
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from service.attempt import without_password
from service.context import Opening
from service.jobs import run_here, waiting, work
from service.lookout import Lookout
from service.workshop import Workshop, workshop_of
from store.errors import InvalidInput, MoepagerError, StoreUnreachable

log = logging.getLogger("moepager.service")

CONNECT_SECONDS = 2.0
ANSWER_SECONDS = 5.0  # of a Redis that hangs
RETRY_SECONDS = 1.0
FOREVER = -1  # seconds: a job may take hours, and its row tells whether it lives
HERE = "service.job_queue.perform"


def connect(url: str, answer_seconds: float | None = ANSWER_SECONDS) -> Redis:
    """Raises InvalidInput for what is no URL of a Redis. Whether one answers there shows later. Without
    `answer_seconds` whoever uses it sets a bound: rq's worker does, which waits there for jobs."""
    try:
        return Redis.from_url(
            url, socket_connect_timeout=CONNECT_SECONDS, socket_timeout=answer_seconds, health_check_interval=15
        )
    except ValueError as error:
        raise InvalidInput(f"Not a URL of a Redis: {error}. Write redis://host:6379/0.", param="redis") from None


def queue_of(model: str, redis: Redis) -> Queue:
    """A queue a model: a worker runs the jobs of the model that it was given."""
    return Queue(f"moepager:{model[:16]}", connection=redis, serializer=JSONSerializer)


def workers_of(url: str, model: str) -> int:
    """How many workers wait for a model's jobs, or run one. Raises StoreUnreachable where no Redis answers."""
    try:
        return int(Worker.count(queue=queue_of(model, connect(url))))
    except RedisError as error:
        raise StoreUnreachable(f"No Redis answers at {without_password(url)[0]}: {error}. Start it.") from None


def announce(name: str, queue: Queue) -> None:
    """Put a job's name into the queue, unless it waits there."""
    try:
        known = Announcement.fetch(name, connection=queue.connection, serializer=JSONSerializer)
    except NoSuchJobError:
        known = None
    if known is not None and known.get_status(refresh=False) == JobStatus.QUEUED and name in queue.job_ids:
        return
    if known is not None:  # of a worker that is dead, or of an end that the row does not know: the row is right
        known.delete()
    queue.enqueue_call(HERE, args=(name,), job_id=name, timeout=FOREVER, result_ttl=0, failure_ttl=60)


def courier(redis: Redis, current: Callable[[], Workshop | None]) -> Lookout:
    """Announces what waits in the store. `wake` it after a job was queued. `current` gives None while there is no
    workshop yet."""

    def look(_stop: threading.Event) -> bool:
        try:
            if (workshop := current()) is not None:
                queue = queue_of(workshop.model, redis)
                for job in waiting(workshop):
                    announce(job.id, queue)
        except (RedisError, MoepagerError) as error:  # one of them is away: the rows wait
            log.warning("jobs can't be announced: %s", error)
        return False

    return Lookout("moepager-courier", look)


class Worker(SimpleWorker):
    """rq's worker in this one process. Asked to stop, it stops its job too, and the job's row is put back."""

    workshop: Workshop
    stop: threading.Event

    def handle_warm_shutdown_request(self) -> None:
        self.stop.set()
        super().handle_warm_shutdown_request()  # type: ignore[no-untyped-call]

    def _shutdown(self) -> None:
        try:
            super()._shutdown()  # type: ignore[no-untyped-call]
        except RedisError:  # it wants to note there that it stops
            raise StopRequested from None

    def request_force_stop(self, signum: int, frame: FrameType | None) -> None:
        """A second signal changes nothing: the job is ending already."""


def perform(name: str) -> None:
    """What a worker does with an announcement: the row says whether there is still something to do."""
    workshop = Worker.workshop
    work(name, workshop, Worker.stop)


def run_worker(workshop: Workshop, url: str) -> None:
    """Work until SIGTERM or SIGINT. Redis may come and go."""
    redis = connect(url, None)
    Worker.workshop, Worker.stop = workshop, threading.Event()
    announcing = courier(connect(url), lambda: workshop)
    try:
        while not Worker.stop.is_set():
            try:
                queue = queue_of(workshop.model, redis)
                Worker([queue], connection=redis, serializer=JSONSerializer).work(logging_level="WARNING")
            except RedisError as error:
                log.warning("the worker waits for Redis: %s", error)
            Worker.stop.wait(RETRY_SECONDS)  # unasked it ends only where Redis is away
    finally:
        announcing.close()


def open_jobs(opening: Opening, redis: str | None) -> Lookout:
    """Who is told of queued jobs in a service: its own runner, or a courier to the workers."""
    if redis is None:
        return run_here(opening)
    return courier(connect(redis), lambda: workshop_of(opening.current()) if opening.ready else None)
