"""`bench quality`'s averages and picture, on rows made up."""

from __future__ import annotations

import pytest

from benchmarks.quality import Row, means


def row(task: str, scorer: str, allocator: str, keep: float, accuracy: float) -> Row:
    return Row(scorer, allocator, task, keep, accuracy, accuracy / 0.8, 1 - accuracy, 0.9, 10)


ROWS = [
    row(task, scorer, allocator, keep, accuracy + 0.1 * (task == "b"))
    for task in "ab"
    for scorer, allocator, keep, accuracy in [
        ("reap", "uniform", 0.5, 0.6),
        ("reap", "coverage", 0.5, 0.7),
        ("random", "uniform", 0.5, 0.1),
        ("reap", "uniform", 0.25, 0.5),
        ("reap", "coverage", 0.25, 0.4),
        ("random", "uniform", 0.25, 0.0),
    ]
]


def test_means_are_over_tasks_for_each_scorer_and_allocator_best_first():
    found = means(ROWS)
    assert [(mean.way, mean.keep) for mean in found] == [
        ("reap, coverage", 0.5),
        ("reap", 0.5),
        ("random", 0.5),
        ("reap", 0.25),
        ("reap, coverage", 0.25),
        ("random", 0.25),
    ]
    assert found[0].accuracy == pytest.approx(0.75)
    assert found[0].worst == pytest.approx(0.7 / 0.8)


def test_the_picture_is_drawn(tmp_path):
    from benchmarks.quality_plot import draw

    draw(ROWS, means(ROWS), {0.5: 20.0, 0.25: 12.0}, tmp_path / "out" / "picture.png")
    assert (tmp_path / "out" / "picture.png").read_bytes().startswith(b"\x89PNG")
