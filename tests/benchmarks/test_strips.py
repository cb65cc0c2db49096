"""`bench strips`: whole experts and strips at equal bytes, what the search chose measured on items it has not seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import strips
from benchmarks.strips import ALLOCATORS, AUTOMATIC, SCORERS, StripRow, Wish, bench_strips, strip_means
from demo.prepare import corpus
from profiler.progress import ignore
from store.database import open_store
from store.errors import InvalidInput

LEAST = Wish((1, 4), (0.125, 0.03125), ("music",), 2, ("gate_answers",), ("uniform",), (1,))


@pytest.mark.slow
def test_sizes_below_one_tokens_experts_have_rows_of_strips_alone_and_nothing_is_measured_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "ITEMS", 4)
    rows = bench_strips(LEAST, ignore, tmp_path)
    assert [(row.strips, row.bits, row.keep) for row in rows if row.way == AUTOMATIC] == [
        (1, 16, 0.125), (4, 16, 0.125), (4, 16, 0.03125), (1, 4, 0.125), (1, 4, 0.03125)
    ]  # fmt: skip
    assert {row.chosen for row in rows} == {"gate_answers, uniform", "camera, global"}
    assert all(row.items == 2 and row.nll > 0 and row.whole > 0 for row in rows)
    assert rows[0].bytes == rows[2].bytes == 4 * rows[4].bytes
    assert 0.97 < rows[6].bytes / rows[0].bytes < 1.03
    kept = {file: file.read_bytes() for file in tmp_path.glob("*/*") if file.suffix in {".jsonl", ".safetensors"}}
    assert len(kept) > 3
    assert bench_strips(LEAST, ignore, tmp_path) == rows
    assert {file: file.read_bytes() for file in kept} == kept


@pytest.mark.slow
def test_what_serves_was_chosen_by_evaluation_items_alone(tmp_path: Path) -> None:
    wish = Wish((1,), (0.125,), ("music",), 2, SCORERS, ALLOCATORS, ())
    [row, _] = bench_strips(wish, ignore, tmp_path)
    with open_store(f"sqlite:///{tmp_path / f'profiles-{wish.digest}.db'}") as store:
        [profile] = store.profiles.list()
        found = [(evidence, stored) for stored, evidence in store.evaluations.list(profile.id)]
    assert {evidence.evaluation_hash for evidence, _ in found} == {corpus("music", "evaluation").content_hash}
    best = min(found, key=lambda pair: (-(pair[0].accuracy or 0), pair[0].nll))[1]
    assert row.chosen == f"{best.scorer}, {best.allocator}"


def test_a_task_or_a_number_of_strips_that_cannot_be_is_refused_before_anything_is_packed() -> None:
    with pytest.raises(InvalidInput, match="no task 'nosuch'"):
        Wish(tasks=("nosuch",))
    with pytest.raises(InvalidInput, match=r"8: 2, 3, 4, 6, 12\. Got 5"):
        Wish(strips=(1, 5))
    with pytest.raises(InvalidInput, match="4 strips of an expert's 96 channels have 24 each"):
        Wish(quantised=(4,))
    with pytest.raises(InvalidInput, match="share of experts"):
        Wish(keeps=(1.5,))


def test_means_have_the_worst_task_whole_experts_first_and_the_largest_size_first() -> None:
    def row(count: int, keep: float, task: str, accuracy: float) -> StripRow:
        return StripRow(count, 16, keep, AUTOMATIC, task, "peu, coverage", 4, accuracy, 0.9, 0.5, 1.0, 8)

    rows = [row(4, 0.1, "a", 0.4), row(4, 0.1, "b", 0.8), row(4, 0.2, "a", 0.7), row(1, 0.1, "a", 0.3)]
    found = [(one.strips, one.keep, one.accuracy, one.worst, one.worst_task) for one in strip_means(rows)]
    assert found == [(1, 0.1, 0.3, 0.3, "a"), (4, 0.2, 0.7, 0.7, "a"), (4, 0.1, pytest.approx(0.6), 0.4, "a")]
