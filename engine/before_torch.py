"""What torch has to be told by the environment: before it is imported, and without importing it."""

from __future__ import annotations

import os


def prepare_process() -> None:
    """What the user said stays. No effect once torch is imported, or has allocated memory.

    Idle OpenMP threads sleep: by default they spin, and then one busy core makes two threads 20 to 70 times slower than
    one. Torch asks for pages of 2 MiB where it allocates as much: a token reads some hundred MB of weights, and with
    pages of 4 KiB finding them costs about a quarter of the time. Linux grants them where
    /sys/kernel/mm/transparent_hugepage/enabled says `madvise` or `always`; else nothing changes.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
