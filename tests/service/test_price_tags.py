"""How sure a size is, and when a smaller one is as good."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.price_tags import PriceTag, price_tag, smallest_as_good
from service.serving import Candidate
from store.intervals import wilson
from store.records import Evaluation, Price, Selection, StoredSelection

KEPT = Selection.of([[0, 1]])


def candidate(keep: float, accuracy: float | None, items: int = 50) -> Candidate:
    name = f"s-{keep}"
    stored = StoredSelection(name, "p", "gate", "uniform", keep, KEPT)
    return Candidate(stored, Evaluation(name, "hash", items, accuracy, 0.96, 0.3, 0.9))


def price(keep: float, **changes: object) -> Price:
    made = Price(f"s-{keep}", "own", "hash", 100, 50, 0.9, 0.96, 0.7, 0.99, 0.3, ((0.85, 0.3), (0.9, 0.3), (0.95, 0.3)))
    return replace(made, **changes)  # type: ignore[arg-type]


def test_the_stored_price_says_how_sure_it_is_and_what_it_costs_off_the_task():
    prices = [price(0.5), price(0.25, low=0.1), price(0.5, text="others", accuracy=0.24, full_accuracy=0.96, draws=())]
    assert price_tag(candidate(0.5, 0.9), prices) == PriceTag(0.7, 0.99, 3, 0.24, pytest.approx(0.25))


def test_without_a_price_or_with_one_of_other_items_the_items_alone_count():
    low, high = wilson(0.9, 50)
    wanted = PriceTag(low, high, 0, None, None)
    assert price_tag(candidate(0.5, 0.9), []) == wanted
    assert price_tag(candidate(0.5, 0.9), [price(0.5, evaluation_hash="other")]) == wanted
    assert price_tag(candidate(0.5, None), []) == PriceTag(None, None, 0, None, None)


def test_the_smallest_size_inside_the_interval_is_as_good():
    sizes = [candidate(1.0, 0.94), candidate(0.5, 0.92), candidate(0.25, 0.9), candidate(0.125, 0.5)]
    assert smallest_as_good(sizes[0], sizes, []) is sizes[2]
    assert smallest_as_good(sizes[2], sizes, []) is None
    narrow = [price(1.0, low=0.91, high=0.96)]
    assert smallest_as_good(sizes[0], sizes, narrow) is sizes[1]


def test_without_accuracy_nothing_is_called_as_good():
    assert smallest_as_good(candidate(1.0, None), [candidate(0.5, None)], []) is None
    assert smallest_as_good(candidate(1.0, 0.9), [candidate(0.5, None)], []) is None
