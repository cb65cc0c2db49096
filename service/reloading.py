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
from store.errors import MoepagerError, StoreUnreachable

log = logging.getLogger("moepager.service")


class Reloader:
    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._lock = asyncio.Lock()
        self._tried = -1  # the count at the last attempt: what could not be read is not tried again until it changes

    async def reload(self) -> Parts:
        """Read the store now. Raises what is wrong with it; what was served goes on being served then."""
        async with self._lock:
            parts = self._opening.current()
            self._tried = parts.changes
            keys = KeyRing(await asyncio.to_thread(parts.store.keys.list))
            parts = replace(parts, keys=keys)
            self._opening.opened(parts)  # a revoked key is out even where the rest can't be read
            parts = await asyncio.to_thread(reread, parts)
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

    async def _look(self) -> None:
        if not self._opening.ready:
            return
        parts = self._opening.current()
        count = await asyncio.to_thread(parts.store.changes.count)
        if count not in (parts.changes, self._tried):
            try:
                await self.reload()
            finally:
                self._tried = count
