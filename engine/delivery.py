"""Loads under way, as the bank keeps them: a transfer, and which of its groups brings which expert."""

from __future__ import annotations

from collections.abc import Sequence

from engine.residency import Load
from engine.transfer import Transfer


class Delivery:
    """`needed` are the experts' own bytes. A `guess` is not known to be needed, and nobody waits for it yet."""

    def __init__(
        self, transfer: Transfer, groups: Sequence[Sequence[Load]], needed: int, *, guess: bool = False
    ) -> None:
        self.transfer, self.needed, self.guess, self.settled = transfer, needed, guess, False
        self.group = {load.key: group for group, loads in enumerate(groups) for load in loads}
