"""Eviction is checked, not hoped for."""

from __future__ import annotations

from pathlib import Path

from benchmarks.page_cache import evict, resident_pages


def test_a_file_that_was_just_written_is_resident_and_evictable(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(1 << 20))
    assert resident_pages(path) == 256
    evict([path])
    assert resident_pages(path) == 0


def test_an_empty_file_has_no_pages(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert resident_pages(tmp_path / "empty") == 0
