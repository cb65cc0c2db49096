"""Names for requests and answers: unlike each other, but no secrets."""

from __future__ import annotations

import random

_numbers = random.Random()  # seeded by the system once; asking the system each time takes half a millisecond on some


def fresh_id() -> str:
    """128 random bits in hex."""
    return f"{_numbers.getrandbits(128):032x}"
