from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from store.database import Store
from store.errors import InvalidInput
from store.records import Event


def test_a_query_that_is_asked_again_is_counted_not_kept_twice(store: Store) -> None:
    for similarity in (0.2, None, 0.4):
        store.unmatched.add("why is the sky blue", similarity, limit=5)
    [kept] = store.unmatched.list()
    assert (kept.text, kept.count, kept.similarity) == ("why is the sky blue", 3, 0.4)


def test_of_too_many_the_one_longest_not_asked_goes(store: Store) -> None:
    for text in ("a", "b", "c", "a", "d"):
        store.unmatched.add(text, 0.1, limit=3)
    assert [kept.text for kept in store.unmatched.list()] == ["d", "a", "c"]


def test_queries_are_forgotten_by_digest_or_all_at_once(store: Store) -> None:
    for text in ("a", "b", "c"):
        store.unmatched.add(text, None, limit=3)
    digest = next(kept.digest for kept in store.unmatched.list() if kept.text == "b")
    assert store.unmatched.delete([digest, "unknown"]) == 1
    assert [kept.text for kept in store.unmatched.list()] == ["c", "a"]
    assert store.unmatched.delete() == 2
    assert store.unmatched.list() == []


def test_no_count_is_lost_between_writers(store: Store) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: store.unmatched.add("same", 0.3, limit=9), range(20)))
    assert [kept.count for kept in store.unmatched.list()] == [20]


def test_events_come_back_youngest_first(store: Store) -> None:
    made = [Event("drift", "m", f"t{n}", 0.5, 0.3, "why", datetime(2025, 3, n + 1, tzinfo=UTC)) for n in range(3)]
    for event in made:
        store.events.add(event)
    assert store.events.list(2) == [made[2], made[1]]
    with pytest.raises(InvalidInput, match="at least 1"):
        store.events.list(0)
