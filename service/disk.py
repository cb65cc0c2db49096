"""How fast the disk under a model gives its experts: a short cold read of them, by the engine's own reader."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engine.card import ModelCard
from engine.plan import READER_THREADS, reader_bytes
from engine.reader import Access, Reader
from engine.transfer import Bytes, Extent, Transfer
from store.checkpoint import CheckpointMap
from store.experts import ExpertMap

BATCH = 32 * 2**20  # bytes of a transfer; two are under way, so that no thread waits for the end of one
SECONDS = 0.5  # long enough to be right within tens of percent, short enough for a command that only plans
MOST = 2**30


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    bytes: int
    seconds: float
    access: Access

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds


def measure_disk(card: ModelCard, seconds: float = SECONDS) -> DiskSpeed:
    """Read every other expert, layer after layer, as a swap does: so many threads, requests of that length, past the
    page cache where the file system allows it. A small model is read again and again."""
    checkpoint = CheckpointMap.open(card.folder)
    read, under_way = 0, deque[tuple[Transfer, int]]()
    with Reader(reader_bytes(card), READER_THREADS) as reader:
        reader.hold(checkpoint.identities)
        batches = itertools.cycle(_batches(ExpertMap.build(checkpoint)))
        started = time.perf_counter()
        while (going := time.perf_counter() - started < seconds and read < MOST) or under_way:
            if going and len(under_way) < 2:
                batch = next(batches)
                under_way.append((reader.start([batch]), sum(extent.nbytes for extent in batch)))
                continue
            transfer, size = under_way.popleft()
            transfer.wait_all()
            read += size
        return DiskSpeed(read, time.perf_counter() - started, reader.access)


def show_access(access: Access) -> str:
    """For people."""
    if access.why is None:
        return "by direct reads, past the page cache"
    some = "some files " if access.name == "mixed" else ""
    return f"{some}through the page cache ({access.why}): a local file system such as ext4 or xfs reads faster"


def _batches(experts: ExpertMap) -> Iterator[list[Extent]]:
    """What is read is dropped: all of it goes to the same place."""
    scrap: Bytes = np.zeros(max(experts.expert_bytes), np.uint8)
    batch: list[Extent] = []
    for span in (span for layer in experts.spans for span in layer[::2]):
        batch += [Extent(part.file, part.offset, part.nbytes, scrap[: part.nbytes]) for part in span.parts]
        if sum(extent.nbytes for extent in batch) >= BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
