"""Which rows stay when some leave."""

from __future__ import annotations

import random


def some_stay(rows: int, rng: random.Random) -> list[int]:
    """Fewer rows than there are; the last of them fill the gaps."""
    left = sorted(rng.sample(range(rows), rng.randrange(rows)))
    movers = [place for place in left if place >= len(left)]
    return [place if place in left else movers.pop() for place in range(len(left))]
