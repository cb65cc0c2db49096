"""Large pages of memory for weights. Knows no torch: it has to be said before torch is imported."""

from __future__ import annotations

import os


def use_huge_pages() -> None:
    """Let torch ask for pages of 2 MiB where it allocates as much, unless the user said otherwise: a token reads some
    hundred MB of weights, and with pages of 4 KiB finding them costs about a quarter of the time. Linux grants them
    where /sys/kernel/mm/transparent_hugepage/enabled says `madvise` or `always`; else nothing changes. No effect once
    torch has allocated memory.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
