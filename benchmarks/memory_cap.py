"""Runs a command under a hard memory cap that counts the page cache, by a control group of its own (v1 or v2)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.own_counters import anonymous_bytes
from benchmarks.watch import Watch
from store.errors import MoepagerError

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended. `peak_bytes` is the group's, page cache included; `oom_kills` counts killed processes.

    `peak_anon_bytes` and `peak_cache_bytes` are the highest of what was seen of each in the background, at different
    moments perhaps. Without a group the former is the process's own and the latter is not known: None.
    """

    code: int
    output: str
    errors: str
    peak_bytes: int
    oom_kills: int
    peak_anon_bytes: int = 0
    peak_cache_bytes: int | None = None


class Group:
    """One control group: where its limit is written and its counters are read."""

    def __init__(self, folder: Path, *, v1: bool) -> None:
        self.folder, self._v1 = folder, v1
        self._limit, self._peak, self._events = (
            ("memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control")
            if v1
            else ("memory.max", "memory.peak", "memory.events")
        )
        self._anon, self._cache = ("total_rss", "total_cache") if v1 else ("anon", "file")

    def limit(self, size: int) -> None:
        """At most `size` bytes, and none of them moved to swap, where the kernel counts swap."""
        (self.folder / self._limit).write_text(str(size))
        # v1 bounds memory and swap together, never below the limit of memory alone: so it is written second.
        name, bound = ("memory.memsw.limit_in_bytes", size) if self._v1 else ("memory.swap.max", 0)
        if (self.folder / name).exists():
            (self.folder / name).write_text(str(bound))

    def peak(self) -> int:
        return int((self.folder / self._peak).read_text())

    def oom_kills(self) -> int:
        return self._counters(self._events).get("oom_kill", 0)

    def held(self) -> tuple[int, int]:
        """Bytes of anonymous memory and of page cache, now."""
        counters = self._counters("memory.stat")
        return counters[self._anon], counters[self._cache]

    def _counters(self, name: str) -> dict[str, int]:
        lines = (line.split() for line in (self.folder / name).read_text().splitlines())
        return {word: int(number) for word, number in lines}


def available() -> str | None:
    """None where a cap can be set here, else why not."""
    try:
        with _group():
            return None
    except OSError as error:
        return f"no memory control group can be made here ({error.strerror}: {error.filename})"


def run_capped(command: Sequence[str], cap: int | None, environment: Mapping[str, str], seconds: float) -> Ended:
    """Run to the end under `cap` bytes; one that takes more than `seconds` is killed and says so in `errors`.

    Without a cap the group only counts, where there can be one. Raises MoepagerError where no cap can be set.
    """
    if reason := available():
        if cap is not None:
            raise MoepagerError(f"A memory cap was asked for, but {reason}. Run as root, or leave --cap out.")
        process = _start(command, environment)
        with Watch(lambda: (anonymous_bytes(process.pid), 0)) as watch:
            code, output, errors = _end(process, seconds)
        return Ended(code, output, errors, 0, 0, watch.anon)
    with _group() as group:
        if cap is not None:
            group.limit(cap)
        enter = f'echo $$ > "{group.folder}/cgroup.procs" && exec "$@"'
        shell = [shutil.which("sh") or "/bin/sh", "-c", enter, "capped", *command]
        with Watch(group.held) as watch:
            code, output, errors = _end(_start(shell, environment), seconds)
        return Ended(code, output, errors, group.peak(), group.oom_kills(), watch.anon, watch.cache)


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """In a session of its own, so that what it starts can be ended with it."""
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=dict(environment), start_new_session=True)


def _end(process: subprocess.Popen[str], seconds: float) -> tuple[int, str, str]:
    """Exit code, output and errors of a process; it is never left running."""
    late = ""
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        late = f"\nnot done after {seconds:g} s"
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output, errors + late


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
