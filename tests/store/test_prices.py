"""What selections cost: stored, replaced, found, and gone with the profile."""

from __future__ import annotations

from dataclasses import replace

import pytest

from store.errors import InvalidInput, NotFound
from store.records import Price, Selection, StoredSelection

PRICE = Price("s-half", "own", "e" * 32, 4096, 20, 0.9, 0.95, 0.7, 0.97, 0.4, ((0.85, 0.5), (None, 0.45)))


@pytest.fixture
def profile(stocked, make_profile):
    stocked.profiles.put(make_profile())
    return stocked.profiles.get("p1")


@pytest.fixture
def priced(stocked, profile):
    for name, keep in (("s-half", 0.5), ("s-quarter", 0.25)):
        stocked.selections.put(
            StoredSelection(name, profile.id, "reap", "uniform", keep, Selection.of([[0, 1], [1, 2]]))
        )
    return stocked


def test_a_price_comes_back_as_it_was_and_a_second_one_replaces_it(priced, profile):
    before = priced.changes.count()
    priced.prices.put(PRICE)
    priced.prices.put(replace(PRICE, accuracy=0.8, draws=()))
    assert list(priced.prices.list(profile.id)) == [replace(PRICE, accuracy=0.8, draws=())]
    assert priced.changes.count() == before + 2


def test_prices_are_listed_by_size_and_own_items_before_others(priced, profile):
    given = [
        replace(PRICE, selection="s-quarter"),
        replace(PRICE, text="others", evaluation_hash="f" * 32),
        PRICE,
    ]
    for price in given:
        priced.prices.put(price)
    assert list(priced.prices.list(profile.id)) == [given[2], given[1], given[0]]


def test_a_price_of_no_selection_and_one_that_is_not_finite_are_refused(priced):
    with pytest.raises(NotFound, match="No selection nowhere"):
        priced.prices.put(replace(PRICE, selection="nowhere"))
    with pytest.raises(InvalidInput, match="not finite"):
        priced.prices.put(replace(PRICE, draws=((0.5, float("nan")),)))


def test_prices_go_with_their_task(priced, profile):
    priced.prices.put(PRICE)
    priced.tasks.delete(profile.task)
    assert list(priced.prices.list(profile.id)) == []
