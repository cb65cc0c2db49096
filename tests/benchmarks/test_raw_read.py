"""The reference reads what it says it reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.raw_read import ALIGNMENT, Range, Shape, _blocks, lanes, merged, read_seconds


def test_neighbouring_ranges_become_one() -> None:
    a, b = Path("a"), Path("b")
    ranges = [Range(a, 10, 5), Range(b, 0, 4), Range(a, 0, 10), Range(a, 20, 1)]
    assert merged(ranges) == [Range(a, 0, 15), Range(a, 20, 1), Range(b, 0, 4)]


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (4095, 2), (5000, 100_000), (1 << 20, 1 << 20)])
def test_blocks_cover_their_range_and_no_more_than_alignment_needs(offset: int, length: int) -> None:
    blocks = _blocks(Range(Path("a"), offset, length), 1 << 16)
    assert blocks[0][1] <= offset
    assert blocks[-1][1] + blocks[-1][2] >= offset + length
    assert all(start % ALIGNMENT == 0 and size % ALIGNMENT == 0 for _, start, size in blocks)
    assert sum(size for *_, size in blocks) <= length + 2 * ALIGNMENT


def test_reading_takes_time(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(3 << 20))
    shape = Shape(1 << 20, 2)
    assert 0 < read_seconds([Range(path, 123, 2 << 20)], shape, lanes(shape)) < 10
