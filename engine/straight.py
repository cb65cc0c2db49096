"""The way of bytes that are in the file as they are in a slot: the reader's threads put them where they are used."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from torch import Tensor

from engine.delivery import Passage
from engine.layout import SlotLayout
from engine.reader import Reader
from engine.residency import Load
from engine.transfer import Bytes, Extent, Transfer
from store.experts import ExpertMap

BIG = 2**20  # bytes of an expert from which it is awaited by itself; smaller ones are read layer by layer


class Straight:
    """For a layout that is `direct`, on the CPU."""

    def __init__(self, layout: SlotLayout, experts: ExpertMap, memory: Tensor, reader: Reader) -> None:
        """`memory` u8 [S, slot_bytes] are the slots."""
        self._layout, self._experts, self._reader = layout, experts, reader
        self._host: Bytes = memory.numpy()
        self._big = min(experts.expert_bytes) >= BIG

    def groups(self, loads: Sequence[Load]) -> list[list[Load]]:
        """What is awaited together."""
        return [list(group) for _, group in groupby(loads, key=lambda load: load.key if self._big else load.key.layer)]

    def start(self, groups: Sequence[Sequence[Load]], urgent: bool) -> Transfer:
        return self._reader.start([self._extents(group) for group in groups], urgent)

    def hurry(self, passage: Passage) -> None:
        self._reader.hurry(passage)

    def work(self, seconds: float) -> None:
        """There is nothing for the owner to do."""

    @property
    def bytes_per_second(self) -> None:
        """Of the owner's own work, which there is none of."""

    def _extents(self, loads: Sequence[Load]) -> list[Extent]:
        extents = []
        for load in loads:
            slot = self._host[load.slot]
            for part in self._experts.span(load.key).parts:
                start, end = self._layout.byte_range(part.projection)
                extents.append(Extent(part.file, part.offset, part.nbytes, slot[start:end]))
        return extents
