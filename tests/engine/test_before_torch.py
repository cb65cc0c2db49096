"""Weights lie in large pages where the kernel grants them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CODE = """
from engine.before_torch import prepare_process
prepare_process()
import torch
kept = torch.zeros(64 << 20, dtype=torch.uint8)
print(next(line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")))
"""


@pytest.mark.parametrize(("said", "granted"), [({}, True), ({"THP_MEM_ALLOC_ENABLE": "0"}, False)])
def test_torch_asks_for_them_unless_the_user_said_otherwise(said: dict[str, str], granted: bool) -> None:
    mode = ENABLED.read_text() if ENABLED.exists() else "always madvise [never]"
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", **said}
    found = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    kib = int(found.stdout)
    if "[madvise]" in mode:
        assert (kib >= 32 << 10) == granted
    elif "[never]" in mode:
        assert kib == 0
