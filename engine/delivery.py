"""Loads under way, as the bank keeps them: how they come, and which group of a passage brings which expert."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Protocol

from engine.residency import Load


class Passage(Protocol):
    """Groups of experts on their way into their slots, failing together: a transfer, or a relay by way of buffers.

    The owner's alone. Nothing gets into a slot any more once it was cancelled, or has failed.
    """

    read: int  # bytes that came from the files
    seconds: float  # from start to the last group that was there

    @property
    def landed(self) -> bool:
        """Whether all of it is there."""

    @property
    def over(self) -> bool:
        """Whether nothing more will come: all of it is there, or it failed."""

    @property
    def failure(self) -> BaseException | None:
        """What made it fail, a disk that stalls included; None where it goes on, has landed, or was given up."""

    def has(self, group: int) -> bool: ...

    def wait(self, group: int, seconds: float = inf) -> bool:
        """Whether the group is there, after at most `seconds`. Raises what made the passage fail."""

    def cancel(self) -> None: ...


class Way(Protocol):
    """From the file into a slot: straight, or by way of a buffer."""

    def groups(self, loads: Sequence[Load]) -> list[list[Load]]:
        """What is awaited together."""

    def start(self, groups: Sequence[Sequence[Load]], urgent: bool) -> Passage:
        """Begin, and return at once. What is urgent overtakes what is not. Raises CheckpointError."""

    def hurry(self, passage: Passage) -> None:
        """It overtakes all that is not waited for."""

    def work(self, seconds: float) -> None:
        """Do some of what only the owner can do, for about so long, and wait for nothing."""

    @property
    def bytes_per_second(self) -> float | None:
        """How fast the owner's own work is, in bytes of files; None where there is none, or none was done yet."""


class Delivery:
    """`needed` are the experts' own bytes. A `guess` is not known to be needed, and nobody waits for it yet."""

    def __init__(self, passage: Passage, groups: Sequence[Sequence[Load]], needed: int, *, guess: bool = False) -> None:
        self.passage, self.needed, self.guess, self.settled = passage, needed, guess, False
        self.group = {load.key: group for group, loads in enumerate(groups) for load in loads}
