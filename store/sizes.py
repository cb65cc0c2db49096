"""Sizes of memory as people write them. Binary units are powers of 1024, decimal ones of 1000; nothing is guessed."""

from __future__ import annotations

import re

from store.errors import InvalidInput

UNITS = {
    "B": 1,
    "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_bytes(text: str) -> int:
    """`2GiB` is 2 x 2**30, `2GB` is 2 x 10**9, a plain number counts bytes. `2G` is refused: it means both."""
    match = PATTERN.fullmatch(text.strip())
    unit = next((u for u in UNITS if match and u.lower() == (match[2] or "B").lower()), None)
    if match is None or unit is None:
        raise InvalidInput(
            f"Not a size of memory: {text!r}. Write a number and a unit: KiB, MiB, GiB, TiB (powers of 1024) or "
            "kB, MB, GB, TB (powers of 1000), such as 512MiB; a number alone counts bytes.",
            param="memory",
        )
    size = round(float(match[1]) * UNITS[unit])
    if size <= 0:
        raise InvalidInput(f"A size of memory must be above zero, got {text!r}.", param="memory")
    return size


def show_bytes(size: float) -> str:
    """`1.50 GiB`: three figures and a binary unit."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if abs(size) >= UNITS[unit]:
            return f"{size / UNITS[unit]:.2f} {unit}"
    return f"{size:.0f} B"
