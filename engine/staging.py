"""Buffers of the host between file and slot, for bytes that change on the way: cast, scattered, for another device.

Experts lie in a buffer as they are stored. Knows which bytes go where, not which are read when (engine/ring.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.conversion import needs_scratch
from engine.fp8 import Scratch
from engine.layout import SlotLayout
from engine.plan import RingShape
from engine.transfer import Bytes, Extent
from store.experts import ALIGN, ExpertMap, ExpertSpan
from store.quantised import EIGHT_BITS
from store.records import ExpertKey


class Buffer:
    """u8 [nbytes], touched before its first use, and pinned where a device of its own copies out of it."""

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        self.memory = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned)
        self.memory.fill_(0)  # zeros alone may be pages that are not there yet
        self.bytes: Bytes = self.memory.numpy()  # the same memory


class Staging:
    """The buffers, and how what is in one becomes what is in slots. Its device's owner's."""

    def __init__(self, layout: SlotLayout, experts: ExpertMap, shape: RingShape, device: torch.device) -> None:
        self._layout, self._nbytes = layout, shape.nbytes
        self.buffers = [Buffer(shape.nbytes, pinned=device.type == "cuda") for _ in range(shape.buffers)]
        converts = layout.block is not None and needs_scratch(layout.dtype, on_host=device.type == "cpu")
        self._scratch = _scratch(experts, device) if converts else None
        self._device = None if device.type == "cpu" else _DeviceCopy(shape.nbytes, device)

    @property
    def nbytes(self) -> int:
        """Of all memory that it holds, on the host and on the device."""
        copy = 0 if self._device is None else self._nbytes
        return len(self.buffers) * self._nbytes + copy + (0 if self._scratch is None else self._scratch.nbytes)

    def has_room(self, spans: Sequence[ExpertSpan]) -> bool:
        """Whether one buffer holds them all."""
        return sum(_length(span) for span in spans) <= self._nbytes

    def extents(self, buffer: Buffer, spans: Sequence[ExpertSpan]) -> list[Extent]:
        """What is read where for these experts."""
        return [
            Extent(part.file, part.offset, part.nbytes, buffer.bytes[start + first : start + last])
            for span, start in _placed(spans)
            for part, first, last in span.places()
        ]

    def fill(
        self, buffer: Buffer, spans: Sequence[ExpertSpan], views: Sequence[Sequence[Tensor]]
    ) -> torch.cuda.Event | None:
        """From a buffer that holds `spans` into the slots whose parameters are `views`, in the same order.

        Returns what is to be waited for before slots or buffer are used; None where it is done.
        """
        if self._device is None:
            self._fill(buffer.memory, spans, views)
            return None
        with self._device.bring(buffer.memory[: sum(map(_length, spans))]) as stored:
            self._fill(stored, spans, views)
        return self._device.mark()

    def _fill(self, stored: Tensor, spans: Sequence[ExpertSpan], views: Sequence[Sequence[Tensor]]) -> None:
        for (span, start), its_views in zip(_placed(spans), views, strict=True):
            self._layout.fill(its_views, span, stored[start:], self._scratch)


class _DeviceCopy:
    """Where stored bytes lie on a device of its own before they become slots there.

    On CUDA all of it happens in order on one side stream, so one copy is enough for all buffers. Not tried on a GPU.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._memory = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        if self._stream is not None:  # the zeros come first
            self._stream.wait_stream(torch.cuda.current_stream(device))

    @contextmanager
    def bring(self, host: Tensor) -> Iterator[Tensor]:
        """While this is open, what is done with the copy of `host` follows its arrival, and what computes already.

        Slots that are filled next may have held experts that the device has yet to compute with.
        """
        stored = self._memory[: len(host)]
        if self._stream is None:
            yield stored.copy_(host)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._memory.device))
        with torch.cuda.stream(self._stream):
            yield stored.copy_(host, non_blocking=True)

    def mark(self) -> torch.cuda.Event | None:
        """It is over when all has been done that was begun until now."""
        return None if self._stream is None else self._stream.record_event()


def _scratch(experts: ExpertMap, device: torch.device) -> Scratch | None:
    """For the largest FP8 part of any expert; None where there is none."""
    spans = [experts.span(ExpertKey(layer, 0)) for layer in range(len(experts.layers))]
    shapes = {part.shape for span in spans for part in span.parts if part.dtype == EIGHT_BITS}
    return Scratch(shapes, device) if shapes else None


def _placed(spans: Sequence[ExpertSpan]) -> Iterator[tuple[ExpertSpan, int]]:
    """Each with its first byte in a buffer that holds them all."""
    start = 0
    for span in spans:
        yield span, start
        start += _length(span)


def _length(span: ExpertSpan) -> int:
    """What it takes in a buffer, so that the next one begins aligned."""
    return max(-(-end // ALIGN) * ALIGN for _, _, end in span.places())
