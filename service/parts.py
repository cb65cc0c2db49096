"""The composition root: the one place where settings become real parts. Importing it does nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from weakref import WeakSet

from engine.embedder import Embedder, open_embedder
from engine.engine import Engine
from engine.scheduler import Rules
from engine.worker import EngineWorker, TokenStream
from service.discovery import Discovery
from service.disk import show_access
from service.keys import KeyRing
from service.metrics import Metrics
from service.model import engine_config, model_id
from service.retrieval import Retriever, calibrate_threshold
from service.serving import Catalogue, Policy, choose_candidate
from service.sessions import Sessions
from service.settings import Settings
from store.database import Store, open_store
from store.errors import MismatchError
from store.records import GENERALIST, ApiKey
from store.vectors import VectorIndex

log = logging.getLogger("moepager.service")


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything a request needs. Open for as long as the service runs; shared by all threads."""

    settings: Settings
    model_id: str
    engine: Engine
    worker: EngineWorker
    store: Store
    retriever: Retriever
    catalogue: Catalogue
    keys: KeyRing
    metrics: Metrics
    policy: Policy
    sessions: Sessions
    discovery: Discovery
    changes: int  # the store's count of changes when retriever and catalogue were read
    started: int  # seconds since 1970
    tasks: frozenset[str] | None = None  # all that there is for who asks; None: every task
    streams: WeakSet[TokenStream] = field(default_factory=WeakSet)  # of answers under way, and of some that have ended

    _views: dict[frozenset[str], Parts] = field(init=False, default_factory=dict, repr=False, compare=False)

    def seen_by(self, key: ApiKey | None) -> Parts:
        """The same, for a key that is limited to some tasks as if there were no others."""
        if key is None or key.tasks is None:
            return self
        tasks = frozenset(key.tasks)
        if tasks not in self._views:  # made twice where two ask at once, which harms nothing
            retriever = self.retriever.only(tasks, self.settings.threshold)
            self._views[tasks] = replace(self, catalogue=self.catalogue.only(tasks), retriever=retriever, tasks=tasks)
        return self._views[tasks]

    @property
    def folder(self) -> Path:
        return self.engine.card.folder

    @property
    def max_context(self) -> int:
        return self.engine.plan.max_context


@contextmanager
def open_parts(settings: Settings) -> Iterator[Parts]:
    """Open store, embedder, engine and its worker, in the order in which they are cheap to refuse."""
    with ExitStack() as stack:
        config = engine_config(settings)
        store = stack.enter_context(open_store(settings.store))
        embedder = open_embedder(settings.embedder)
        engine = stack.enter_context(Engine.open(config))
        log.info("Kernel of few rows, as in decoding: %s", engine.kernel)
        access = engine.access
        log.log(logging.WARNING if access.why else logging.INFO, "Experts are read %s", show_access(access))
        changes = store.changes.count()  # before the rest: what changes in between is read again
        catalogue = Catalogue.read(store, engine.card.hashes)
        warn_of_doubts(catalogue)
        if orphaned := catalogue.why_orphaned():
            log.warning(orphaned)
        policy = Policy.of(settings, engine.plan)
        if settings.unknown_task == "generalist":  # refused now rather than at the first query that needs it
            choose_candidate(catalogue.named(GENERALIST), settings.keep, settings.scorer, policy)
        retriever = open_retriever(settings, store, embedder, catalogue.retrievable)
        rules = Rules(background_seconds=settings.background_seconds)
        worker = stack.enter_context(EngineWorker(engine, settings.queue_size, rules))
        metrics = Metrics(engine, worker)
        metrics.begin(catalogue.tasks)
        discovery = stack.enter_context(Discovery(store, settings, embedder, metrics, engine.card.fingerprint))
        yield Parts(
            settings=settings,
            model_id=model_id(settings.model, config.model),
            engine=engine,
            worker=worker,
            store=store,
            retriever=retriever,
            catalogue=catalogue,
            keys=KeyRing(store.keys.list()),
            metrics=metrics,
            policy=policy,
            sessions=Sessions(),
            discovery=discovery,
            changes=changes,
            started=int(time.time()),
        )


def reread(parts: Parts) -> Parts:
    """The same parts with the store's tasks as they are now. The old ones stay good for the requests that hold them."""
    changes = parts.store.changes.count()
    catalogue = Catalogue.read(parts.store, parts.engine.card.hashes)
    warn_of_doubts(catalogue, parts.catalogue)
    parts.metrics.begin(catalogue.tasks)
    retriever = open_retriever(parts.settings, parts.store, parts.retriever.embedder, catalogue.retrievable)
    return replace(parts, catalogue=catalogue, retriever=retriever, changes=changes)


def warn_of_doubts(catalogue: Catalogue, before: Catalogue | None = None) -> None:
    """To the operator's log, once a profile: those of `before` were told already."""
    told = {task.profile_id for task in before.tasks.values()} if before else set()
    for task in catalogue.tasks.values():
        if task.profile_id not in told:
            for doubt in task.doubts:
                log.warning("The profile of task %s is served with a doubt: %s", task.name, doubt)


def open_retriever(settings: Settings, store: Store, embedder: Embedder, tasks: Sequence[str]) -> Retriever:
    """Retrieval among the given tasks, and nothing else that the store holds."""
    stored = store.exemplars.list(embedder=embedder.id)
    exemplars = [e for e in stored if e.task in tasks]
    refuse_other_embedder(store, embedder.id, set(tasks) - {e.task for e in exemplars})
    threshold = settings.threshold
    if threshold is None:
        calibration = calibrate_threshold(exemplars)
        log.info("retrieval threshold: %s", calibration)
        threshold = calibration.threshold
    index = VectorIndex.rebuild(stored) if settings.index is None else open_index(settings.index, store, embedder.id)
    return Retriever(embedder, index, threshold, exemplars)


def open_index(folder: Path | None, store: Store, embedder: str) -> VectorIndex:
    """The exemplars of all tasks: a saved index serves every model of the store."""
    if folder is None:
        return VectorIndex.rebuild(store.exemplars.list(embedder=embedder))
    return VectorIndex.load_or_rebuild(store, embedder, folder)


def refuse_other_embedder(store: Store, embedder: str, lacking: set[str]) -> None:
    """A task without exemplars can still be named; one with another embedder's exemplars would never be found."""
    for task in sorted(lacking):
        others = sorted({e.embedder for e in store.exemplars.list(task=task)})
        if others:
            raise MismatchError(
                f"The exemplars of task {task!r} were embedded by {others[0]}, the service embeds with {embedder}. "
                "Serve with that embedder (--embedder), or profile the task again with this one."
            )
