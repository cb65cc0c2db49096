"""Split-half agreement."""

from __future__ import annotations

import numpy as np
import pytest

from profiler.extras import EXTRAS
from profiler.scorers.registry import SCORERS, computable
from profiler.stability import split_half_overlap


def test_halves_of_the_same_text_agree_wholly(random_trace, accumulate, summed):
    trace = random_trace(1)
    both = accumulate([trace], half=0, needs=summed) + accumulate([trace], half=1, needs=summed)
    assert {"mone", "stun", "reap"} <= {scorer.name for scorer in computable(both)}
    for scorer in computable(both):
        assert split_half_overlap(both, scorer, 0.5) == (None if scorer.name == "random" else 1.0)


def test_what_was_not_computed_of_halves_has_no_agreement(random_trace, accumulate):
    """Of wholly different halves nobody may be said to agree wholly."""
    apart = accumulate([random_trace(1)], half=0) + accumulate([random_trace(2)], half=1)
    everyone = {name: np.random.default_rng(5).random(extra.shape(1, 8, 5)) for name, extra in EXTRAS.items()}
    known = {"coactivations", "output_sums", "logit_products"}
    needs = frozenset(known)
    halved = accumulate([random_trace(1)], half=0, needs=needs) + accumulate([random_trace(2)], half=1, needs=needs)
    full = apart.with_extras({**everyone, **halved.extras})
    found = {scorer.name: split_half_overlap(full, scorer, 0.5) for scorer in computable(full)}
    nothing = {"random", "naee", "naee_answers", "naee_exact", "tsep", "diep", "stun_router", "router_growth"}
    nothing |= {"camera", "heapr_unit"}  # of channels, whose sums are kept once
    assert {name for name, share in found.items() if share is None} == nothing
    assert all(share < 1 for share in found.values() if share is not None), found


def test_halves_that_use_other_experts_disagree(toy, accumulate):
    """Tokens 0 and 1 live on experts 0 to 2, tokens 2 and 3 on experts 1 to 3."""
    both = accumulate([toy.tokens([0, 1])], half=0) + accumulate([toy.tokens([2, 3])], half=1)
    assert split_half_overlap(both, SCORERS["gate"], 0.5) == pytest.approx(0.0)


def test_one_half_alone_says_nothing(toy_statistics):
    assert split_half_overlap(toy_statistics, SCORERS["gate"], 0.5) is None
