"""How often a key may ask: alone, with others by way of a real Redis, and while that Redis is dead or hangs."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from typing import Protocol

import pytest
from fastapi.testclient import TestClient
from redis import Redis as Client

from service.app import create_app
from service.keys import KeyRing, make_key
from service.metrics import Metrics
from service.parts import Parts
from service.rate_limits import ANSWER_SECONDS, TAKE, Limits, RateLimits, SharedCount
from store.errors import InvalidInput, TooMany
from store.records import ApiKey


class Redis(Protocol):
    """What the fixture `redis` is."""

    url: str

    def start(self) -> None: ...
    def kill(self) -> None: ...
    def freeze(self) -> None: ...
    def thaw(self) -> None: ...


def key_of(per_minute: int | None, name: str = "k") -> ApiKey:
    return ApiKey(name, name, "query", "", per_minute, datetime.now(UTC))


async def allowed(limits: RateLimits, key: ApiKey, requests: int) -> int:
    """How many of so many requests are let through."""
    count = 0
    for _ in range(requests):
        try:
            await limits.take(key)
            count += 1
        except TooMany:
            pass
    return count


def with_services(redis: Redis, work: Callable[..., Awaitable[None]], count: int = 2) -> None:
    """Do `work` with the limits of so many services that share a Redis."""

    async def run() -> None:
        services = [RateLimits(redis.url) for _ in range(count)]
        for service in services:
            await service.open()
        try:
            await work(*services)
        finally:
            for service in services:
                await service.close()

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_a_bucket_fills_evenly_and_never_above_a_minutes_worth() -> None:
    now = 100.0
    limits = Limits(lambda: now)
    key = ApiKey("k", "k", "query", "", 6, datetime.now(UTC))  # one in ten seconds
    allowed: list[int] = []
    waits: set[int] = set()
    for second in range(121):
        now = 100.0 + second
        try:
            limits.take(key)
            allowed.append(second)
        except TooMany as error:
            waits.add(error.seconds)
    assert allowed == [0, 1, 2, 3, 4, 5, *range(10, 121, 10)]
    assert waits == set(range(1, 10))
    now += 10_000
    for _ in range(6):
        limits.take(key)
    with pytest.raises(TooMany):
        limits.take(key)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy with other tests is no Redis in trouble."""
    monkeypatch.setattr("service.rate_limits.ANSWER_SECONDS", 60.0)


@pytest.mark.usefixtures("patient")
def test_services_on_one_redis_share_a_keys_limit(redis: Redis) -> None:
    async def work(one: RateLimits, other: RateLimits) -> None:
        for service in (one, other, one, other, other, one):
            await service.take(key_of(6))
        for service in (one, other):
            with pytest.raises(TooMany) as refused:
                await service.take(key_of(6))
            assert 5 <= refused.value.seconds <= 10
        await other.take(key_of(6, "another"))
        await one.take(key_of(None))

    with_services(redis, work)


def test_the_shared_bucket_is_the_plain_one(redis: Redis) -> None:
    """The script at times that were drawn, in place of Redis's clock, beside the plain bucket at the same ones."""
    rng, now = random.Random(0), 1.7e9
    plain = Limits(lambda: now)
    with Client.from_url(redis.url) as client:
        script = client.register_script(TAKE.replace("redis.call('TIME')", "{ARGV[3], '0'}"))
        for per_minute in (1, 7, 60, 200):
            key, refused = key_of(per_minute, f"k{per_minute}"), 0
            for _ in range(2 * per_minute + 400):
                now += rng.choice([0, 0, 0, 0.001, 0.7, 1.5]) * rng.random() * 60 / per_minute
                waits = script(keys=[key.id], args=[per_minute, 1000, f"{now:.6f}"]) / 1000
                now = float(f"{now:.6f}")
                try:
                    plain.take(key)
                    due = 0.0
                except TooMany:
                    due = (1 - plain._buckets[key.id].tokens) * 60 / per_minute
                    refused += 1
                assert waits == pytest.approx(due, abs=0.0011), (per_minute, now)
            assert refused > 60, per_minute


