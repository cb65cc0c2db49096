"""What a bank has paged in since it was opened. Counts only; the bank says what counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Paged:
    """Running totals since open. `bytes_read` counts alignment and holes too, `bytes_needed` the experts alone.

    A guess counts as needed once it proved right, and only then; `seconds` are those of reads that were no guess.
    """

    experts: int = 0
    bytes_needed: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # seconds in which the owner stood still for reads

    def count(self, experts: int, needed: int) -> None:
        self.experts += experts
        self.bytes_needed += needed
