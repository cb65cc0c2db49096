"""The disk is measured as the engine reads, and where it reads through the page cache everybody is told."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from engine import reader
from engine.card import ModelCard
from engine.plan import READER_THREADS
from engine.tiny import write_tiny
from service.disk import measure_disk
from service.doctor import check_disk
from service.parts import open_parts
from service.planning import make_plan
from service.settings import Settings

REFUSED = "through the page cache (model.safetensors: its file system opens no file for direct reads"


@pytest.fixture
def no_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system such as some network's."""
    real = os.open

    def refuse(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *more, **named)

    monkeypatch.setattr(reader.os, "open", refuse)


@pytest.mark.timeout(20)
def test_as_many_requests_are_with_the_disk_as_the_engine_has_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = ModelCard.read(write_tiny("qwen3_moe", tmp_path / "m", hidden_size=64, moe_intermediate_size=128))
    together, real = threading.Barrier(READER_THREADS), os.preadv
    sizes = []

    def all_at_once(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        together.wait(5)
        sizes.append(len(buffers[0]))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(reader.os, "preadv", all_at_once)
    speed = measure_disk(card, seconds=0.05)
    assert (
        speed.bytes % (card.layers * card.experts // 2 * card.expert_bytes) == 0
    )  # every other expert, again and again
    assert len(sizes) * card.expert_bytes == speed.bytes > 0
    assert min(sizes) >= card.expert_bytes


def test_the_measure_ends_when_its_time_is_over(card: ModelCard) -> None:
    assert 0.05 <= measure_disk(card, seconds=0.05).seconds < 5


def test_the_doctor_names_the_way_of_reading(half_settings: Settings) -> None:
    assert "direct reads, past the page cache" in check_disk(half_settings)


@pytest.mark.usefixtures("no_direct")
def test_reads_through_the_page_cache_are_named_by_doctor_plan_log_and_residency(
    half_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    assert REFUSED in check_disk(half_settings)
    assert make_plan(half_settings).json()["disk_reads"] == "buffered"
    with caplog.at_level(logging.WARNING, "moepager.service"), open_parts(half_settings) as parts:
        [line] = [line for line in caplog.messages if "Experts are read" in line]
        assert parts.engine.access.name == "buffered"
    assert f"Experts are read {REFUSED}" in line


def test_residency_says_how_files_are_read(client: TestClient, parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = client.get("/v1/residency").json()
    assert (found["reads"], found["reads_why"]) == ("direct", None)
    [file] = parts.engine._reader._files.values()
    monkeypatch.setattr(file, "refusal", "its file system refuses direct reads (Invalid argument)")
    found = client.get("/v1/residency").json()
    assert found["reads"] == "buffered"
    assert found["reads_why"] == "model.safetensors: its file system refuses direct reads (Invalid argument)"
