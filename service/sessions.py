"""A conversation keeps its task until its queries drift. Pure choices and a bounded memory; nothing is stored.

Kept: while the task is still near enough to the query, even where another is nearer, and through a few queries that are
near to none ("shorter, please"). Left: as soon as another task is near enough and the old one is not, or when the
patience is over. In memory only: after a restart a conversation is retrieved anew.

A conversation has a name, or is known by what was said in it (`passages`): then each of our answers is a place from
which it may go on, and what was decided for a query is kept once it is answered.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

from service.callers import Caller
from service.retrieval import Retrieval

MOST = 20_000  # names and places in conversations; what was silent for longest is forgotten first
IDLE_SECONDS = 3600.0
PATIENCE = 3  # queries in a row that retrieval alone would have decided otherwise


@dataclass(frozen=True, slots=True)
class Kept:
    task: str | None
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
        if caller.session is None and caller.passage is None:
            return found
        with self._lock:
            kept = self._of(caller, tasks)
            background = caller.priority == "background"
            decided, strays = _follow(found, kept) if background else _decide(found, kept)
            if not background:
                self._keep(caller, decided.task, strays)
            return decided

    def note(self, caller: Caller, task: str) -> None:
        """The request named its task: the conversation goes on with it."""
        if caller.priority != "background":
            with self._lock:
                self._keep(caller, task, 0)

    def answered(self, caller: Caller, answer: Mapping[str, Any]) -> None:
        """The assistant's message that the client is given: a conversation without a name may go on from it."""
        if caller.passage is not None and caller.passage.kept is not None:
            with self._lock:
                for name in caller.passage.answered(answer):
                    self._put(name, caller.passage.kept)

    def _of(self, caller: Caller, tasks: Container[str]) -> Kept | None:
        names = caller.passage.answers if caller.passage else (caller.session or "",)
        kept = next((self._kept[name] for name in names if name in self._kept), None)
        if kept is None or kept.task is None or kept.task not in tasks or self._clock() - kept.seen > IDLE_SECONDS:
            return None
        return kept

    def _keep(self, caller: Caller, task: str | None, strays: int) -> None:
        kept = Kept(task, strays, self._clock())
        if caller.passage is not None:
            caller.passage.kept = kept
        elif caller.session is not None:
            self._put(caller.session, kept)

    def _put(self, name: str, kept: Kept) -> None:
        self._kept.pop(name, None)
        self._kept[name] = kept
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)


def _decide(found: Retrieval, kept: Kept | None) -> tuple[Retrieval, int]:
    if kept is None or kept.task is None or found.task == kept.task:
        return found, 0
    similarity = _similarity(found, kept.task)
    near = similarity is not None and similarity >= found.threshold
    if kept.strays >= PATIENCE or (found.task is not None and not near):
        return found, 0
    return replace(found, task=kept.task, similarity=similarity, reason="session"), kept.strays + 1


def _follow(found: Retrieval, kept: Kept | None) -> tuple[Retrieval, int]:
    if kept is None or kept.task is None or found.task == kept.task:
        return found, 0
    return replace(found, task=kept.task, similarity=_similarity(found, kept.task), reason="session"), 0


def _similarity(found: Retrieval, task: str) -> float | None:
    return next((ranked.similarity for ranked in found.ranked if ranked.task == task), None)
