"""Bytes of experts on their way into slots: begun, awaited, given up, accounted for.

Decides nothing about which expert is where (engine/residency.py) nor for whom (engine/bank.py). The bank's thread's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from math import inf

from torch import Tensor

from engine.delivery import Delivery
from engine.layout import SlotLayout
from engine.paged import Paged
from engine.reader import Reader
from engine.residency import Load, Residency
from engine.staging import Staging
from engine.transfer import Bytes, Extent
from store.experts import ExpertMap
from store.records import ExpertKey

BIG = 2**20  # bytes of an expert from which it is awaited by itself; smaller ones are read layer by layer
GLANCE_SECONDS = 0.02  # between two looks whether a wait shall be broken off
SLICE_SECONDS = 0.02  # of reading in one `read_slice`, where it can't be done beside


class Interrupted(Exception):  # noqa: N818 - not an error
    """A pass that waited for experts was broken off, because there is something to do that needs none of them.

    Its reads go on: what they bring is pinned, for whoever catches this to let go.
    """

    keys: Sequence[ExpertKey] = ()


class Arrivals:
    """Straight from the file into the slot where the layout allows it, by the reader's threads; else through a host
    buffer, by the owner itself."""

    def __init__(
        self, layout: SlotLayout, experts: ExpertMap, memory: Tensor, views: Sequence[tuple[Tensor, ...]],
        residency: Residency, reader: Reader,
    ) -> None:  # fmt: skip
        """`memory` u8 [S, slot_bytes] are the slots, `views` their parameters."""
        self.paged = Paged()
        self.interrupted: Callable[[float], bool] | None = None  # asked while a pass waits: for how many seconds by now
        self.direct = layout.direct and memory.device.type == "cpu"
        self.staging = None if self.direct else Staging(layout, experts.staged_bytes, memory.device)
        self._views = views
        self._layout, self._experts, self._residency, self._reader = layout, experts, residency, reader
        self._host: Bytes | None = memory.numpy() if self.direct else None
        self._arriving: dict[ExpertKey, Delivery] = {}
        self._queued: dict[ExpertKey, Load] = {}  # leased ahead, to be read by us when it suits
        self._staged: dict[ExpertKey, float] = {}  # seconds that an expert's last read through the host buffer took

    def begin(self, loads: Sequence[Load], *, urgent: bool, guess: bool = False) -> Delivery | None:
        """Begin to fill the slots. What can't go straight from the file into a slot is read by the owner itself: at
        once where it is urgent, else when it is asked for, or in slices."""
        if not loads:
            return None
        if not self.direct and urgent:
            self._read_staged(loads)
            return None
        if not self.direct:
            for load in loads:
                self._queued[load.key] = load
                self._staged.pop(load.key, None)
            return None
        big = min(self._experts.expert_bytes) >= BIG
        groups = [list(group) for _, group in groupby(loads, key=lambda load: load.key if big else load.key.layer)]
        transfer = self._reader.start([self._extents(group) for group in groups], urgent)
        needed = self.nbytes(load.key for load in loads)
        delivery = Delivery(transfer, groups, needed, guess=guess)
        self._arriving.update(dict.fromkeys(delivery.group, delivery))
        if not guess:
            self.paged.count(len(loads), needed)
        return delivery

    def hurry(self, delivery: Delivery) -> None:
        """It overtakes all that is not waited for."""
        self._reader.hurry(delivery.transfer)

    def wait_for(self, key: ExpertKey, seconds: float = inf) -> None:
        """Until the bytes of a pinned key are there, `seconds` are over, or the wait is interrupted.

        A read that failed is over; whoever asks next begins another.
        """
        slot = self._residency.slot(key)
        if slot not in self._residency.unfilled:
            return
        self._queued.pop(key, None)
        delivery = self._arriving.get(key) or self.begin([Load(key, slot)], urgent=True)
        assert delivery is not None or slot not in self._residency.unfilled, key
        if delivery is None:
            return
        began = time.perf_counter()
        try:
            while not delivery.transfer.wait(delivery.group[key], GLANCE_SECONDS if self.interrupted else seconds):
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
        if delivery.transfer.landed:
            self._settle(delivery)
        else:
            self._arrived(key)

    def look_after(self, keys: Iterable[ExpertKey]) -> None:
        """Without waiting: account for what has landed of the reads that bring `keys`. Raises what made one fail."""
        for delivery in dict.fromkeys(self._arriving[key] for key in keys if key in self._arriving):
            failure = delivery.transfer.failure
            if failure is not None or delivery.transfer.landed:
                self._settle(delivery)
            if failure is not None:
                raise failure

    def read_slice(self) -> None:
        """Some of what only the owner can read, one expert at least."""
        until = time.perf_counter() + SLICE_SECONDS
        while self._queued:
            self._read_staged([self._queued.pop(next(iter(self._queued)))])
            if time.perf_counter() >= until:
                return

    def give_up(self, keys: Iterable[ExpertKey]) -> None:
        """The last that holds `keys` lets go: a read under way that brings one of those that nobody else leases is
        given up, and whoever leases another of its keys reads that again."""
        if not self._arriving and not self._queued:
            return
        going = [key for key in keys if self._residency.is_last(key)]
        for key in going:
            self._queued.pop(key, None)
        for delivery in dict.fromkeys(self._arriving[key] for key in going if key in self._arriving):
            self._settle(delivery)

    def is_under_way(self, key: ExpertKey) -> bool:
        """Whether the reader has it, and will bring it or fail."""
        return key in self._arriving

    def is_lost(self, key: ExpertKey) -> bool:
        """Whether the key has a slot, but nobody is reading its bytes any more: they failed, or were given up."""
        unread = self._residency.slot(key) in self._residency.unfilled
        return unread and key not in self._arriving and key not in self._queued

    def nbytes(self, keys: Iterable[ExpertKey]) -> int:
        return sum(self._experts.span(key).nbytes for key in keys)

    def staged_seconds(self, loads: Sequence[Load]) -> float:
        """How long the reads of `loads` took that went through the host buffer, one after the other."""
        return sum(self._staged.get(load.key, 0.0) for load in loads)

    def _settle(self, delivery: Delivery) -> None:
        """Nothing of a delivery lands after this; what is there counts as there."""
        delivery.transfer.cancel()
        mine = [key for key in delivery.group if self._arriving.get(key) is delivery]
        for key in mine:
            if delivery.transfer.has(delivery.group[key]):
                self._arrived(key)
            else:
                del self._arriving[key]
                if not delivery.guess:
                    self.paged.count(-1, -self._experts.span(key).nbytes)
        if not delivery.settled:
            delivery.settled = True
            self.paged.bytes_read += delivery.transfer.read
            self.paged.seconds += 0.0 if delivery.guess else delivery.transfer.seconds

    def _arrived(self, key: ExpertKey) -> None:
        del self._arriving[key]
        self._residency.landed(key)

    def _extents(self, loads: Sequence[Load]) -> list[Extent]:
        """File bytes are slot bytes: the reader puts them where they are used."""
        assert self._host is not None
        extents = []
        for load in loads:
            slot = self._host[load.slot]
            for part in self._experts.span(load.key).parts:
                start, end = self._layout.byte_range(part.projection)
                extents.append(Extent(part.file, part.offset, part.nbytes, slot[start:end]))
        return extents

    def _read_staged(self, loads: Sequence[Load]) -> None:
        assert self.staging is not None
        for load in loads:
            report = self.staging.read(self._experts.span(load.key), self._views[load.slot], self._reader)
            self._residency.landed(load.key)
            self.paged.count(1, report.needed)
            self.paged.bytes_read += report.read
            self.paged.seconds += report.seconds
            self._staged[load.key] = report.seconds
