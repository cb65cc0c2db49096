"""Views of a bank for whoever wants to know what is in it: plain values, callable from any thread.

They are exact only between tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.bank import Bank


@dataclass(frozen=True, slots=True)
class ResidencySnapshot:
    """What is in the bank now, and what was paged in since open.

    Of what exact mode read ahead (`experts_guessed`), the rest of `guessed_right` was not wanted by the pass that
    guessed it: `bytes_wasted` were read for it, which `bytes_paged` leaves out and `bytes_read` counts.
    """

    slots: int
    resident: int
    leased: int
    slot_bytes: int
    resident_bytes: int
    experts_paged: int
    bytes_paged: int
    bytes_read: int
    paging_seconds: float
    experts_guessed: int
    guessed_right: int
    bytes_wasted: int
    per_layer: tuple[int, ...]

    @classmethod
    def of(cls, bank: Bank) -> ResidencySnapshot:
        residency, paged, guessed = bank.residency, bank.paged, bank.guesses.totals
        return cls(
            slots=residency.slots,
            resident=residency.resident,
            leased=residency.leased,
            slot_bytes=bank.slot_bytes,
            resident_bytes=bank.resident_bytes,
            experts_paged=paged.experts,
            bytes_paged=paged.bytes_needed,
            bytes_read=paged.bytes_read,
            paging_seconds=paged.seconds,
            experts_guessed=guessed.experts,
            guessed_right=guessed.right,
            bytes_wasted=guessed.wasted_bytes,
            per_layer=tuple(sum(slot >= 0 for slot in row) for row in residency.table),
        )


@dataclass(frozen=True, slots=True)
class Occupancy:
    """`table[layer][expert]` is the slot or -1. Of the slots, some are leased by requests, some not read yet."""

    table: tuple[tuple[int, ...], ...]
    leased_slots: tuple[int, ...]
    unfilled_slots: tuple[int, ...]

    @classmethod
    def of(cls, bank: Bank) -> Occupancy:
        residency = bank.residency
        leased = tuple(slot for slot in range(residency.slots) if residency.is_leased(slot))
        return cls(tuple(map(tuple, residency.table)), leased, tuple(sorted(residency.unfilled)))
