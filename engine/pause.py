"""Exact rows whose pass was broken off, because it held up others while it waited for the disk. Knows no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.arrivals import Interrupted
from engine.row import Paging, Row
from store.errors import MoepagerError

if TYPE_CHECKING:
    from engine.engine import Engine
    from store.records import ExpertKey

HELD_UP_SECONDS = 0.05  # that one wait of an exact pass may hold up others; a good disk brings an expert in 0.1 to 3 ms
DOUBLINGS = 10


class Pause:
    """`rows` wait for experts that stay pinned until they are there; empty: nobody does.

    A pass that is tried again may have lost what an earlier try read, where slots are few. So each try in a row may
    hold up others for twice as long as the one before it: on a disk that is slow, but works, one of them gets through.
    """

    def __init__(self, engine: Engine) -> None:
        self.rows: list[Row] = []
        self._engine = engine
        self._keys: list[ExpertKey] = []
        self._tries = 0

    @property
    def patience(self) -> float:
        """Seconds that the next try may hold up others."""
        return float(HELD_UP_SECONDS * 2 ** min(self._tries, DOUBLINGS))

    def begin(self, rows: Sequence[Row], broken: Interrupted) -> None:
        """The pass of `rows` was broken off: what it pinned is ours."""
        self.rows += rows
        self._keys += broken.keys
        self._tries += 1

    def poll(self, seconds: float) -> None:
        """End it if what it waits for is there, after at most `seconds`. Raises what made a read fail, and ends then,
        too."""
        try:
            with Paging(self._engine, self.rows):
                there = self._engine.bank.bring(self._keys, seconds)
        except MoepagerError:
            self.end()
            raise
        if there:
            self.end()

    def end(self) -> None:
        """Nobody waits any more."""
        keys, self._keys, self.rows = self._keys, [], []
        for key in keys:  # one by one: two passes may have pinned the same
            self._engine.bank.let_go([key])

    def got_through(self) -> None:
        """The last try was not broken off."""
        self._tries = 0
