"""Tasks and keys that change in the store while the service runs: noticed by a count, read in a thread, then swapped.

Parts are immutable, so a request keeps the ones it began with; only the next request sees the new ones.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from service.context import Opening
from service.keys import KeyRing
from service.parts import Parts, reread
from store.errors import Busy, MoepagerError, StoreUnreachable

log = logging.getLogger("moepager.service")

PASSING = (StoreUnreachable, Busy)  # what trying again may mend, though nothing changes in the store


class Reloader:
    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._lock = asyncio.Lock()
        self._tried = -1  # the count at which the store held what can't be served: not tried again until it changes

    async def reload(self) -> Parts:
        """Read the store now. Raises what is wrong with it; what was served goes on being served then."""
        async with self._lock:
            count, parts = await asyncio.to_thread(_with_keys, self._opening.current())
            self._opening.opened(parts)  # a revoked key is out even where the rest can't be read
            try:
                parts = await asyncio.to_thread(reread, parts)
            except MoepagerError as error:
                if not isinstance(error, PASSING):
                    self._tried = count
                raise
            self._opening.opened(parts)
        log.info("tasks in service: %s", ", ".join(sorted(parts.catalogue.tasks)) or "none")
        return parts

    async def watch(self) -> None:
        """Reload whenever the store's count has moved. Ends only by being cancelled."""
        while True:
            await asyncio.sleep(self._opening.interval)
            try:
                await self._look()
                self._opening.lost = None
            except MoepagerError as error:
                self._opening.lost = error if isinstance(error, StoreUnreachable) else None
                log.warning("the store could not be read again; what was read before is served: %s", error)
            except Exception:  # a bug of ours must not end the looking: revoked keys would work for ever
                log.exception("the look at the store failed; what was read before is served, and it is tried again")

    async def _look(self) -> None:
        if not self._opening.ready:
            return
        parts = self._opening.current()
        count = await asyncio.to_thread(parts.store.changes.count)
        if count not in (parts.changes, self._tried):
            await self.reload()


def _with_keys(parts: Parts) -> tuple[int, Parts]:
    """The count of changes, and the parts with the store's keys, which are at least as new as that count."""
    count = parts.store.changes.count()
    return count, replace(parts, keys=KeyRing(parts.store.keys.list()))
