"""How streams of several prompts become one, and how a reader in asyncio is woken from another thread."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any
from unittest.mock import Mock

import pytest

from engine.requests import FinishedEvent, GenerationRequest, Sampling, Served, TokenEvent
from engine.stream import TokenStream
from service.merging import Bell, merged
from service.running import Running
from store.errors import Busy


def test_a_ring_from_another_thread_is_heard() -> None:
    async def listen() -> bool:
        bell = Bell()
        threading.Timer(0.01, bell.ring).start()
        return await bell.heard(10)

    assert asyncio.run(listen())


def test_a_ring_before_anybody_listens_is_heard_once() -> None:
    async def listen() -> list[bool]:
        bell = Bell()
        bell.ring()
        bell.ring()
        await asyncio.sleep(0.01)
        return [await bell.heard(10), await bell.heard(0.01)]

    assert asyncio.run(listen()) == [True, False]


def test_silence_ends_after_so_many_seconds() -> None:
    async def listen() -> tuple[bool, float]:
        began = time.monotonic()
        return await Bell().heard(0.02), time.monotonic() - began

    rung, waited = asyncio.run(listen())
    assert not rung
    assert waited >= 0.015


@pytest.mark.parametrize("muffled", [False, True])
def test_no_ring_is_lost_between_a_look_and_the_next_listening(muffled: bool) -> None:
    """A thread counts and rings; a reader that takes what has come whenever it hears the bell sees the last count."""
    counted = 0

    def count(bell: Bell) -> None:
        nonlocal counted
        for number in range(20_000):
            counted += 1
            bell.ring(number == 19_999 or not muffled)

    async def follow() -> int:
        bell = Bell(gather=0.0005 if muffled else 0.0)
        threading.Thread(target=count, args=(bell,)).start()
        seen = 0
        while seen < 20_000:
            assert await bell.heard(5), (seen, counted)
            seen = counted
        return seen

    assert asyncio.run(follow()) == 20_000


def test_a_ring_after_the_loop_has_gone_harms_nobody() -> None:
    async def make() -> Bell:
        return Bell()

    bell = asyncio.run(make())
    bell.ring()
    bell.ring()


@pytest.mark.parametrize("ringing", [True, False])
def test_who_stops_listening_leaves_no_timer_behind(ringing: bool) -> None:
    failures: list[object] = []  # of callbacks, which the loop tells to nobody else

    async def give_up() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        bell = Bell()
        listening = asyncio.ensure_future(bell.heard(0.01))
        await asyncio.sleep(0)
        listening.cancel()
        if ringing:
            bell.ring()
        await asyncio.sleep(0.03)  # a timer or ring that resolved the future now would raise InvalidStateError

    asyncio.run(give_up())
    assert failures == []


def test_tokens_that_came_with_a_broken_end_are_passed_on_before_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(Running, "_tell", lambda _, outcome, *__: told.append(outcome))
    stream = TokenStream(GenerationRequest((1,), None, "exact", Sampling()))
    stream.put(TokenEvent(0, 7, "a"))
    stream.put(FinishedEvent(0, "cancelled", "a", 1, 1, Served("exact", 1.0, 0, 0, 0, 0.0, 0.0, 0)))
    passed: list[Any] = []

    async def read() -> None:
        running = Running(Mock(), stream, Mock(), Mock(), 60.0, lambda: 0, 0.0)
        async for found in merged([running]):
            passed.append(found)  # noqa: PERF401 - what came before the error counts

    with pytest.raises(Busy, match="cancelled before it was finished"):
        asyncio.run(read())
    assert passed == [(0, [TokenEvent(0, 7, "a")])]
    assert told == ["cancelled"]


def test_further_tokens_wait_for_each_other_but_neither_the_first_nor_the_end_waits() -> None:
    async def listen() -> tuple[list[bool], list[float]]:
        loop, bell = asyncio.get_running_loop(), Bell(gather=0.2)
        heard, began = [], loop.time()
        waited = []
        bell.ring(False)
        for urgent in (False, True):
            heard.append(await bell.heard(10))
            waited.append(loop.time() - began)
            threading.Timer(0.02, bell.ring, (urgent,)).start()
        heard.append(await bell.heard(10))
        return heard, [*waited, loop.time() - began]

    heard, (first, second, end) = asyncio.run(listen())
    assert heard == [True, True, True]
    assert first < 0.1
    assert second >= 0.19  # though it was there after 0.02
    assert end - second < 0.15


def test_a_muffled_ring_wakes_nobody_and_is_not_lost() -> None:
    noticed = 0

    class Counting(Bell):
        def _noticed(self) -> None:
            nonlocal noticed
            noticed += 1
            super()._noticed()

    async def listen() -> bool:
        bell = Counting(gather=0.05)
        bell.ring(False)
        await bell.heard(10)
        await asyncio.sleep(0)  # the first one's notice
        for _ in range(50):
            bell.ring(False)
        await asyncio.sleep(0.01)
        return await bell.heard(0.01)

    assert asyncio.run(listen())
    assert noticed == 1


def test_what_came_since_the_last_look_is_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Running, "_tell", lambda *_: None)
    stream = TokenStream(GenerationRequest((1,), None, "exact", Sampling()))
    tokens = [TokenEvent(0, number, "a") for number in range(4)]
    end = FinishedEvent(0, "length", "aaaa", 1, 4, Served("exact", 1.0, 0, 0, 0, 0.0, 0.0, 0))

    async def read() -> list[Any]:
        running, passed = Running(Mock(), stream, Mock(), Mock(), 60.0, lambda: 0, 0.0), []
        stream.put(tokens[0])
        async for found in merged([running]):
            passed.append(found)
            if len(passed) == 1:
                for event in (*tokens[1:], end):
                    stream.put(event)
        return passed

    assert asyncio.run(read()) == [(0, [tokens[0]]), (0, [*tokens[1:], end])]
