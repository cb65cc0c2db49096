"""How far a run is, told to whoever asks: a bar, a log, a job row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["answer", "calibrate", "evaluate", "quantise", "convert"]


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` items (answer, calibrate), selections (evaluate) or layers (quantise) of a task."""

    task: str
    stage: Stage
    done: int
    total: int


Report = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """Tells nobody."""
