"""What the kernel counts of this very process."""

from __future__ import annotations

import resource
from pathlib import Path


def device_bytes() -> int:
    """Bytes this process made the kernel fetch from storage; mmap'd and direct reads are counted alike."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def anonymous_bytes() -> int:
    """Memory of its own, without the page cache; the peak of everything where the kernel does not tell them apart."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
