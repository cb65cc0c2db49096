from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.records import Evaluation, ExpertKey, Selection

LAYERS = st.lists(st.sets(st.integers(0, 70)), max_size=5)


@given(LAYERS)
def test_a_selection_counts_and_lists_its_experts_layer_before_expert(layers: list[set[int]]) -> None:
    selection = Selection.of(layers)
    assert list(selection) == [ExpertKey(n, e) for n, ids in enumerate(layers) for e in sorted(ids)]
    assert len(selection) == sum(map(len, layers))


@given(LAYERS, LAYERS)
def test_digests_tell_selections_apart(left: list[set[int]], right: list[set[int]]) -> None:
    assert (Selection.of(left).digest == Selection.of(right).digest) == (left == right)


def test_the_whole_selection_has_every_expert() -> None:
    assert Selection.whole(2, 3).experts == ((0, 1, 2), (0, 1, 2))


@pytest.mark.parametrize("ids", [(1, 0), (2, 2), (-1, 0)])
def test_a_layer_lists_distinct_experts_in_rising_order(ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"Layer 1 .*rising order"):
        Selection(((0,), ids))


@pytest.mark.parametrize(
    ("accuracy", "full", "retention"),
    [(0.9, 0.95, 0.9 / 0.95), (0.0, 0.5, 0.0), (None, 0.9, None), (0.5, None, None), (0.1, 0.0, None)],
)
def test_retention_is_a_share_of_what_the_whole_model_knows(
    accuracy: float | None, full: float | None, retention: float | None
) -> None:
    assert Evaluation("s", "e", 10, accuracy, full, 1.0, 1.0).retention == retention
