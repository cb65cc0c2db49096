"""The smallest memory cap under which something completes, by halving what is not known yet."""

from __future__ import annotations

from collections.abc import Callable

STEP = 50 << 20  # bytes


def smallest_cap(completes: Callable[[int], bool], high: int) -> int | None:
    """A multiple of STEP, at most `high` rounded up to one; None where not even that is enough.

    Takes for granted that what completes under a cap completes under every higher one.
    """
    enough, too_little = -(-high // STEP), 0
    if not completes(enough * STEP):
        return None
    while enough - too_little > 1:
        middle = (enough + too_little) // 2
        if completes(middle * STEP):
            enough = middle
        else:
            too_little = middle
    return enough * STEP
