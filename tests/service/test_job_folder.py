"""A job's text on disk goes with the job, and what a killed runner left goes with the next one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from service.job_folder import PREFIX, YOUNG_SECONDS, job_folder, remove_forgotten


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def grow_old(folder: Path) -> None:
    then = folder.stat().st_mtime - 2 * YOUNG_SECONDS
    os.utime(folder, (then, then))


def test_it_is_its_owners_alone_and_gone_at_the_end(room: Path) -> None:
    with job_folder() as folder:
        assert folder.parent == room
        assert folder.stat().st_mode & 0o077 == 0
        (folder / "calibration.jsonl").write_text("secret")
    assert list(room.iterdir()) == []


RUNNER = """
import sys, tempfile
from service.job_folder import job_folder
tempfile.tempdir = sys.argv[1]
with job_folder() as folder:
    (folder / "calibration.jsonl").write_text("secret")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_runner_left_is_removed_and_what_a_living_one_holds_is_not(room: Path) -> None:
    command = [sys.executable, "-c", RUNNER, str(room)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as runner:
        assert runner.stdout is not None
        folder = Path(runner.stdout.readline().strip())
        grow_old(folder)
        remove_forgotten()
        assert (folder / "calibration.jsonl").exists()
        runner.kill()
        runner.wait()
    assert (folder / "calibration.jsonl").exists()
    grow_old(folder)
    with job_folder() as mine:
        assert list(room.iterdir()) == [mine]


def test_a_folder_that_was_just_made_and_those_of_others_are_left_alone(room: Path) -> None:
    young, other, file = room / f"{PREFIX}young", room / "someone-elses", room / f"{PREFIX}file"
    for folder in (young, other):
        folder.mkdir()
    grow_old(other)
    file.write_text("no folder")
    grow_old(file)
    remove_forgotten()
    assert sorted(room.iterdir()) == sorted([young, other, file])


def test_a_link_is_not_followed(room: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    target = tmp_path_factory.mktemp("target")
    (target / "kept").write_text("x")
    grow_old(target)
    (room / f"{PREFIX}link").symlink_to(target)
    remove_forgotten()
    assert (target / "kept").exists()
