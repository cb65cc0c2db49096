"""A conversation keeps its task until its queries drift. Pure choices and a bounded memory; nothing is stored.

Kept: while the task is still near enough to the query, even where another is nearer, and through a few queries that are
near to none ("shorter, please"). Left: as soon as another task is near enough and the old one is not, or when the
patience is over. In memory only: after a restart a conversation is retrieved anew.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Container
from dataclasses import dataclass, replace

from service.callers import Caller
from service.retrieval import Retrieval

MOST = 10_000  # conversations; the one that was silent for longest is forgotten first
IDLE_SECONDS = 3600.0
PATIENCE = 3  # queries in a row that retrieval alone would have decided otherwise


@dataclass(frozen=True, slots=True)
class Kept:
    task: str
    strays: int  # queries in a row that were kept against what was retrieved
    seen: float


class Sessions:
    """Shared by all threads."""

    def __init__(self, most: int = MOST, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def decide(self, caller: Caller, found: Retrieval, tasks: Container[str]) -> Retrieval:
        """`found`, or the task of the conversation, if it is still among `tasks`, with the reason "session".

        What runs in the background (a title of the conversation) follows its task and changes nothing.
        """
        if caller.session is None:
            return found
        with self._lock:
            kept = None if caller.begins else self._of(caller.session, tasks)
            background = caller.priority == "background"
            decided, strays = _follow(found, kept) if background else _decide(found, kept)
            if not background:
                self._keep(caller.session, decided.task, strays)
            return decided

    def note(self, caller: Caller, task: str) -> None:
        """The request named its task: the conversation goes on with it."""
        if caller.session is not None and caller.priority != "background":
            with self._lock:
                self._keep(caller.session, task, 0)

    def _of(self, session: str, tasks: Container[str]) -> Kept | None:
        kept = self._kept.get(session)
        if kept is None or kept.task not in tasks or self._clock() - kept.seen > IDLE_SECONDS:
            return None
        return kept

    def _keep(self, session: str, task: str | None, strays: int) -> None:
        self._kept.pop(session, None)
        if task is not None:
            self._kept[session] = Kept(task, strays, self._clock())
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)


def _decide(found: Retrieval, kept: Kept | None) -> tuple[Retrieval, int]:
    if kept is None or found.task == kept.task:
        return found, 0
    similarity = _similarity(found, kept.task)
    near = similarity is not None and similarity >= found.threshold
    if kept.strays >= PATIENCE or (found.task is not None and not near):
        return found, 0
    return replace(found, task=kept.task, similarity=similarity, reason="session"), kept.strays + 1


def _follow(found: Retrieval, kept: Kept | None) -> tuple[Retrieval, int]:
    if kept is None or found.task == kept.task:
        return found, 0
    return replace(found, task=kept.task, similarity=_similarity(found, kept.task), reason="session"), 0


def _similarity(found: Retrieval, task: str) -> float | None:
    return next((ranked.similarity for ranked in found.ranked if ranked.task == task), None)
