"""How sure a share of right answers is."""

from __future__ import annotations

import math


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share seen in `count` trials, 95% sure by default. It never leaves [0, 1]."""
    if count < 1 or not 0 <= share <= 1:
        raise ValueError(f"A share between 0 and 1 of at least one trial, got {share} of {count}.")
    spread = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    middle, scale = share + z * z / (2 * count), 1 + z * z / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
