"""While families' functions are only tried, transformers is not to say that faster ones could be installed: those it
means are for GPUs, and which are served with is not known yet."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

SPEAKER = logging.getLogger("transformers.integrations.hub_kernels")
SAID = "is falling back to its reference PyTorch implementation"


@contextmanager
def no_advice() -> Iterator[None]:
    """Once swallowed it is not said again: docs/operations.md has it."""

    def quiet(record: logging.LogRecord) -> bool:
        return SAID not in record.getMessage()

    SPEAKER.addFilter(quiet)
    try:
        yield
    finally:
        SPEAKER.removeFilter(quiet)
