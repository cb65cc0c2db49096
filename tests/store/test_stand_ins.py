"""Vectors in place of experts, from a profile's statistics and back from the store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from store.database import Store
from store.errors import Conflict, CorruptStore, InvalidInput
from store.records import Profile, Selection, StoredSelection
from store.stand_ins import NOVICE, attach, novices, unknown


def _statistics() -> dict[str, Any]:
    """One layer of two experts over two halves; the second was never routed to."""
    selected = np.zeros((2, 2, 1, 2))
    selected[0, 0, 0, 0], selected[1, 1, 0, 0] = 1, 3
    sums = np.zeros((2, 1, 2, 2))
    sums[0, 0, 0], sums[1, 0, 0] = (1, 2), (7, 2)
    return {"selected": selected, "output_sums": sums}


def test_a_novice_is_the_mean_output_and_zeros_where_no_token_came() -> None:
    found = novices("p1", _statistics())
    assert found.vectors.tolist() == [[[2.0, 1.0], [0.0, 0.0]]]
    assert (found.id, found.vectors.dtype) == ("p1-novice", np.float32)
    assert unknown(Selection.of([[0]]), _statistics()) == 1
    assert unknown(Selection.of([[0, 1]]), _statistics()) == 0


def test_vectors_are_attached_from_the_profile_and_never_to_a_selection_without() -> None:
    stored = StoredSelection("s", "p1", "peu", "uniform", 0.5, Selection.of([[0]]))
    assert attach(stored, {}) is stored
    served = attach(replace(stored, stand_in=NOVICE), _statistics()).selection
    assert served.stand_in == novices("p1", _statistics())
    assert served.digest != stored.selection.digest
    assert served != stored.selection


def test_what_can_not_be_attached_is_refused() -> None:
    stored = StoredSelection("s", "p1", "peu", "uniform", 0.5, Selection.of([[0]]), NOVICE)
    with pytest.raises(InvalidInput, match="output_sums"):
        attach(stored, {"selected": np.ones((2, 2, 1, 2))})
    with pytest.raises(CorruptStore, match="not finite"):
        attach(stored, _statistics() | {"output_sums": np.full((2, 1, 2, 2), np.nan)})
    with pytest.raises(CorruptStore, match="'twin'"):
        attach(replace(stored, stand_in="twin"), _statistics())


def test_the_kind_is_stored_and_is_part_of_what_an_id_stands_for(
    stocked: Store, make_profile: Callable[..., Profile], make_selection: Callable[..., StoredSelection]
) -> None:
    stocked.profiles.put(make_profile())
    for each in (make_selection(), make_selection(id="s2", stand_in=NOVICE)):
        stocked.selections.put(each)
        assert stocked.selections.get(each.id) == each
    with pytest.raises(Conflict, match="s2"):
        stocked.selections.put(make_selection(id="s2"))
