"""Progress as lines, and an end with the parent: in real processes."""

from __future__ import annotations

import json
import subprocess
import sys

CODE = """
import sys, time
from profiler.lines import lines
from profiler.progress import Progress
with lines() as report:
    report(Progress("sql", "calibrate", 1, 4))
    time.sleep(float(sys.argv[1]))
"""


def start(seconds: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CODE, seconds], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_each_step_is_a_line_and_the_process_ends_by_itself() -> None:
    with start("0") as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        assert told == {"progress": {"task": "sql", "stage": "calibrate", "done": 1, "total": 4}}
        assert process.wait(20) == 0


def test_the_process_ends_as_soon_as_its_parents_end_of_the_pipe_closes() -> None:
    with start("60") as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        process.stdin.close()
        assert process.wait(20) == 130
