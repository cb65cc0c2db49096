"""How often a key may ask: a bucket a key, this process's own, and with Redis one that all services on it share.

Where Redis answers its word counts, and the own buckets only follow, so that where it is away the count goes on from
what this process knows. No request fails for Redis's sake, and none waits but those that find it hanging first.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from service.attempt import without_password
from store.errors import InvalidInput, TooMany
from store.records import ApiKey

log = logging.getLogger("moepager.service")

ROUNDING = 1e-9  # of adding up parts of a token
ANSWER_SECONDS = 0.5  # for which a request waits for a Redis that hangs, once
LOOK_SECONDS = 1.0  # between two looks whether a lost Redis is back
CONNECTIONS = 4  # at most: an exchange takes a fraction of a millisecond
FULL_SECONDS = 60  # after which any bucket is full, and need not be remembered

# The same bucket as `Limits`, by Redis's clock. Gives the milliseconds until there is a token, 0 where one was taken.
TAKE = """
local now = redis.call('TIME')
now = now[1] + now[2] / 1e6
local most = tonumber(ARGV[1])
local rate = most / 60
local known = redis.call('HMGET', KEYS[1], 'tokens', 'filled')
local filled = tonumber(known[2]) or now
local tokens = math.min(most, (tonumber(known[1]) or most) + math.max(0, now - filled) * rate)
local wait = 0
if tokens < 1 - 1e-9 then
  wait = math.max(1, math.ceil((1 - tokens) / rate * 1000 - 1e-6))
else
  tokens = tokens - 1
end
redis.call('HSET', KEYS[1], 'tokens', string.format('%.12f', tokens), 'filled', string.format('%.6f', now))
redis.call('EXPIRE', KEYS[1], ARGV[2])
return wait
"""


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled: float


class Limits:
    """A bucket a key: it holds a minute's requests and fills evenly. One process's own; belongs to one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, key: ApiKey) -> None:
        """Raises TooMany where the bucket is empty."""
        if key.per_minute is None:
            return
        bucket = self._filled(key.id, key.per_minute)
        if bucket.tokens < 1 - ROUNDING:
            raise too_many(key, (1 - bucket.tokens) * 60 / key.per_minute)
        bucket.tokens -= 1

    def follow(self, key: ApiKey) -> None:
        """Somebody else has counted a request and let it through."""
        if key.per_minute is not None:
            bucket = self._filled(key.id, key.per_minute)
            bucket.tokens = max(0.0, bucket.tokens - 1)

    def _filled(self, name: str, per_minute: int) -> _Bucket:
        now = self._clock()
        bucket = self._buckets.setdefault(name, _Bucket(per_minute, now))
        bucket.tokens = min(float(per_minute), bucket.tokens + (now - bucket.filled) * per_minute / 60)
        bucket.filled = now
        return bucket


def too_many(key: ApiKey, wait: float) -> TooMany:
    seconds = math.ceil(wait - ROUNDING)
    return TooMany(
        f"Key {key.name!r} may ask {key.per_minute} times a minute, and has. Try again in {seconds} s.", seconds
    )


class SharedCount:
    """The buckets in Redis. While none answers there, `wait` says so at once, and a task of its own looks for it."""

    def __init__(self, url: str) -> None:
        """Raises InvalidInput for what is no URL of a Redis."""
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=CONNECTIONS,
                timeout=ANSWER_SECONDS,
                socket_connect_timeout=ANSWER_SECONDS,
                socket_timeout=ANSWER_SECONDS,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise InvalidInput(f"Not a URL of a Redis: {error}. Write redis://host:6379/0.", param="redis") from None
        self._redis = Redis.from_pool(pool)
        self._take = self._redis.register_script(TAKE)
        self._where = without_password(url)[0]
        self._looking: asyncio.Task[None] | None = None
        self.answers = False

    async def open(self) -> None:
        """Connect before the first request comes; where nobody answers, go on looking."""
        if not await self._looked():
            self._lose("it does not answer")

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        await self._redis.aclose()

    async def wait(self, key: ApiKey) -> float | None:
        """Seconds until the key may ask, 0 where it may and was counted; None where Redis does not answer."""
        if not self.answers:
            return None
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                found = await self._take(keys=[f"moepager:rate:{key.id}"], args=[key.per_minute or 0, FULL_SECONDS])
        except (RedisError, OSError, TimeoutError) as error:
            self._lose(str(error) or f"it did not answer within {ANSWER_SECONDS:g} s")
            return None
        return int(found) / 1000

    def _lose(self, why: str) -> None:
        """Of many requests that find it lost at once, the first one says so."""
        self.answers = False
        if self._looking is None or self._looking.done():
            log.warning(
                "Redis at %s is away (%s): rate limits are counted by this process for itself until it is back",
                self._where,
                why,
            )
            self._looking = asyncio.create_task(self._look())

    async def _look(self) -> None:
        while not await self._looked():
            await asyncio.sleep(LOOK_SECONDS)
        log.info("Redis at %s is back: rate limits are shared", self._where)

    async def _looked(self) -> bool:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await self._redis.ping()
        except (RedisError, OSError, TimeoutError):
            return False
        self.answers = True
        return True


class RateLimits:
    """What the guard asks. `alone` is called for every request that Redis should have counted and did not."""

    def __init__(self, redis: str | None = None) -> None:
        self._own = Limits()
        self._shared = None if redis is None else SharedCount(redis)

    @property
    def shared(self) -> bool:
        return self._shared is not None and self._shared.answers

    async def open(self) -> None:
        if self._shared is not None:
            await self._shared.open()

    async def close(self) -> None:
        if self._shared is not None:
            await self._shared.close()

    async def take(self, key: ApiKey, alone: Callable[[], None] = lambda: None) -> None:
        """Raises TooMany."""
        if key.per_minute is None:
            return
        wait = None if self._shared is None else await self._shared.wait(key)
        if wait:
            raise too_many(key, wait)
        if wait is not None:
            self._own.follow(key)
            return
        if self._shared is not None:
            alone()
        self._own.take(key)