@pytest.mark.usefixtures("patient")
def test_many_at_once_take_no_more_than_the_bucket_holds(redis: Redis) -> None:
    async def work(*services: RateLimits) -> None:
        key, began = key_of(30), time.monotonic()
        counts = await asyncio.gather(*(allowed(service, key, 5) for service in services for _ in range(10)))
        assert 30 <= sum(counts) <= 30 + (time.monotonic() - began) / 2 + 1  # one comes back in two seconds

    with_services(redis, work, 3)


@pytest.mark.parametrize("trouble", ["killed", "frozen"])
def test_a_redis_in_trouble_holds_nobody_and_each_counts_for_itself(
    redis: Redis, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "moepager.service")
    alone: list[int] = []

    async def work(one: RateLimits, other: RateLimits) -> None:
        key = key_of(10)
        assert await allowed(one, key, 4) == 4
        redis.kill() if trouble == "killed" else redis.freeze()
        began = time.monotonic()
        waited = await asyncio.gather(*(one.take(key, lambda: alone.append(1)) for _ in range(6)))
        assert len(waited) == len(alone) == 6
        assert time.monotonic() - began < 4 * ANSWER_SECONDS  # all at once, not one after the other
        began = time.monotonic()
        for _ in range(50):
            with pytest.raises(TooMany, match="10 times a minute"):  # it knows of the four before
                await one.take(key)
        assert time.monotonic() - began < 10 * ANSWER_SECONDS  # nobody asks Redis any more
        assert await allowed(other, key, 20) == 10  # its own bucket was full
        redis.start() if trouble == "killed" else redis.thaw()
        await until(lambda: one.shared and other.shared)
        if trouble == "killed":  # it comes back with nothing
            assert 10 <= sum([await allowed(one, key, 8), await allowed(other, key, 8)]) <= 11

    with_services(redis, work)
    told = [record.message for record in caplog.records if record.name == "moepager.service"]
    assert len([line for line in told if "is away" in line]) == 2, told  # each service once
    assert len([line for line in told if "is back: " in line]) == 2, told


def test_a_redis_that_is_not_there_at_the_start_is_found_later(redis: Redis) -> None:
    redis.kill()

    async def work(one: RateLimits) -> None:
        assert not one.shared
        await one.take(key_of(2))
        redis.start()
        await until(lambda: one.shared)
        assert await allowed(one, key_of(2), 5) == 2

    with_services(redis, work, 1)


def test_what_is_no_redis_url_is_refused() -> None:
    with pytest.raises(InvalidInput, match="redis://host"):
        SharedCount("http://somewhere")


@pytest.fixture
def two(parts: Parts, redis: Redis, patient: None) -> Iterator[list[TestClient]]:
    """Two services with one key, of five requests a minute."""
    key, secret = make_key("slow", "query", 5)
    with ExitStack() as stack:
        clients = []
        for _ in range(2):
            own = replace(parts, keys=KeyRing([key]), metrics=Metrics(parts.engine, parts.worker))
            app = create_app(lambda own=own: nullcontext(own), redis=redis.url)  # type: ignore[misc]
            client = stack.enter_context(TestClient(app, headers={"authorization": f"Bearer {secret}"}))
            while client.get("/readyz").status_code == 503:
                pass
            clients.append(client)
        yield clients


def test_over_http_the_limit_is_shared_and_outlives_redis(two: list[TestClient], redis: Redis) -> None:
    one, other = two
    answers = [client.get("/v1/models") for client in (one, other, one, other, one, other)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [429]
    assert 6 <= int(answers[-1].headers["retry-after"]) <= 12
    redis.kill()
    assert one.get("/v1/models").status_code == 200  # it has seen three of its five
    text = one.get("/metrics").text
    assert "moepager_rate_limits_alone_total 2.0" in text
    assert one.get("/v1/models").status_code == 429
