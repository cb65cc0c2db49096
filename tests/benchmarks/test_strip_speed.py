"""`bench strip-speed`: the same experts cut more or less finely, as many bytes of them, every arm in every round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.commands import app
from benchmarks.strip_speed import SPREAD, WHOLE, WIDE, Terms, _Sample, bench_strip_speed, selections
from engine.card import ModelCard
from engine.tiny import write_tiny
from store.errors import InvalidInput
from store.quantisation import FP8, MXFP4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("olmoe", tmp_path_factory.mktemp("tiny") / "model", num_experts=16, intermediate_size=32)


def test_every_pack_serves_as_many_bytes_and_is_made_once(model: Path, tmp_path: Path) -> None:
    rows, _ = bench_strip_speed(Terms(model, (1, 2, 4), tokens=2, rounds=2), tmp_path)
    assert [(row.strips, row.layout) for row in rows] == [(p, at) for p in (1, 2, 4) for at in (WHOLE, SPREAD)]
    assert len({row.bytes for row in rows}) == 1
    assert [row.slot_bytes * row.strips for row in rows] == [rows[0].slot_bytes] * 6
    figures = [getattr(row, name) for row in rows for name in _Sample._fields]
    assert all(0 < figure.low <= figure.ratio <= figure.high and figure.median > 0 for figure in figures)
    assert (rows[0].one_row.ratio, rows[0].paging_s.high) == (1.0, 1.0)
    made = {folder.name: folder.stat().st_mtime_ns for folder in tmp_path.iterdir()}
    assert set(made) == {f"{model.name}-2", f"{model.name}-4"}
    bench_strip_speed(Terms(model, (1, 4), tokens=2, rounds=1), tmp_path)
    assert {folder.name: folder.stat().st_mtime_ns for folder in tmp_path.iterdir()} == made


def test_quantised_copies_serve_as_many_experts_in_fewer_bytes(model: Path, tmp_path: Path) -> None:
    rows, _ = bench_strip_speed(Terms(model, (1,), tokens=2, rounds=1, quantised=(1,), ways=(MXFP4, FP8)), tmp_path)
    assert [(row.strips, row.way, row.layout) for row in rows] == [
        (1, way, at) for way in (WIDE, MXFP4, FP8) for at in (WHOLE, SPREAD)
    ]
    assert rows[2].bytes < rows[0].bytes * 0.2  # of float32
    assert {folder.name for folder in tmp_path.iterdir()} == {f"{model.name}-1-{way}" for way in (MXFP4, FP8)}


def test_the_two_selections_share_nothing_and_serve_one_token(model: Path, tmp_path: Path) -> None:
    bench_strip_speed(Terms(model, (1, 4), tokens=2, rounds=1), tmp_path)
    whole, split = ModelCard.read(model), ModelCard.read(tmp_path / f"{model.name}-4")
    found, cut = selections(whole, 0.25), selections(split, 0.25)
    for layer in range(whole.layers):
        kept = found[WHOLE].experts[layer]
        assert cut[WHOLE].experts[layer] == tuple(4 * expert + strip for expert in kept for strip in range(4))
        assert not set(cut[WHOLE].experts[layer]) & set(cut[SPREAD].experts[layer])
        assert len(cut[SPREAD].experts[layer]) == len(kept) * 4
        assert len({strip // 4 for strip in cut[SPREAD].experts[layer]}) >= split.least


def test_there_is_nothing_to_compare_with_but_whole_experts(model: Path) -> None:
    with pytest.raises(InvalidInput, match="begin with 1"):
        Terms(model, (2, 4))
    with pytest.raises(InvalidInput, match="at most a third"):
        Terms(model, keep=0.5)


def test_the_command_says_the_load_it_ran_under(model: Path) -> None:
    words = ["strip-speed", "--model", str(model), "--strips", "2", "--rounds", "1", "--tokens", "2", "--json"]
    answer = json.loads(CliRunner().invoke(app, words, catch_exceptions=False).stdout.splitlines()[-1])
    assert {row["strips"] for row in answer["rows"]} == {1, 2}
    assert answer["load_before"] >= 0
    assert answer["load_after"] >= 0
