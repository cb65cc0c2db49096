"""Bytes arrive as they are in the file, whatever the alignment; a read that fails says where and why."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from engine import reader as reader_module
from engine.reader import ALIGN, Access, Reader, coalesce
from engine.transfer import Bytes, Extent
from store.errors import CheckpointError, ShardChanged
from store.identity import Identity


@pytest.fixture
def file(tmp_path: Path) -> tuple[Path, Bytes]:
    content = np.random.default_rng(0).integers(0, 256, 300_007, dtype=np.uint8)
    path = tmp_path / "weights.bin"
    content.tofile(path)
    os.utime(path, ns=(0, 5 * 10**9))  # long ago: every write from now on has another time
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
        assert reader.access == Access(
            "buffered", "weights.bin: its file system refuses direct reads (Invalid argument)"
        )
        reader.read([extent])
    assert np.array_equal(extent.into, content[5:1006])


def test_a_reader_says_how_it_reads_and_which_file_is_read_otherwise(
    file: tuple[Path, Bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, content = file
    other = path.with_name("other.bin")
    content.tofile(other)
    real = os.open

    def refuse(name: Path, flags: int) -> int:
        if flags & os.O_DIRECT and name == other:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(name, flags)

    monkeypatch.setattr(reader_module.os, "open", refuse)
    with Reader(64 * 1024) as reader:
        reader.read([_extent(path, 0, 10)])
        assert reader.access == Access("direct", None)
        reader.read([_extent(other, 0, 10)])
        assert reader.access.name == "mixed"
        assert str(reader.access.why).startswith("other.bin: its file system opens no file for direct reads")
    with Reader(64 * 1024, direct=False) as reader:
        reader.read([_extent(path, 0, 10)])
        assert reader.access.name == "buffered"


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
def test_a_file_that_shrank_is_named_with_its_sizes(file: tuple[Path, Bytes], direct: bool) -> None:
    path, _ = file
    with Reader(64 * 1024, direct=direct) as reader:
        reader.read([_extent(path, 0, 10)])
        os.truncate(path, 5000)
        with pytest.raises(ShardChanged, match=r"weights\.bin .*its size was 300,007 bytes and is 5,000 bytes"):
            reader.read([_extent(path, 4000, 2000)])


@pytest.mark.parametrize("direct", [True, False])
def test_a_range_past_the_end_is_named_with_offset_wanted_and_got(file: tuple[Path, Bytes], direct: bool) -> None:
    path, _ = file
    with (
        Reader(64 * 1024, direct=direct) as reader,
        pytest.raises(CheckpointError, match=r"weights\.bin ends early: wanted 2000 bytes at offset 299007, got 1000"),
    ):
        reader.read([_extent(path, 299_007, 2000)])


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
        pytest.raises(CheckpointError, match=r"weights\.bin at offset (0|250000) failed: Input/output error"),
    ):
        reader.read([_extent(path, 0, 10), _extent(path, 250_000, 10)])


@pytest.mark.parametrize("direct", [True, False])
def test_nothing_lands_of_a_file_that_was_written_to_at_equal_size(file: tuple[Path, Bytes], direct: bool) -> None:
    path, content = file
    with Reader(64 * 1024, direct=direct) as reader:
        reader.read([_extent(path, 0, 10)])
        path.write_bytes(bytes(len(content)))
        extent = Extent(path, 0, 10, np.full(10, 7, np.uint8))
        for _ in range(2):  # and so it stays
            with pytest.raises(
                ShardChanged, match=r"weights\.bin .*its time of writing was 1970-01-01 00:00:05\.0+ UTC"
            ):
                reader.read([extent])
    assert extent.into.tolist() == [7] * 10


@pytest.mark.parametrize("direct", [True, False])
def test_nothing_lands_of_a_read_during_which_a_write_began(
    file: tuple[Path, Bytes], direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, content = file
    real = os.preadv

    def torn(descriptor: int, buffers: Sequence[Bytes], offset: int) -> int:
        got = real(descriptor, buffers, offset)  # type: ignore[arg-type]
        path.write_bytes(bytes(len(content)))
        return got

    monkeypatch.setattr(reader_module.os, "preadv", torn)
    extent = Extent(path, 0, 10, np.full(10, 7, np.uint8))
    with Reader(64 * 1024, direct=direct) as reader, pytest.raises(ShardChanged, match=r"Open the model again"):
        reader.read([extent])
    assert extent.into.tolist() == [7] * 10


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_was_swapped_since_its_identity_was_taken_is_not_held(
    file: tuple[Path, Bytes], direct: bool
) -> None:
    path, content = file
    with path.open("rb") as opened:
        identity = Identity.of(opened.fileno())
    beside = path.with_name("beside")
    beside.write_bytes(content)
    os.utime(beside, ns=(identity.written, identity.written))  # of the same size and age: only the inode differs
    beside.rename(path)
    with (
        Reader(64 * 1024, direct=direct) as reader,
        pytest.raises(ShardChanged, match=r": its inode was \d+ on device"),
    ):
        reader.hold({path: identity})


def test_a_file_is_compared_once_a_request(file: tuple[Path, Bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = file
    calls: list[str] = []
    real_read, real_stat = os.preadv, os.fstat
    monkeypatch.setattr(reader_module.os, "preadv", lambda *args: (calls.append("read"), real_read(*args))[1])
    with Reader(64 * 1024, threads=2) as reader:
        reader.read([_extent(path, 0, 10)])
        calls.clear()
        monkeypatch.setattr(os, "fstat", lambda *args: (calls.append("compare"), real_stat(*args))[1])
        reader.read([_extent(path, 0, 200_000)])
        monkeypatch.undo()
    assert sorted(calls) == ["compare"] * 4 + ["read"] * 4


class _Clock:
    """Moves only while somebody waits."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class _Held(threading.Thread):
    """A thread that the disk keeps: whoever joins it waits in vain."""

    clock: _Clock

    def join(self, timeout: float | None = None) -> None:
        assert timeout is not None
        self.clock.now += timeout

    def is_alive(self) -> bool:
        return True


def test_closing_waits_once_for_all_threads_that_the_disk_holds_and_leaves_them_their_files(
    file: tuple[Path, Bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = file
    reader = Reader(64 * 1024, threads=4)
    extent = _extent(path, 0, 10)
    reader.read([extent])
    real, _Held.clock = reader._threads, _Clock()
    began = _Held.clock.now
    with monkeypatch.context() as patched:
        patched.setattr(reader_module, "time", _Held.clock)
        reader._threads = [_Held() for _ in real]
        reader.close()
    assert _Held.clock.now - began == reader_module.JOIN_SECONDS
    assert os.preadv(reader._files[path]._buffered, [bytearray(10)], 0) == 10
    reader._threads = real
    reader.close()
    assert not reader._files


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
