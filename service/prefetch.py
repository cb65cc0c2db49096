"""Experts ahead of the first query: a task's selection is paged in as for a request of one token, whose answer nobody
reads. So the engine's own rules hold: what runs goes on beside the reads, and no leased expert gives way."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

from engine.requests import FinishedEvent, GenerationRequest, Sampling, Served
from engine.worker import TokenStream
from service.parts import Parts
from service.serving import Candidate, choose_candidate
from store.errors import Busy, TimedOut

log = logging.getLogger("moepager.service")

PROMPT = (0,)  # any token: what is said to it is thrown away


@dataclass(frozen=True, slots=True)
class Prefetched:
    task: str
    candidate: Candidate
    served: Served

    def json(self) -> dict[str, Any]:
        stored = self.candidate.stored
        return {
            "task": self.task,
            "selection": stored.id,
            "keep": stored.keep,
            "experts": self.served.experts,
            "experts_paged": self.served.experts_paged,
            "bytes_paged": self.served.bytes_paged,
            "swap_ms": self.served.swap_ms,
            "queue_ms": self.served.queue_ms,
        }


async def prefetch(task: str, keep: float | None, scorer: str | None, active: float | None, parts: Parts) -> Prefetched:
    """Raises what a request of the task would, Busy where its experts do not fit beside those that requests hold now,
    and TimedOut."""
    policy = parts.policy
    named = parts.catalogue.named(task)
    candidate = choose_candidate(named, keep or policy.keep, scorer or policy.scorer, policy, active)
    selection = candidate.stored.selection
    if not parts.engine.admission.has_room(selection, spare=False):
        raise Busy(
            f"The {len(selection)} experts of task {task!r} do not fit beside those that running requests hold, and "
            "nobody is made to wait for a prefetch. Try again when fewer run, or name a smaller `keep`."
        )
    request = GenerationRequest(PROMPT, selection, "mask", Sampling(max_tokens=1, ignore_eos=True))
    stream = parts.worker.submit(request)
    parts.streams.add(stream)
    try:
        async with asyncio.timeout(parts.settings.request_timeout):
            served = await _served(stream)
    except TimeoutError:
        raise TimedOut(
            f"The experts of task {task!r} were not there within {parts.settings.request_timeout:g} s. Try when the "
            "service is less busy, or raise MOEPAGER_REQUEST_TIMEOUT."
        ) from None
    finally:
        stream.cancel()
    log.info("prefetched task %s: %d experts, %d of them paged in", task, served.experts, served.experts_paged)
    return Prefetched(task, candidate, served)


async def _served(stream: TokenStream) -> Served:
    async for event in stream:
        if isinstance(event, FinishedEvent):
            if event.reason == "cancelled":
                raise Busy("The prefetch was cancelled: the service is stopping. Try again.")
            return event.served
    raise AssertionError("a token stream ends with a FinishedEvent")
