"""OpenAI's streams: events of the engine in, frames out, with usage where it is asked for and `[DONE]` at the end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from engine.requests import Event, FinishedEvent
from service.replies import Reply, delta_choice, text_choice, token_usage, usage
from service.running import Running, merged
from service.schemas import StreamOptions
from service.sse import DONE, PING, data_frame

Choices = Callable[[int, Event], list[dict[str, Any]]]  # of one event of one prompt; none: nothing to show yet


async def stream_frames(
    reply: Reply, running: Sequence[Running], options: StreamOptions | None, choices: Choices
) -> AsyncIterator[bytes]:
    """The chunk that ends a choice also carries its receipt, for usage comes only where it is asked for."""
    options = options or StreamOptions()
    finished: dict[int, FinishedEvent] = {}
    counts = [0] * len(running)
    async for found in merged(running):
        if found is None:
            yield PING
            continue
        place, event = found
        more: dict[str, object] = {}
        if isinstance(event, FinishedEvent):
            finished[place] = event
            more["expert"] = running[place].receipt(event).json()
        else:
            counts[place] += 1
        if options.include_usage:
            more["usage"] = _running_usage(running, counts) if options.continuous_usage_stats else None
        shown = choices(place, event)
        if shown:
            yield data_frame(reply.chunk(shown, **more))
    if options.include_usage:
        ordered = [finished[place] for place in range(len(running))]
        yield data_frame(reply.chunk([], usage=usage(running, ordered)))
    yield DONE


def _running_usage(running: Sequence[Running], counts: Sequence[int]) -> dict[str, Any]:
    return token_usage(sum(len(one.prepared.request.prompt) for one in running), sum(counts))


def chat_choices() -> Choices:
    """The role comes with the first text, or with the end of an answer that has none."""
    opened = False

    def choices(_place: int, event: Event) -> list[dict[str, Any]]:
        nonlocal opened
        role = {} if opened else {"role": "assistant"}
        if isinstance(event, FinishedEvent):
            return [delta_choice(role if opened else {**role, "content": ""}, event.reason)]
        if not event.text:
            return []
        opened = True
        return [delta_choice({**role, "content": event.text})]

    return choices


def completion_choices(place: int, event: Event) -> list[dict[str, Any]]:
    if isinstance(event, FinishedEvent):
        return [text_choice(place, "", event.reason)]
    return [text_choice(place, event.text, None)] if event.text else []
