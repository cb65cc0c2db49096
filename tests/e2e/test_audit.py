"""CI's audit of dependencies fails for a known vulnerability, and never passes in silence what it could not look up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

AUDIT = Path(__file__).parents[2] / ".ci" / "audit"
CLEAN = {"name": "good", "version": "1", "vulns": []}
SKIPPED = {"name": "odd", "version": "1", "skip_reason": "not on the index"}
BAD = {"name": "bad", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}


@pytest.mark.parametrize(
    ("dependencies", "code", "words"),
    [
        ([CLEAN, SKIPPED], 0, "1 packages audited, 1 unknown there, 0 vulnerable"),
        ([CLEAN, BAD], 1, "bad 1: CVE-1, fixed in 2"),
        ([SKIPPED], 0, "NOT AUDITED"),
        (None, 0, "NOT AUDITED"),
    ],
)
def test_the_audit_tells_what_it_found(dependencies: Any, code: int, words: str, tmp_path: Path) -> None:
    said = "no answer" if dependencies is None else json.dumps({"dependencies": dependencies})
    (tmp_path / "pip_audit.py").write_text(f"print({said!r})\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, str(AUDIT)], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == code
    assert words in done.stdout
