"""Split-half agreement."""

from __future__ import annotations

import pytest

from profiler.scorers.registry import SCORERS, computable
from profiler.stability import split_half_overlap


def test_halves_of_the_same_text_agree_wholly(random_trace, accumulate, summed):
    trace = random_trace(1)
    both = accumulate([trace], half=0, needs=summed) + accumulate([trace], half=1, needs=summed)
    assert {"mone", "stun", "reap"} <= {scorer.name for scorer in computable(both)}
    for scorer in computable(both):
        assert split_half_overlap(both, scorer, 0.5) == 1.0


def test_halves_that_use_other_experts_disagree(toy, accumulate):
    """Tokens 0 and 1 live on experts 0 to 2, tokens 2 and 3 on experts 1 to 3."""
    both = accumulate([toy.tokens([0, 1])], half=0) + accumulate([toy.tokens([2, 3])], half=1)
    assert split_half_overlap(both, SCORERS["gate"], 0.5) == pytest.approx(0.0)


def test_one_half_alone_says_nothing(toy_statistics):
    assert split_half_overlap(toy_statistics, SCORERS["gate"], 0.5) is None
