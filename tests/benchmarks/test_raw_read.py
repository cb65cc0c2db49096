"""The reference reads what it says it reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import raw_read
from benchmarks.raw_read import ALIGNMENT, SHAPES, Range, Shape, _blocks, best_shape, lanes, merged, read_seconds, some


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


def test_the_best_shape_is_found_on_a_disk_that_is_fast_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """For its first two tries the disk is four times as fast as later: whoever had them looks best by itself."""
    best, tries = SHAPES[-1], 0

    def seconds(_: object, shape: Shape, __: object) -> float:
        nonlocal tries
        tries += 1
        return (0.25 if tries <= 2 else 1.0) * (0.9 if shape == best else 1.0)

    monkeypatch.setattr(raw_read, "read_seconds", seconds)
    monkeypatch.setattr(raw_read, "lanes", lambda _: [])
    assert best_shape([Range(Path("a"), 0, 1)]) == best


def test_shapes_are_tried_on_a_part_of_many_ranges() -> None:
    ranges = [Range(Path("a"), 100 * number, 10) for number in range(50)]
    part = some(ranges, 95, 0)
    assert sum(range_.length for range_ in part) == 100
    assert part == sorted(part, key=lambda range_: range_.offset)
    assert set(part) < set(ranges)
    assert some(ranges, 1000, 0) == ranges
