"""When a masked answer strays from its selection: a level of coverage, and the bound under which it goes on exactly.

Coverage of a token is the share of the unrestricted router's weight that lies inside the selection, mean over layers.
A row's level is a running mean of it that forgets: every token of prompt and answer moves it NEWEST of the way. It is
compared with the bound from the prompt's last token on. Pure; routing keeps the levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NEWEST = 0.2  # docs/methods.md compares it with other statistics
ALARM_RATE = 0.05


@dataclass(frozen=True, slots=True)
class Guard:
    """A request whose level falls below `bound` is finished exactly. The bound rests on `items` held-out items of the
    task, of which about `alarm_rate` fall below it as well: false alarms."""

    bound: float
    alarm_rate: float = 0.0
    items: int = 0


WATCH = Guard(-math.inf)  # meters the level and never alarms


@dataclass(frozen=True, slots=True)
class Escalated:
    """From its token `at_token` on (0: all of it) an answer was made by free routing: its level was below the bound."""

    at_token: int
    coverage: float  # the level
    bound: float


def draw_guard(levels: Sequence[float], alarm_rate: float = ALARM_RATE) -> Guard | None:
    """The bound that a further item of the same kind falls below with a chance of at most `alarm_rate`; None where
    `levels`, the lowest of each held-out item, are too few for that.

    A split conformal bound: among n + 1 items that are exchangeable, each is the one with the rank in question with
    the same chance, whatever the levels' distribution.
    """
    rank = math.floor(alarm_rate * (len(levels) + 1))
    if rank < 1:
        return None
    return Guard(sorted(levels)[rank - 1], rank / (len(levels) + 1), len(levels))


def items_needed(alarm_rate: float = ALARM_RATE) -> int:
    """The fewest held-out items that a bound can rest on."""
    return math.ceil(1 / alarm_rate) - 1
