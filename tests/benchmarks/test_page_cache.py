"""Eviction is checked, not hoped for."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import page_cache
from benchmarks.page_cache import TRIES, evict, resident_pages
from store.errors import MoepagerError


def test_a_file_that_was_just_written_is_resident_and_evictable(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(1 << 20))
    assert resident_pages(path) == 256
    evict([path])
    assert resident_pages(path) == 0


def test_an_empty_file_has_no_pages(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert resident_pages(tmp_path / "empty") == 0


def test_pages_that_are_still_being_read_ahead_are_asked_for_again(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"x")
    left = [442, 0]
    monkeypatch.setattr(page_cache, "resident_pages", lambda _: left.pop(0))
    evict([tmp_path / "data"])
    assert left == []


def test_pages_that_stay_are_no_cold_file(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"x")
    left = [3] * TRIES
    monkeypatch.setattr(page_cache, "resident_pages", lambda _: left.pop(0))
    monkeypatch.setattr(page_cache, "WAIT", 0.0)
    with pytest.raises(MoepagerError, match="3 pages of data stay"):
        evict([tmp_path / "data"])
    assert left == []
