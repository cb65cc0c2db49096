"""Mixes of masked and exact requests on synthetic routing: the engine's eviction is never much worse than LRU."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import product
from math import prod

import pytest

from benchmarks.cache_policies import Request, Step, lru
from benchmarks.cache_traffic import (
    Arrival,
    EngineSlots,
    LruSlots,
    Slots,
    TrafficRow,
    replay,
    traffic_of,
    traffic_verdict,
)  # fmt: skip
from store.records import ExpertKey

LAYERS, EXPERTS, TOP_K, OWN = 2, 24, 3, 6
TOKENS = 12


def _task(name: str, rng: random.Random) -> tuple[frozenset[ExpertKey], list[Request]]:
    """A selection of OWN experts a layer, and recordings that leave it in one choice of ten."""
    own = [rng.sample(range(EXPERTS), OWN) for _ in range(LAYERS)]

    def step(layer: int) -> Step:
        pool = (own[layer] if rng.random() < 0.9 else range(EXPERTS) for _ in range(TOP_K))
        return tuple(ExpertKey(layer, expert) for expert in sorted({rng.choice(each) for each in pool}))

    recorded = [Request(name, tuple(step(layer) for _ in range(TOKENS) for layer in range(LAYERS))) for _ in range(8)]
    return frozenset(ExpertKey(layer, expert) for layer in range(LAYERS) for expert in own[layer]), recorded


@pytest.fixture(scope="module")
def tasks() -> tuple[Mapping[str, frozenset[ExpertKey]], Mapping[str, Sequence[Request]]]:
    rng = random.Random(5)
    made = {name: _task(name, rng) for name in "abcdefgh"}
    return {name: task[0] for name, task in made.items()}, {name: task[1] for name, task in made.items()}


def test_no_mix_of_masked_and_exact_requests_reads_much_more_than_lru(
    tasks: tuple[Mapping[str, frozenset[ExpertKey]], Mapping[str, Sequence[Request]]],
) -> None:
    selections, recorded = tasks
    ratios = []
    for slots, count, exact, at_once in product((16, 24, 32), (3, 8), (0.0, 0.1, 0.5, 1.0), (1, 3)):
        traffic = traffic_of(recorded, count, "uniform", exact, 60, seed=1)
        plain = replay(traffic, selections, LruSlots(slots), LAYERS, at_once)
        ratios.append(replay(traffic, selections, EngineSlots(LAYERS, EXPERTS, slots), LAYERS, at_once) / plain)
    assert max(ratios) < 1.1
    assert prod(ratios) ** (1 / len(ratios)) < 0.97


def test_exact_requests_alone_read_what_they_read_through_a_plain_lru(
    tasks: tuple[Mapping[str, frozenset[ExpertKey]], Mapping[str, Sequence[Request]]],
) -> None:
    selections, recorded = tasks
    traffic = traffic_of(recorded, 8, "zipf", 1.0, 30, seed=2)
    assert replay(traffic, selections, LruSlots(20), LAYERS, 1) == lru([each.request for each in traffic], 20).reads


@pytest.mark.parametrize("slots", [LruSlots(4), EngineSlots(1, 8, 4)], ids=["lru", "engine"])
def test_a_lease_is_held_as_long_as_its_request_runs_and_the_next_waits_for_room(slots: Slots) -> None:
    a, b, c = (ExpertKey(0, expert) for expert in (1, 2, 3))
    selections = {"long": frozenset({a, b}), "wide": frozenset({b, c, ExpertKey(0, 4)})}
    long, wide = Request("long", ((a,), (a,), (a,))), Request("wide", ((b,),))
    exact = Request("long", ((c,), (c,), (c,)))
    traffic = [Arrival(long, exact=False), Arrival(exact, exact=True), Arrival(wide, exact=False)]
    assert replay(traffic, selections, slots, 1, 3) == 2 + 1 + 1  # `wide` begins when `long` has ended, and finds b, c
    assert slots.available == 4


def test_the_verdict_names_the_mix_where_ours_is_worst() -> None:
    rows = [TrafficRow(64, 3, "zipf", 0.5, 1, 100, 50, 0.5), TrafficRow(64, 10, "uniform", 0.1, 4, 100, 200, 2.0)]
    assert "reads 1.000 of LRU's bytes in the geometric mean of 2" in traffic_verdict(rows)
    assert (
        "more than LRU in 1 of them, and at most 2.000 of it (64 slots, 10 tasks, uniform, 10% exact, 4 at once)"
        in (traffic_verdict(rows))
    )
