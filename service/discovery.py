"""What a service notices about its traffic: queries that belong to no task, and tasks whose traffic changes.

Queries are kept only where the operator chose to, redacted, up to a bound. An alarm of drift becomes an event in the
store; while it rings, that task's queries are kept like those that are near no task, for they may be a new one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from engine.embedder import Embedder
from engine.requests import FinishedEvent, Served
from service.drift import Alarm, DriftWatch
from service.metrics import Metrics
from service.proposals import Proposal, Proposer
from service.redaction import redact
from service.retrieval import Retrieval
from service.serving import Serving
from service.settings import Settings
from store.database import Store
from store.errors import MoepagerError
from store.records import Event, UnmatchedQuery

log = logging.getLogger("moepager.service")

MOST_KEPT = 4096  # characters of a query that is kept


class Discovery:
    """One a service. Use as a context: at its end, events under way are written."""

    def __init__(self, store: Store, settings: Settings, embedder: Embedder, metrics: Metrics, model: str) -> None:
        self._store, self._metrics, self._model = store, metrics, model
        self._limit, self._pattern = settings.keep_unmatched, settings.redact
        self._embedder, self._proposer = embedder, Proposer(embedder)
        self._drift = DriftWatch(self._alarmed)
        self._writer = ThreadPoolExecutor(1, "moepager-events")
        self._grouper = ThreadPoolExecutor(1, "moepager-proposals")  # who waits for groups takes no query's thread

    def __enter__(self) -> Discovery:
        return self

    def __exit__(self, *_: object) -> None:
        self._grouper.shutdown(cancel_futures=True)
        self._writer.shutdown()

    def asked(self, text: str | None, retrieval: Retrieval) -> None:
        """Keep the query where it may belong to a new task. Touches the store: call it in a thread."""
        new = retrieval.task is None or self._drift.drifting(retrieval.task)
        if not (self._limit and new and text is not None and text.strip()):
            return
        try:
            # Cut twice: redaction of a long text takes long, and what is redacted is to be cut, not half of it shown.
            kept = redact(text[: 2 * MOST_KEPT], self._pattern)[:MOST_KEPT]
            self._store.unmatched.add(kept, retrieval.similarity, self._limit)
        except MoepagerError as error:  # a query is answered whether it is kept or not
            log.warning("a query of no task could not be kept: %s", error)

    def served(self, serving: Serving, finished: FinishedEvent) -> None:
        """Watch the coverage of what a task's own profile served, in modes mask and auto."""
        task = serving.retrieval.task
        if task is not None and serving.mode != "exact" and serving.served_task == task and serving.profile_id:
            self._drift.observe(task, serving.profile_id, _inside(finished.served))

    def kept(self) -> Sequence[UnmatchedQuery]:
        return self._store.unmatched.list()

    def proposals(self) -> list[Proposal]:
        """Groups among the queries kept. Embeds those that are new: call it in a thread."""
        return self._grouper.submit(self._proposals).result()

    async def grouped(self) -> list[Proposal]:
        """The same, for a coroutine, which waits in no thread."""
        return await asyncio.wrap_future(self._grouper.submit(self._proposals))

    def _proposals(self) -> list[Proposal]:
        return self._proposer.propose(self.kept(), self._store.exemplars.list(embedder=self._embedder.id))

    def _alarmed(self, alarm: Alarm) -> None:
        self._metrics.drifted(alarm.task)
        detail = (
            f"Router weight outside the selection rose to {alarm.level:.3f}; {alarm.requests} requests before stayed "
            f"under {alarm.bound:.3f}. Look at the task's newest queries: its profile may not fit them any more."
        )
        log.warning("task %s drifts: %s", alarm.task, detail)
        event = Event("drift", self._model, alarm.task, alarm.level, alarm.bound, detail, datetime.now(UTC))
        self._writer.submit(self._write, event)

    def _write(self, event: Event) -> None:
        try:
            self._store.events.add(event)
        except MoepagerError as error:  # it is in the log and the metrics already
            log.warning("the event could not be stored: %s", error)


def _inside(served: Served) -> float:
    """An escalated answer is as far outside as what the guard stopped it for: the part before looked well."""
    return served.coverage if served.escalated is None else served.escalated.coverage
