"""Partial sums on disk: whole or absent, and never two writers."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from profiler.run import Run, hold
from profiler.statistics import Statistics
from store.errors import Conflict


@pytest.fixture
def sums(random_trace, accumulate) -> Statistics:
    return accumulate([random_trace(1), random_trace(2)])


def test_what_is_saved_is_read_back_bit_by_bit(tmp_path, sums):
    Run(tmp_path / "runs", "p", "rows=4").save(3, sums)
    shards, found = Run(tmp_path / "runs", "p", "rows=4").load()
    assert shards == 3
    for name, array in sums.arrays.items():
        assert found.arrays[name].tobytes() == array.tobytes(), name
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["p.npz"]  # nothing half-written lies beside it


def test_a_run_that_was_cut_another_way_starts_afresh(tmp_path, sums):
    Run(tmp_path, "p", "rows=4").save(3, sums)
    assert Run(tmp_path, "p", "rows=8").load() is None
    assert Run(tmp_path, "q", "rows=4").load() is None


@pytest.mark.parametrize("size", [0, 10, 3000])
def test_a_damaged_file_starts_afresh(size, tmp_path, sums):
    run = Run(tmp_path, "p", "rows=4")
    run.save(3, sums)
    path = tmp_path / "p.npz"
    path.write_bytes(path.read_bytes()[:size])
    assert run.load() is None


def test_a_forgotten_run_is_gone(tmp_path, sums):
    run = Run(tmp_path, "p", "rows=4")
    run.save(1, sums)
    run.forget()
    run.forget()
    assert run.load() is None


def test_a_second_process_is_refused_while_the_first_holds_the_name(tmp_path):
    code = "import sys, pathlib; from profiler.run import hold\nwith hold(pathlib.Path(sys.argv[1]), 'task'): pass"
    again = [sys.executable, "-c", code, str(tmp_path)]
    with hold(tmp_path, "task"), hold(tmp_path, "other"):
        refused = subprocess.run(again, capture_output=True, text=True, check=False)
        assert "Another run is profiling the same task" in refused.stderr
        assert refused.returncode != 0
    assert subprocess.run(again, capture_output=True, check=False).returncode == 0


def test_the_name_is_free_again_after_a_failure(tmp_path):
    with pytest.raises(RuntimeError), hold(tmp_path, "task"):
        raise RuntimeError
    with hold(tmp_path, "task"), pytest.raises(Conflict), hold(tmp_path, "task"):
        pass


def test_a_saved_file_holds_plain_arrays(tmp_path, sums):
    Run(tmp_path, "p", "rows=4").save(2, sums)
    with np.load(tmp_path / "p.npz", allow_pickle=False) as stored:
        assert int(stored["shards"]) == 2
