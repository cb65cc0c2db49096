"""Packs beside stand-ins and limited routers, on one task and few items: the table's shape, and that it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.packs import PackRow, bench_packs, pack_means
from profiler.progress import ignore


@pytest.mark.slow
def test_every_row_of_one_task_is_measured_once_and_kept(tmp_path: Path) -> None:
    rows = bench_packs(["music"], [0.5], ["random"], 2, 0, ignore, tmp_path)
    kinds = {(row.way, row.stand_in) for row in rows}
    assert {("gate", "nothing"), ("gate", "novice"), ("gate", "cluster_mean, one")} <= kinds
    ways = ("random", "random, own widths", "random, strips of a twelfth", "random, strips of a quarter")
    assert {(way, "pack") for way in ways} <= kinds
    assert all(0 <= row.accuracy <= 1 and row.nll > 0 and row.items == 2 for row in rows)
    free = [row.coverage for row in rows if row.way in ways[:2] and row.stand_in == "pack"]
    assert free == [1.0, 1.0]  # limited by nothing
    before = next(tmp_path.glob("*.jsonl")).read_text()
    assert bench_packs(["music"], [0.5], ["random"], 2, 0, ignore, tmp_path) == rows
    assert next(tmp_path.glob("*.jsonl")).read_text() == before


@pytest.mark.slow
def test_what_leaves_no_room_for_one_tokens_experts_has_no_row(tmp_path: Path) -> None:
    rows = bench_packs(["music"], [0.0625], [], 1, 0, ignore, tmp_path)
    assert {row.stand_in for row in rows} == {"nothing"}


def test_means_are_over_tasks_the_largest_size_first_and_its_best_on_top() -> None:
    def row(way: str, task: str, keep: float, accuracy: float) -> PackRow:
        return PackRow(way, "pack", task, keep, 0, 10, accuracy, 0.8, 0.5, 1.0)

    rows = [row("a", "x", 0.5, 0.4), row("a", "y", 0.5, 0.8), row("b", "x", 0.5, 0.7), row("a", "x", 0.25, 0.8)]
    found = [(mean.way, mean.keep, round(mean.accuracy, 3), round(mean.retention, 3)) for mean in pack_means(rows)]
    assert found == [("b", 0.5, 0.7, 0.875), ("a", 0.5, 0.6, 0.75), ("a", 0.25, 0.8, 1.0)]
