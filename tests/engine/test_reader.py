"""Bytes arrive as they are in the file, whatever the alignment; a read that fails says where and why."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from engine import reader as reader_module
from engine.reader import ALIGN, Reader, coalesce
from engine.transfer import Bytes, Extent
from store.errors import CheckpointError


@pytest.fixture
def file(tmp_path: Path) -> tuple[Path, Bytes]:
    content = np.random.default_rng(0).integers(0, 256, 300_007, dtype=np.uint8)
    path = tmp_path / "weights.bin"
    content.tofile(path)
    return path, content


def _extent(path: Path, offset: int, nbytes: int) -> Extent:
    return Extent(path, offset, nbytes, np.zeros(nbytes, np.uint8))


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_random_ranges_arrive_byte_for_byte(file: tuple[Path, Bytes], direct: bool, threads: int) -> None:
    path, content = file
    rng = random.Random(1)
    extents = []
    for _ in range(60):
        offset = rng.randrange(len(content))
        extents.append(_extent(path, offset, rng.randint(1, min(50_000, len(content) - offset))))
    with Reader(64 * 1024, threads=threads, direct=direct) as reader:
        report = reader.read(extents)
    for extent in extents:
        assert np.array_equal(extent.into, content[extent.offset : extent.offset + extent.nbytes])
    assert report.needed == sum(extent.nbytes for extent in extents)


def test_the_last_byte_of_a_file_is_readable(file: tuple[Path, Bytes]) -> None:
    path, content = file
    extent = _extent(path, len(content) - 1, 1)
    with Reader(64 * 1024) as reader:
        reader.read([extent])
    assert extent.into[0] == content[-1]


def test_neighbours_become_one_request_and_a_long_range_several() -> None:
    path = Path("f")
    near = [_extent(path, 1000, 10), _extent(path, 0, 900), _extent(path, 1010, 90)]
    far = _extent(path, 10_000_000, 5)
    runs = list(coalesce([*near, far], 64 * 1024))
    assert [(run.start, run.end) for run in runs] == [(0, 1100), (10_000_000, 10_000_005)]
    long = list(coalesce([_extent(path, 7, 200_000)], 64 * 1024))
    assert len(long) == 4
    assert (long[0].start, long[-1].end) == (7, 200_007)


def test_coalescing_saves_requests_but_reads_the_holes(file: tuple[Path, Bytes]) -> None:
    path, _ = file
    with Reader(512 * 1024) as reader:
        report = reader.read([_extent(path, 0, 100), _extent(path, 20_000, 100)])
    assert report.needed == 200
    assert report.read == 200 or 20_100 <= report.read <= 20_100 + 2 * ALIGN  # buffered, or direct


def test_where_direct_reads_are_refused_buffered_ones_do_it(
    file: tuple[Path, Bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, content = file
    real = os.preadv

    def refuse_direct(descriptor: int, buffers: Sequence[Bytes], offset: int) -> int:
        if len(buffers[0]) % ALIGN == 0:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, buffers, offset)  # type: ignore[arg-type]

    monkeypatch.setattr(reader_module.os, "preadv", refuse_direct)
    extent = _extent(path, 5, 1001)
    with Reader(64 * 1024) as reader:
        reader.read([extent])
        reader.read([extent])
    assert np.array_equal(extent.into, content[5:1006])


def test_short_reads_are_continued(file: tuple[Path, Bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    path, content = file
    real = os.preadv
    monkeypatch.setattr(reader_module.os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:ALIGN]], at))
    for direct in (True, False):
        extent = _extent(path, 123, 40_000)
        with Reader(64 * 1024, direct=direct) as reader:
            reader.read([extent])
        assert np.array_equal(extent.into, content[123:40_123])


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_shrank_is_named_with_offset_wanted_and_got(file: tuple[Path, Bytes], direct: bool) -> None:
    path, _ = file
    with Reader(64 * 1024, direct=direct) as reader:
        reader.read([_extent(path, 0, 10)])
        os.truncate(path, 5000)
        with pytest.raises(
            CheckpointError, match=r"weights\.bin is shorter .* wanted 2000 bytes at offset 4000, got 1000"
        ):
            reader.read([_extent(path, 4000, 2000)])


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_input_output_error_is_named(
    file: tuple[Path, Bytes], direct: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = file

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(reader_module.os, "preadv", fail)
    with (
        Reader(64 * 1024, threads=threads, direct=direct) as reader,
        pytest.raises(CheckpointError, match=r"weights\.bin at offset 0 failed: Input/output error"),
    ):
        reader.read([_extent(path, 0, 10), _extent(path, 250_000, 10)])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with Reader(64 * 1024) as reader, pytest.raises(CheckpointError, match=r"Can't open .*gone\.bin: No such file"):
        reader.read([_extent(tmp_path / "gone.bin", 0, 10)])


def test_a_file_that_is_replaced_is_read_as_it_was_opened(file: tuple[Path, Bytes]) -> None:
    path, content = file
    with Reader(64 * 1024) as reader:
        reader.read([_extent(path, 0, 10)])
        path.unlink()
        path.write_bytes(b"another file")
        extent = _extent(path, 100, 10)
        reader.read([extent])
    assert np.array_equal(extent.into, content[100:110])


@pytest.mark.timeout(10)
def test_a_copy_that_fails_is_an_error_of_the_read_and_not_a_wait_for_ever(file: tuple[Path, Bytes]) -> None:
    path, content = file
    locked = np.zeros(100, np.uint8)
    locked.flags.writeable = False
    with Reader(64 * 1024) as reader:
        with pytest.raises(ValueError, match="read-only"):
            reader.read([Extent(path, 0, 100, locked)])
        extent = _extent(path, 7, 100)
        reader.read([extent])
    assert np.array_equal(extent.into, content[7:107])
