"""Reads ahead of a layer that has not spoken yet: which are under way, which proved right, what the others cost.

Decides nothing about what is likely (engine/lookahead.py) and moves no bytes (engine/bank.py). One thread's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from engine.delivery import Delivery
from engine.residency import ABSENT, Residency
from store.errors import CheckpointError
from store.records import ExpertKey


@dataclass(slots=True)
class Guessed:
    """Running totals: experts read ahead, how many of them were `right` and their bytes, bytes read for the others.

    Wrong is what the pass that guessed it did not use. It stays where it landed, so a later token may find it.
    """

    experts: int = 0
    right: int = 0
    right_bytes: int = 0
    wasted_bytes: int = 0


class Guesses:
    """At most `most` reads at a time. Each pins a slot from `begin` until its layer's visit, or the pass, has ended."""

    def __init__(
        self,
        residency: Residency,
        most: int,
        begin: Callable[[ExpertKey], Delivery],
        end: Callable[[ExpertKey, Delivery], None],
    ) -> None:
        """`begin` pins a slot and starts a read; `end` gives up what has not landed, and unpins."""
        self.totals = Guessed()
        self.expected: tuple[ExpertKey, ...] = ()
        self.most = most
        self._residency = residency
        self._begin, self._end = begin, end
        self._under_way: dict[ExpertKey, Delivery] = {}

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """MoE layer `layer` will probably want `experts`, the likeliest first. Nothing is read before `begin`."""
        self.expected = tuple(ExpertKey(layer, expert) for expert in experts) if self.most else ()

    @property
    def useful(self) -> bool:
        """Whether anything that is expected has to be read."""
        return any(self._residency.slot(key) == ABSENT for key in self.expected)

    @property
    def open(self) -> bool:
        """Whether a visit has something to settle or to begin."""
        return bool(self._under_way) or self.useful

    def begin(self) -> None:
        """Read what is missing of the expected, into slots that are free now. None of the expected is evicted."""
        keys, self.expected = self.expected, ()
        present = [key for key in keys if self._residency.slot(key) != ABSENT]
        for key in present:
            self._residency.touch(self._residency.slot(key))
        room = min(self.most - len(self._under_way), self._residency.room_beside(present))
        missing = [key for key in keys if self._residency.slot(key) == ABSENT]
        for key in missing[: max(0, room)]:
            try:
                self._under_way[key] = self._begin(key)
            except CheckpointError:  # a file that is gone: who really needs it will say so
                return
            self.totals.experts += 1

    def judge(self, layer: int, experts: Collection[int]) -> list[Delivery]:
        """The layer wants `experts`: other guesses about it end. Gives the reads that are now waited for."""
        urgent = []
        for key in self._about(layer):
            delivery = self._under_way[key]
            failed = delivery.passage.over and not delivery.passage.landed
            if key.expert not in experts or failed:
                self._drop(key)
            elif not delivery.passage.landed:
                urgent.append(delivery)
        return urgent

    def close(self, layer: int) -> list[Delivery]:
        """The layer's visit is over: what is left about it was right, unless the visit failed before its bytes came."""
        right = []
        for key in self._about(layer):
            delivery = self._under_way.pop(key)
            self._end(key, delivery)
            if self._residency.slot(key) != ABSENT:
                self.totals.right += 1
                self.totals.right_bytes += delivery.needed
                right.append(delivery)
        return right

    def drop_all(self) -> None:
        """The pass is over: nobody asks for the rest any more."""
        self.expected = ()
        for key in list(self._under_way):
            self._drop(key)

    def _about(self, layer: int) -> list[ExpertKey]:
        return [key for key in self._under_way if key.layer == layer]

    def _drop(self, key: ExpertKey) -> None:
        delivery = self._under_way.pop(key)
        self._end(key, delivery)
        self.totals.wasted_bytes += delivery.passage.read
