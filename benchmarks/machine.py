"""What a figure was measured on: printed beside every one of them."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path


def machine() -> dict[str, str | int]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": _first(Path("/proc/cpuinfo"), "model name") or platform.processor(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(int((_first(Path("/proc/meminfo"), "MemTotal") or "0").split()[0]) / 2**20),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def _first(path: Path, key: str) -> str | None:
    if not path.exists():
        return None
    lines = (line.partition(":") for line in path.read_text().splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == key), None)
