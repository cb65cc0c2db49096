"""Bytes of experts on their way into slots: begun, awaited, given up, accounted for.

Decides nothing about which expert is where (engine/residency.py) nor for whom (engine/bank.py). The bank's thread's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from math import inf

from torch import Tensor

from engine.delivery import Delivery, Way
from engine.layout import SlotLayout
from engine.paged import Paged
from engine.reader import Reader
from engine.residency import Load, Residency
from engine.ring import Ring
from engine.straight import Straight
from store.experts import ExpertMap
from store.records import ExpertKey

GLANCE_SECONDS = 0.02  # between two looks whether a wait shall be broken off
SLICE_SECONDS = 0.02  # of emptying buffers in one `work`


class Interrupted(Exception):  # noqa: N818 - not an error
    """A pass that waited for experts was broken off, because there is something to do that needs none of them.

    Its reads go on: what they bring is pinned, for whoever catches this to let go.
    """

    keys: Sequence[ExpertKey] = ()


class Arrivals:
    """Straight from the file into the slot where file bytes are slot bytes, else by way of a ring of buffers."""

    def __init__(
        self, layout: SlotLayout, experts: ExpertMap, memory: Tensor, views: Sequence[tuple[Tensor, ...]],
        residency: Residency, reader: Reader,
    ) -> None:  # fmt: skip
        """`memory` u8 [S, slot_bytes] are the slots, `views` their parameters."""
        self.paged = Paged()
        self.interrupted: Callable[[float], bool] | None = None  # asked while a pass waits: for how many seconds by now
        self.direct = layout.direct and memory.device.type == "cpu"
        self.way: Way = (
            Straight(layout, experts, memory, reader)
            if self.direct
            else Ring(layout, experts, views, reader, memory.device)
        )
        self._experts, self._residency = experts, residency
        self._arriving: dict[ExpertKey, Delivery] = {}

    def begin(self, loads: Sequence[Load], *, urgent: bool, guess: bool = False) -> Delivery | None:
        """Begin to fill the slots."""
        if not loads:
            return None
        groups = self.way.groups(loads)
        needed = self.nbytes(load.key for load in loads)
        delivery = Delivery(self.way.start(groups, urgent), groups, needed, guess=guess)
        self._arriving.update(dict.fromkeys(delivery.group, delivery))
        if not guess:
            self.paged.count(len(loads), needed)
        return delivery

    def hurry(self, delivery: Delivery) -> None:
        """It overtakes all that is not waited for."""
        self.way.hurry(delivery.passage)

    def work(self) -> None:
        """A slice of what only the owner can do so that experts get into their slots."""
        self.way.work(SLICE_SECONDS)

    def wait_for(self, key: ExpertKey, seconds: float = inf) -> None:
        """Until the bytes of a pinned key are there, `seconds` are over, or the wait is interrupted.

        A read that failed is over; whoever asks next begins another.
        """
        slot = self._residency.slot(key)
        if slot not in self._residency.unfilled:
            return
        delivery = self._arriving.get(key) or self.begin([Load(key, slot)], urgent=True)
        assert delivery is not None, key
        began = time.perf_counter()
        try:
            while not delivery.passage.wait(delivery.group[key], GLANCE_SECONDS if self.interrupted else seconds):
                if self.interrupted is None:
                    return
                if self.interrupted(time.perf_counter() - began):
                    raise Interrupted
        except Interrupted:  # the read goes on
            raise
        except BaseException:
            self._settle(delivery)
            raise
        finally:
            self.paged.waited += time.perf_counter() - began
        if delivery.passage.landed:
            self._settle(delivery)
        else:
            self._arrived(key)

    def look_after(self, keys: Iterable[ExpertKey]) -> None:
        """Without waiting: account for what has landed of the reads that bring `keys`. Raises what made one fail."""
        for delivery in dict.fromkeys(self._arriving[key] for key in keys if key in self._arriving):
            failure = delivery.passage.failure
            if failure is not None or delivery.passage.landed:
                self._settle(delivery)
            if failure is not None:
                raise failure

    def give_up(self, keys: Iterable[ExpertKey]) -> None:
        """The last that holds `keys` lets go: a read under way that brings one of those that nobody else leases is
        given up, and whoever leases another of its keys reads that again."""
        if not self._arriving:
            return
        going = [key for key in keys if self._residency.is_last(key)]
        for delivery in dict.fromkeys(self._arriving[key] for key in going if key in self._arriving):
            self._settle(delivery)

    def is_under_way(self, key: ExpertKey) -> bool:
        """Whether the reader has it, and will bring it or fail."""
        return key in self._arriving

    def is_lost(self, key: ExpertKey) -> bool:
        """Whether the key has a slot, but nobody is reading its bytes any more: they failed, or were given up."""
        unread = self._residency.slot(key) in self._residency.unfilled
        return unread and key not in self._arriving

    def nbytes(self, keys: Iterable[ExpertKey]) -> int:
        return sum(self._experts.span(key).nbytes for key in keys)

    def _settle(self, delivery: Delivery) -> None:
        """Nothing of a delivery lands after this; what is there counts as there."""
        delivery.passage.cancel()
        mine = [key for key in delivery.group if self._arriving.get(key) is delivery]
        for key in mine:
            if delivery.passage.has(delivery.group[key]):
                self._arrived(key)
            else:
                del self._arriving[key]
                if not delivery.guess:
                    self.paged.count(-1, -self._experts.span(key).nbytes)
        if not delivery.settled:
            delivery.settled = True
            self.paged.bytes_read += delivery.passage.read
            self.paged.seconds += 0.0 if delivery.guess else delivery.passage.seconds

    def _arrived(self, key: ExpertKey) -> None:
        del self._arriving[key]
        self._residency.landed(key)
