"""Replayed caches against plain, slow simulations."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.cache_policies import Request, Tally, belady, fixed, lfu, lru, masked, profile
from store.records import ExpertKey


def trace_of(ids: list[int], task: str = "t") -> list[Request]:
    return [Request(task, tuple((ExpertKey(0, number),) for number in ids))]


def slow_lru(ids: list[int], slots: int) -> int:
    held: list[int] = []
    misses = 0
    for number in ids:
        if number in held:
            held.remove(number)
        else:
            misses += 1
            held = held[-(slots - 1) :] if slots > 1 else []
        held.append(number)
    return misses


def fewest_misses(ids: list[int], slots: int) -> int:
    """The true optimum by trying every eviction."""
    states = {frozenset[int](): 0}
    for number in ids:
        following: dict[frozenset[int], int] = {}
        for held, misses in states.items():
            if number in held:
                choices = [(held, misses)]
            elif len(held) < slots:
                choices = [(held | {number}, misses + 1)]
            else:
                choices = [((held - {out}) | {number}, misses + 1) for out in held]
            for state, cost in choices:
                following[state] = min(cost, following.get(state, cost))
        states = following
    return min(states.values())


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 6))
def test_lru_equals_a_list_that_is_shifted(ids: list[int], slots: int) -> None:
    assert lru(trace_of(ids), slots) == Tally(len(ids), len(ids) - slow_lru(ids, slots), slow_lru(ids, slots))


@given(st.lists(st.integers(0, 4), max_size=14), st.integers(1, 4))
def test_belady_is_the_optimum(ids: list[int], slots: int) -> None:
    assert belady(trace_of(ids), slots).reads == fewest_misses(ids, slots)


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 10))
def test_nothing_beats_belady(ids: list[int], slots: int) -> None:
    best = belady(trace_of(ids), slots).reads
    assert best <= lru(trace_of(ids), slots).reads
    assert best <= lfu(trace_of(ids), slots).reads


def test_lfu_keeps_what_is_used_often() -> None:
    ids = [1, 1, 1, 2, 3, 1, 4, 1]
    assert lfu(trace_of(ids), 2) == Tally(8, 4, 4)


def test_a_fixed_set_reads_every_other_use_again() -> None:
    kept = frozenset({ExpertKey(0, 1), ExpertKey(0, 2)})
    assert fixed(trace_of([1, 2, 3, 3]), kept) == Tally(4, 2, 2 + 2)


def test_a_profile_reads_the_difference_at_a_switch_and_every_miss() -> None:
    a, b = frozenset({ExpertKey(0, 1), ExpertKey(0, 2)}), frozenset({ExpertKey(0, 2), ExpertKey(0, 3)})
    trace = trace_of([1, 2, 5], "a") + trace_of([3, 3], "b") + trace_of([3], "b")
    assert profile(trace, {"a": a, "b": b}) == Tally(6, 5, 2 + 1 + 1)
    assert masked(trace, {"a": a, "b": b}) == Tally(6, 5, 3)


def test_with_room_for_all_every_policy_reads_each_expert_once() -> None:
    rng = random.Random(1)
    ids = [rng.randrange(8) for _ in range(100)]
    distinct = len(set(ids))
    for policy in (lru, lfu, belady):
        assert policy(trace_of(ids), 8).reads == distinct
    everything = frozenset(itertools.starmap(ExpertKey, ((0, number) for number in range(8))))
    assert fixed(trace_of(ids), everything).hit_rate == 1.0
