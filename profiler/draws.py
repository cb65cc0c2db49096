"""Other calibration text that a task might have come with: resamples and small parts of what is there, by seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from profiler.batches import Encoded
from store.errors import InvalidInput


def draw(text: Sequence[Encoded], seed: int, items: int | None = None) -> list[Encoded]:
    """As many items as there are, with replacement (a bootstrap draw); or, given a number, that many different ones.

    The same seed gives the same items, and of one seed the few are among the more. Shortest first, as the pass wants.
    """
    order = sorted(text, key=lambda one: one.number)
    random = np.random.default_rng(seed)
    if items is None:
        picked = random.integers(0, len(order), len(order))
    elif 1 <= items <= len(order):
        picked = random.permutation(len(order))[:items]
    else:
        raise InvalidInput(f"{items} of {len(order)} items can't be drawn. Ask for fewer, or give more text.")
    return sorted((order[at] for at in picked), key=lambda one: (len(one.tokens), one.number))
