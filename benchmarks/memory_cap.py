"""Runs a command under a hard memory cap that counts the page cache, by a control group of its own (v1 or v2)."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from store.errors import MoepagerError

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended. `peak_bytes` is the group's, page cache included; `oom_kills` counts killed processes."""

    code: int
    output: str
    errors: str
    peak_bytes: int
    oom_kills: int


class Group:
    """One control group: where its limit is written and its counters are read."""

    def __init__(self, folder: Path, *, v1: bool) -> None:
        self.folder = folder
        self._limit, self._peak, self._events = (
            ("memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control")
            if v1
            else ("memory.max", "memory.peak", "memory.events")
        )
        self._swap = None if v1 else "memory.swap.max"

    def limit(self, size: int) -> None:
        (self.folder / self._limit).write_text(str(size))
        if self._swap is not None and (self.folder / self._swap).exists():
            (self.folder / self._swap).write_text("0")

    def peak(self) -> int:
        return int((self.folder / self._peak).read_text())

    def oom_kills(self) -> int:
        lines = dict(line.split() for line in (self.folder / self._events).read_text().splitlines())
        return int(lines.get("oom_kill", 0))


def available() -> str | None:
    """None where a cap can be set here, else why not."""
    try:
        with _group():
            return None
    except OSError as error:
        return f"no memory control group can be made here ({error.strerror}: {error.filename})"


def run_capped(command: Sequence[str], cap: int | None, environment: Mapping[str, str], seconds: float) -> Ended:
    """Run to the end, at most `seconds` long, under `cap` bytes. Raises MoepagerError where no cap can be set."""
    if cap is not None and (reason := available()):
        raise MoepagerError(f"A memory cap was asked for, but {reason}. Run as root, or leave --cap out.")
    if cap is None:
        done = subprocess.run(
            command, capture_output=True, text=True, env=dict(environment), timeout=seconds, check=False
        )
        return Ended(done.returncode, done.stdout, done.stderr, 0, 0)
    with _group() as group:
        group.limit(cap)
        enter = f'echo $$ > "{group.folder}/cgroup.procs" && exec "$@"'
        shell = [shutil.which("sh") or "/bin/sh", "-c", enter, "capped", *command]
        done = subprocess.run(
            shell, capture_output=True, text=True, env=dict(environment), timeout=seconds, check=False
        )
        return Ended(done.returncode, done.stdout, done.stderr, group.peak(), group.oom_kills())


def _run(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=dict(environment), timeout=seconds, check=False)


@contextmanager
def _group() -> Iterator[Group]:
    v1 = (V1 / "memory.limit_in_bytes").exists()
    folder = Path(tempfile.mkdtemp(prefix="moepager-", dir=V1 if v1 else V2))
    try:
        yield Group(folder, v1=v1)
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """The last process of a group takes a moment to be gone."""
    for _ in range(50):
        try:
            folder.rmdir()
        except OSError:
            time.sleep(0.1)
        else:
            return


def drop_page_cache(files: Sequence[Path]) -> None:
    """A cap is void over pages that somebody else was charged for: they go first."""
    from benchmarks.page_cache import evict  # noqa: PLC0415 - it maps files, which a capped child must not need

    os.sync()
    evict(files)
