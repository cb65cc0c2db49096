"""A cap that does not hold would make every figure under it worthless."""

from __future__ import annotations

import os
import sys

import pytest

from benchmarks.memory_cap import available, run_capped

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


def test_without_a_cap_the_command_just_runs() -> None:
    ended = run_capped([sys.executable, "-c", "raise SystemExit(3)"], None, os.environ, 60)
    assert (ended.code, ended.oom_kills) == (3, 0)
