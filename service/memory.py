"""How much memory a process may take here: what the machine has left, or a container's limit where that is less."""

from __future__ import annotations

from pathlib import Path


def available_memory(
    meminfo: Path = Path("/proc/meminfo"),
    groups: Path = Path("/proc/self/cgroup"),
    mounted: Path = Path("/sys/fs/cgroup"),
) -> int | None:
    """Bytes; None where the system does not say."""
    known = [left for left in (_of_machine(meminfo), *_of_groups(groups, mounted)) if left is not None]
    return min(known) if known else None


def _of_machine(meminfo: Path) -> int | None:
    if not meminfo.is_file():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _of_groups(groups: Path, mounted: Path) -> list[int | None]:
    """Of the process's control group and all above it, each of which may have a limit."""
    if not groups.is_file():
        return []
    found = []
    for line in groups.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit, used = mounted, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, used = mounted / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = top / path.strip("/")
        # Inside a container the path may be the host's, which is not mounted there; then its own group is the top.
        for folder in (own, *own.parents) if own.is_relative_to(top) else (top,):
            found.append(_left(folder, limit, used))
            if folder == top:
                break
    return found


def _left(folder: Path, limit: str, used: str) -> int | None:
    """None without a limit. Files that are in memory only because they were read give way."""
    try:
        most, taken = (folder / limit).read_text().strip(), int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if most == "max" else max(0, int(most) - taken + int(stat.get("inactive_file", 0)))
