"""Progress for a program: one JSON line a step on standard output, and an end with the parent that reads them."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from profiler.progress import Progress, Report

PARENT_DIED = 130


@contextmanager
def lines() -> Iterator[Report]:
    """Standard input belongs to the parent and is never written: when it closes, the parent is gone, and so is this
    process, at once. What it had summed up is on disk, so the next run goes on there."""
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def report(step: Progress) -> None:
        sys.stdout.write(json.dumps({"progress": asdict(step)}) + "\n")
        sys.stdout.flush()

    yield report


def _end_with_parent() -> None:
    while os.read(0, 1024):  # not sys.stdin: a thread that holds its lock would trouble the interpreter's own end
        pass
    os._exit(PARENT_DIED)
