"""A cap that does not hold would make every figure under it worthless."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.memory_cap import Group, available, run_capped

reason = available()
needs_groups = pytest.mark.skipif(reason is not None, reason=reason or "")


@needs_groups
def test_a_process_that_takes_more_than_the_cap_is_killed() -> None:
    ended = run_capped([sys.executable, "-c", "x = bytearray(200 << 20)"], 64 << 20, os.environ, 60)
    assert ended.code != 0
    assert ended.oom_kills >= 1


@needs_groups
def test_a_process_within_the_cap_runs_and_its_peak_is_told() -> None:
    ended = run_capped([sys.executable, "-c", "x = bytearray(40 << 20); print('fine')"], 128 << 20, os.environ, 60)
    assert (ended.code, ended.output) == (0, "fine\n")
    assert 40 << 20 < ended.peak_bytes < 128 << 20


@needs_groups
@pytest.mark.parametrize("cap", [200 << 20, None])
def test_memory_of_its_own_and_page_cache_are_told_apart(tmp_path: Path, cap: int | None) -> None:
    """Also what comes and goes again before the process ends."""
    script = (
        "import time; x = bytearray(40 << 20); time.sleep(0.1); del x\n"
        f"open({str(tmp_path / 'data')!r}, 'wb').write(bytes(20 << 20)); time.sleep(0.1)"
    )
    ended = run_capped([sys.executable, "-c", script], cap, os.environ, 60)
    assert ended.code == 0
    assert ended.peak_cache_bytes is not None
    assert 40 << 20 < ended.peak_anon_bytes < 60 << 20
    assert 19 << 20 < ended.peak_cache_bytes < 40 << 20  # the kernel counts pages in batches, some dozens at a time


def test_swap_is_bounded_with_memory_where_the_kernel_counts_it(tmp_path: Path) -> None:
    (tmp_path / "memory.memsw.limit_in_bytes").touch()
    Group(tmp_path, v1=True).limit(1 << 20)
    assert (tmp_path / "memory.limit_in_bytes").read_text() == "1048576"
    assert (tmp_path / "memory.memsw.limit_in_bytes").read_text() == "1048576"


def test_without_groups_a_process_is_watched_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.memory_cap.available", lambda: "none here")
    script = "import time; x = bytearray(40 << 20); time.sleep(0.1)"
    ended = run_capped([sys.executable, "-c", script], None, os.environ, 60)
    assert ended.peak_cache_bytes is None
    assert 40 << 20 < ended.peak_anon_bytes < 60 << 20


def test_a_command_that_takes_too_long_is_ended_and_says_so() -> None:
    started = time.perf_counter()
    ended = run_capped(["/bin/sh", "-c", "echo begun; sleep 30 & wait"], None, os.environ, 0.2)
    assert time.perf_counter() - started < 5
    assert (ended.code, ended.output) == (-9, "begun\n")
    assert ended.errors.splitlines()[-1] == "not done after 0.2 s"


def test_without_a_cap_the_command_just_runs() -> None:
    ended = run_capped([sys.executable, "-c", "raise SystemExit(3)"], None, os.environ, 60)
    assert (ended.code, ended.oom_kills) == (3, 0)
