"""A host buffer between file and slot, for bytes that change on the way: cast, scattered, for another device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.layout import SlotLayout
from engine.reader import Reader, ReadReport
from engine.transfer import Extent
from store.experts import ExpertSpan


class Staging:
    """Holds one expert as it is stored."""

    def __init__(self, layout: SlotLayout, nbytes: int, device: torch.device) -> None:
        self._layout = layout
        self._tensor = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._bytes = np.asarray(self._tensor.numpy())  # the same memory

    @property
    def nbytes(self) -> int:
        return self._tensor.nbytes

    def read(self, span: ExpertSpan, views: Sequence[Tensor], reader: Reader) -> ReadReport:
        """Fill a slot's `views` with the expert; returns once its bytes are there. Raises CheckpointError."""
        report = reader.read(
            [Extent(part.file, part.offset, part.nbytes, self._bytes[start:end]) for part, start, end in span.places()]
        )
        self._layout.fill(views, span, self._tensor)
        return report
