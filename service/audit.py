"""Keeps the audit of retrieval to the days that its operator wants: looks at it every hour."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta

from service.context import Opening
from service.parts import Parts

log = logging.getLogger("moepager.service")

LOOK_SECONDS = 3600.0


async def keep_audit(opening: Opening) -> None:
    """Forget old decisions, again and again. Ends only by being cancelled."""
    while True:
        if not opening.ready:
            await asyncio.sleep(opening.interval)
            continue
        try:
            await asyncio.to_thread(forget_old, opening.current())
        except Exception as error:  # the store is away, or a bug: the next look makes up for it
            log.warning("old decisions could not be forgotten: %s", error)
        await asyncio.sleep(LOOK_SECONDS)


def forget_old(parts: Parts) -> None:
    days = parts.settings.audit_days
    count = parts.store.decisions.forget(datetime.now(UTC) - timedelta(days=days))
    if count:
        log.info("forgot %d decisions that were older than %d days", count, days)
