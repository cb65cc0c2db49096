"""A job's private folder: the task's text as files, for the time of one attempt.

A runner that is killed leaves its folder behind, with text that may be deleted from the store meanwhile. So a runner
holds a lock in its folder, which ends with it however it ends, and every runner first removes those that nobody holds.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger("moepager.service")

PREFIX = "moepager-job-"
YOUNG_SECONDS = 60.0  # a folder is made before it is held: what is as young may be about to be


@contextmanager
def job_folder() -> Iterator[Path]:
    """For its owner's eyes alone; gone at the end. Raises OSError where there is no room for it."""
    remove_forgotten()
    with tempfile.TemporaryDirectory(prefix=PREFIX) as made, _lock(Path(made)):
        yield Path(made)


def remove_forgotten() -> None:
    """Of the same user, whatever store they were for."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            if _old_and_ours(folder):
                with _lock(folder):
                    shutil.rmtree(folder)
                log.info("removed %s, which a killed job had left", folder)
        except Timeout:  # a living one's
            continue
        except OSError as error:  # another runner was faster, or it can't be removed: no reason not to run a job
            log.warning("%s, which a killed job had left, can't be removed: %s", folder, error)


def _old_and_ours(folder: Path) -> bool:
    told = folder.lstat()  # of a link that somebody laid here, not of what it leads to
    old = time.time() - told.st_mtime > YOUNG_SECONDS
    return stat.S_ISDIR(told.st_mode) and told.st_uid == os.geteuid() and old


def _lock(folder: Path) -> FileLock:
    return FileLock(folder / "held", timeout=0)
