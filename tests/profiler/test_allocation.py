"""How many experts a share means, and which."""

from __future__ import annotations

import numpy as np
import pytest

from profiler.allocation import kept, uniform
from store.errors import InvalidInput


def test_every_layer_keeps_its_own_best():
    scores = np.array([[0.1, 0.5, 0.3, 0.2], [0.4, 0.2, 0.1, 0.3]])
    assert uniform(scores, 0.5, top_k=1).experts == ((1, 2), (0, 3))


def test_among_equals_the_lower_id_stays():
    assert uniform(np.zeros((1, 6)), 0.5, top_k=1).experts == ((0, 1, 2),)


@pytest.mark.parametrize(
    ("experts", "keep", "top_k", "count"),
    [(64, 0.5, 4, 32), (64, 1.0, 4, 64), (64, 0.01, 4, 4), (27, 0.5, 2, 14), (25, 0.5, 2, 13), (8, 0.125, 1, 1)],
)
def test_a_share_means_a_count(experts, keep, top_k, count):
    assert kept(experts, keep, top_k) == count


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.01, float("nan")])
def test_a_share_outside_its_range_is_refused(keep):
    with pytest.raises(InvalidInput, match=r"must lie in \(0, 1\]"):
        uniform(np.ones((1, 4)), keep, top_k=1)


def test_scores_that_are_not_numbers_are_refused_naming_the_layer():
    scores = np.ones((3, 4))
    scores[2, 1] = np.nan
    with pytest.raises(InvalidInput, match="scores of layer 2 are not finite"):
        uniform(scores, 0.5, top_k=1)
