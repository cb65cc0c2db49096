"""What the kernel counts of this very process, or of another."""

from __future__ import annotations

import resource
from pathlib import Path


def device_bytes() -> int:
    """Bytes this process made the kernel fetch from storage; mmap'd and direct reads are counted alike."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def anonymous_bytes(pid: int | None = None) -> int:
    """Memory of this process's own, without the page cache; the peak of everything where the kernel does not tell them
    apart. Of another process `pid`: 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid or 'self'}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    for line in lines:
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0 if pid else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
