"""Scores of the answers' tokens alone."""

from __future__ import annotations

import numpy as np
import pytest

from profiler.scorers.registry import SCORERS
from profiler.statistics import PROMPT, RESPONSE

NAMES = ["easy_ep", "gate", "gate_norm"]


@pytest.mark.parametrize("name", NAMES)
def test_prompts_count_for_nothing(name, random_trace, accumulate):
    prompts, answers = random_trace(1), random_trace(2)
    both = accumulate([prompts], role=PROMPT) + accumulate([answers], role=RESPONSE)
    wanted = SCORERS[name].score(accumulate([answers], role=RESPONSE))
    np.testing.assert_allclose(SCORERS[f"{name}_answers"].score(both), wanted)
    assert not np.allclose(SCORERS[name].score(both), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_text_without_answers_counts_as_it_is(name, random_trace, accumulate):
    statistics = accumulate([random_trace(1)], role=PROMPT)
    np.testing.assert_array_equal(SCORERS[f"{name}_answers"].score(statistics), SCORERS[name].score(statistics))


def test_taking_a_role_out_leaves_the_other_and_the_two_add_up(random_trace, accumulate):
    both = accumulate([random_trace(1)], role=PROMPT) + accumulate([random_trace(2)], role=RESPONSE)
    parts = [both.of_role(role) for role in (PROMPT, RESPONSE)]
    assert sum(part.token_count for part in parts) == both.token_count
    for sums in ("selected", "gates", "shifted_norms"):
        np.testing.assert_allclose(parts[0].total(sums) + parts[1].total(sums), both.total(sums))
    assert [part.tokens[:, 1 - role].any() for role, part in enumerate(parts)] == [False, False]
