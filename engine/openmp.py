"""How threads wait for work. Knows no torch: it has to be said before torch is imported."""

from __future__ import annotations

import os


def wait_passively() -> None:
    """Let idle OpenMP threads sleep, unless the user said otherwise. By default they spin, and then one busy core makes
    two threads 20 to 70 times slower than one. No effect once torch is imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
