"""The smallest cap is found to one step, with few tries."""

from __future__ import annotations

import pytest

from benchmarks.descent import STEP, smallest_cap


@pytest.mark.parametrize("need", [1, STEP, STEP + 1, 700 << 20, 100 * STEP])
def test_it_is_the_first_step_that_is_enough(need: int) -> None:
    tried: list[int] = []

    def completes(cap: int) -> bool:
        tried.append(cap)
        return cap >= need

    assert smallest_cap(completes, 100 * STEP) == -(-need // STEP) * STEP
    assert len(tried) <= 8


def test_where_the_highest_is_too_little_there_is_none() -> None:
    assert smallest_cap(lambda _: False, 100 * STEP) is None
