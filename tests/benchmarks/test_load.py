"""`bench load`: every reader brings the same bytes of the same selection, cold, and says what it cost."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from benchmarks import load
from benchmarks.commands import app
from benchmarks.load import _measure_run, _Sample, _Samples, _warm_up, bench_load, disjoint_selections
from benchmarks.load_pieces import Arena, Piece, _rows, check, true_sums
from benchmarks.load_readers import READERS
from engine.card import ModelCard
from engine.tiny import write_tiny
from store.errors import InvalidInput, MoepagerError, NotFound
from store.shard import TensorSpan


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny("olmoe", tmp_path_factory.mktemp("tiny"), num_experts=16)


def test_the_command_shows_raw_own_and_each_reader_that_was_asked_for(model):
    asked = [word for name in READERS for word in ("--reader", name)]
    result = CliRunner().invoke(app, ["load", "--model", str(model), "--runs", "2", "--json", *asked])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output.strip().splitlines()[-1])
    readers = {reader["name"]: reader for reader in answer["readers"]}
    assert list(readers) == ["raw", "own", *READERS]
    assert all(reader["seconds"] > 0 and reader["ratio_to_raw"] > 0 for reader in readers.values())
    assert all(reader["ratio_low"] <= reader["ratio_to_raw"] <= reader["ratio_high"] for reader in readers.values())
    assert answer["ratio_confidence"] == 0.5  # of two pairs
    assert [reader["anon_bytes"] is None for reader in readers.values()] == [True, True] + [False] * len(READERS)
    assert (answer["reads"], answer["raw_reads"]) == ("direct", "direct")
    assert (answer["seconds"], answer["raw_seconds"]) == (readers["own"]["seconds"], readers["raw"]["seconds"])


def test_only_readers_through_the_page_cache_leave_pages_there(model):
    left = {one.name: one.cache_left_bytes for one in bench_load(model, 0.5, 1, list(READERS)).readers}
    assert left["raw"] == left["own"] == left["direct"] == 0
    assert min(left["safetensors"], left["mmap"], left["pread"]) > 0


def test_without_a_reader_there_are_raw_and_own(model):
    assert [reader.name for reader in bench_load(model, 0.5, 1).readers] == ["raw", "own"]


def test_where_direct_reads_are_refused_both_are_buffered_and_say_so(model, monkeypatch):
    real = os.open

    def refuse(path, flags, *more, **named):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    found = bench_load(model, 0.5, 1)
    assert (found.reads, found.raw_reads) == ("buffered", "buffered")


def test_a_reader_that_nobody_knows_is_refused_with_those_there_are(model):
    with pytest.raises(InvalidInput, match=r"No reader 'nosuch'; .*safetensors"):
        bench_load(model, 0.5, 1, ["nosuch"])


@pytest.mark.parametrize("name", READERS)
def test_part_of_a_fused_tensor_is_brought_alone(model, tmp_path: Path, name: str) -> None:
    fused = torch.arange(4 * 6 * 10, dtype=torch.int16).view(torch.bfloat16).reshape(4, 6, 10)
    save_file({"fused": fused}, tmp_path / "file.safetensors")
    start = (tmp_path / "file.safetensors").stat().st_size - fused.nbytes
    arena = Arena(120)
    piece = Piece(tmp_path / "file.safetensors", start + 240, 120, "fused", slice(2, 3), arena.bytes)
    with READERS[name](ModelCard.read(model)) as read:
        read([piece])
    assert bytes(arena.bytes) == fused[2].contiguous().view(torch.uint8).numpy().tobytes()
    check(name, [piece], true_sums([piece]))


def test_a_reader_that_brings_other_bytes_has_no_figures(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345678")
    arena = Arena(8)
    piece = Piece(tmp_path / "file", 0, 8, "", None, arena.bytes)
    with pytest.raises(MoepagerError, match=r"lazy brought other bytes .* in 1 of 1"):
        check("lazy", [piece], true_sums([piece]))


def test_an_expert_of_a_fused_tensor_is_some_of_its_rows() -> None:
    span = TensorSpan("fused", Path("file"), 1000, 480, "BF16", (4, 6, 10))
    assert _rows(span, 1000, 480) is None
    assert _rows(span, 1240, 120) == slice(2, 3)
    with pytest.raises(InvalidInput, match="no whole rows of fused"):
        _rows(span, 1010, 120)


def test_an_arm_is_compared_with_the_raw_reads_around_it_so_that_a_drift_cancels(monkeypatch, model) -> None:
    """The disk gets slower by a tenth with every read; `own` takes twice as long as raw, whenever it comes."""
    order, slower = [], 1.0

    def measure(arm: str, *_: object) -> _Sample:
        nonlocal slower
        slower *= 1.1
        order.append(arm)
        return _Sample({"raw": 1.0, "own": 2.0, "mmap": 4.0}[arm] * slower, 0.0, 1, 0)

    monkeypatch.setattr(load, "_measure", measure)
    samples = {name: _Samples() for name in ("raw", "own", "mmap")}
    turn, _ = disjoint_selections(ModelCard.read(model), 2, 0)
    for names in (["own", "mmap"], ["mmap", "own"]):
        _measure_run({name: name for name in samples}, names, turn, [], samples)
    assert order == ["raw", "raw", "own", "raw", "mmap", "raw", "raw", "raw", "mmap", "raw", "own", "raw"]
    assert samples["own"].ratios == pytest.approx([0.5, 0.5])
    assert samples["mmap"].ratios == pytest.approx([0.25, 0.25])
    assert len(samples["raw"].taken) == 6  # the first of either run is not counted


def test_memory_that_a_reader_takes_for_a_while_is_seen(monkeypatch, model) -> None:
    held, seen = 100, threading.Event()

    def anonymous() -> int:
        if held == 150:
            seen.set()
        return held

    @contextmanager
    def arm(_: object) -> Iterator[None]:
        nonlocal held
        held = 150
        assert seen.wait(10)
        held = 100
        yield

    monkeypatch.setattr(load, "anonymous_bytes", anonymous)
    samples = _Samples()
    turn, _ = disjoint_selections(ModelCard.read(model), 2, 0)
    _warm_up("runai", arm, turn, samples)
    assert samples.anon == 50


@pytest.mark.parametrize("name", ["runai", "fastsafetensors"])
def test_a_peer_that_is_not_installed_is_named_with_the_way_to_have_it(name, model, monkeypatch):
    monkeypatch.setitem(sys.modules, {"runai": "runai_model_streamer"}.get(name, name), None)
    with pytest.raises(NotFound, match=r"not installed: pip install .*moepager\[readers\]"):
        bench_load(model, 0.5, 1, [name])
