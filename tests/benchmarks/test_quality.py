"""`bench quality`: averages and picture on rows made up, what a folder keeps, and a small run on the bundled model."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import quality
from benchmarks.quality import _Bench, _Text, bench_quality
from benchmarks.quality_grid import Grid, Row, grid_of
from benchmarks.quality_means import means
from benchmarks.quality_runs import Runs
from profiler.allocators import ALLOCATORS
from profiler.batches import Encoded
from profiler.calls import Errors
from profiler.corpus import Item
from profiler.evaluate import Measured
from profiler.progress import ignore
from store.errors import InvalidInput
from store.records import Selection, StoredSelection


def row(task: str, scorer: str, allocator: str, keep: float, accuracy: float, draw: int = 0) -> Row:
    return Row(scorer, allocator, task, keep, draw, None, accuracy, accuracy / 0.8, 1 - accuracy, 0.9, 10)


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
    assert found[0].spread is None


def test_means_over_draws_leave_the_text_as_it_is_out_and_give_the_spread_between_draws():
    drawn = [
        row("a", "reap", "uniform", 0.5, accuracy, draw) for draw, accuracy in [(0, 0.9), (1, 0.5), (2, 0.6), (3, 0.7)]
    ]
    few = [replace(one, shots=5, accuracy=0.2) for one in drawn[1:]]
    full, shot = means([*drawn, *few])
    assert (full.accuracy, full.draws, full.shots) == (pytest.approx(0.6), 3, None)
    assert full.spread == pytest.approx(0.1)
    assert full.sure == pytest.approx(1.96 * (0.5 * 0.5 / 10) ** 0.5)  # over the items, which all draws share
    assert (shot.accuracy, shot.shots, shot.spread) == (pytest.approx(0.2), 5, pytest.approx(0.0))


def test_the_automatic_choice_is_made_of_every_draw_and_is_among_the_means(monkeypatch):
    chosen = StoredSelection("", "", "automatic", "searched", 0.5, Selection(((0, 1),)))
    bench = object.__new__(_Bench)
    bench.grid, bench._test = Grid(scorers=("gate",), draws=2, few_shot=(5,), automatic=True), ()
    bench.errors = None
    monkeypatch.setattr(_Bench, "_candidates", lambda *_: [replace(chosen, scorer="gate", allocator="uniform")])
    monkeypatch.setattr(_Bench, "_chosen", lambda *_: iter([chosen]))
    monkeypatch.setattr(_Bench, "_measure", lambda *_: Measured)
    monkeypatch.setattr(
        _Bench,
        "_row",
        lambda _, text, one, __: replace(row("a", one.scorer, one.allocator, 0.5, 0.9, text.draw), shots=text.shots),
    )
    texts = [*(_Text(draw, None, ()) for draw in range(3)), *(_Text(draw, 5, ()) for draw in (1, 2))]
    found = means([each for text in texts for each in bench.rows(text)])
    assert {(one.scorer, one.draws, one.shots) for one in found} == {
        ("gate", 2, None),
        ("automatic", 2, None),
        ("gate", 2, 5),
    }


def test_fewer_calls_are_measured_by_every_rule_and_are_rows_of_their_own(monkeypatch):
    chosen = StoredSelection("x", "", "gate", "uniform", 0.5, Selection.of([[0, 1, 2, 3]] * 3))
    bench = object.__new__(_Bench)
    bench.grid, bench._test = Grid(scorers=("gate",), active=(0.75, 0.5), few_shot=(5,), draws=1), ()
    bench.errors = Errors(np.array([[3.0, 2, 1, 0]] * 3), np.ones(3))
    monkeypatch.setattr(_Bench, "_candidates", lambda *_: [chosen])
    monkeypatch.setattr(_Bench, "_measure", lambda _, __, selection: selection)
    monkeypatch.setattr(
        _Bench,
        "_row",
        lambda _, text, one, kept: replace(
            row("a", "gate", "uniform", 0.5, sum(kept.calls or [12]) / 12), active=one.active, calls_by=one.calls_by
        ),
    )
    found = {mean.way: mean.accuracy for mean in means(bench.rows(_Text(0, None, ())))}
    rules = ("lexi", "lexi_shares", "equal")
    assert found == {"gate": 1} | {f"gate, {share:g} {rule}": share for share in (0.75, 0.5) for rule in rules}
    assert len(bench.rows(_Text(1, 5, ()))) == 1


def test_the_picture_is_drawn(tmp_path):
    from benchmarks.quality_plot import draw

    draw(ROWS, means(ROWS), {0.5: 20.0, 0.25: 12.0}, tmp_path / "out" / "picture.png")
    assert (tmp_path / "out" / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_keeps_what_is_measured_and_survives_a_kill(tmp_path):
    items = [Encoded(Item(f"q{n}", "a"), n, (1,), (2,)) for n in range(70)]
    calls = []

    def measure(part):
        calls.append(len(part))
        return Measured(len(part), len(part) // 2, len(part), 1.0, len(part), 1.0)

    chosen = Selection.of([[0, 1]])
    first = Runs(tmp_path, "f" * 64, "sql").measured(items[:50], chosen, measure)
    assert (calls, first.right) == ([50], 25)
    [file] = tmp_path.glob("*/sql.jsonl")
    with file.open("a") as half:
        half.write('{"name": "cut sho')
    again = Runs(tmp_path, "f" * 64, "sql").measured(items, chosen, measure)
    assert (calls, again.items, again.right) == ([50, 20], 70, 35)
    assert [json.loads(line)["items"] for line in file.read_text().splitlines()] == [50, 20]
    Runs(tmp_path, "e" * 64, "sql").measured(items[:50], chosen, measure)  # another model
    Runs(tmp_path, "f" * 64, "sql").measured(items[:50], Selection.of([[0, 2]]), measure)
    assert calls == [50, 20, 50, 50]


def test_the_grid_is_read_from_options_and_wrong_ones_are_refused():
    found = grid_of(10, ["sql"], ["all"], ["all"], ["all"], 3, "5, 25", automatic=True)
    assert {"naee", "mone", "random"} < set(found.scorers)
    assert "router_growth" not in found.scorers
    assert found.allocators == tuple(ALLOCATORS)
    assert (found.few_shot, found.draws, found.stand_ins) == ((5, 25), 3, ("nothing", "novice"))
    with pytest.raises(InvalidInput, match="no task 'cooking'"):
        grid_of(10, ["cooking"], None, None, None, 0, "", automatic=False)
    with pytest.raises(InvalidInput, match="5,10,25, got 'few'"):
        grid_of(10, None, None, None, None, 3, "few", automatic=False)
    with pytest.raises(InvalidInput, match="give --draws"):
        grid_of(10, None, None, None, None, 0, "5", automatic=False)


@pytest.mark.slow
def test_a_small_run_measures_every_row_and_a_second_one_measures_nothing(tmp_path, monkeypatch):
    grid = Grid(
        items=6,
        tasks=("music",),
        scorers=("gate", "random"),
        allocators=("uniform", "coverage"),
        stand_ins=("nothing", "novice"),
        keeps=(1.0, 0.25),
        draws=1,
        few_shot=(5,),
        automatic=True,
        evolve=4,
    )
    rows = bench_quality(grid, ignore, tmp_path)
    full = [one for one in rows if one.shots is None and one.stand_in == "nothing"]
    few, mean = [one for one in rows if one.shots == 5], [one for one in rows if one.stand_in == "novice"]
    assert [(one.keep, one.draw) for one in mean] == [(0.25, 0)] * 4 + [(0.25, 1)] * 4
    assert len(full) == 2 * (2 * 2 * 2 + 2 + 1)  # draws, scorers x allocators x sizes, the automatic choice, the bred
    assert {(one.scorer, one.allocator, one.draw) for one in few} == {
        ("gate", "coverage", 1),
        ("random", "coverage", 1),
    }
    assert {one.retention for one in full if one.keep == 1.0} == {1.0}
    assert {mean.draws for mean in means(rows) if mean.scorer == "automatic"} == {1}
    at = {(one.scorer, one.allocator): one.accuracy for one in full if one.keep == 0.25 and one.draw == 0}
    assert at["gate", "uniform"] > at["random", "uniform"]
    assert min(at["automatic", "searched"], at["eep", "evolved"]) >= at["random", "uniform"]

    def never(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(quality, "evaluate_forced", never)
    monkeypatch.setattr(quality, "gather_statistics", never)
    assert bench_quality(grid, ignore, tmp_path) == rows
