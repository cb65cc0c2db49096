"""What `bench guard` makes of its rows: means over tasks, the worst of them, times beside mask mode's."""

from __future__ import annotations

from benchmarks.guard import ArmOf, GuardRow, guard_means


def _row(task: str, keep: float, auroc: float, false: float, found: float, seconds: float) -> GuardRow:
    own = {
        "mask": ArmOf(0.9, 0.0, 10.0, seconds),
        "auto": ArmOf(0.95, false, 20.0, 2 * seconds),
        "exact": ArmOf(1.0, 0.0, 40.0, 3 * seconds),
    }
    others = {arm: ArmOf(found, found, 5.0, 4 * seconds) for arm in own}
    return GuardRow(task, keep, auroc, 0.5, 0.04, false, found, own, others, 10)


def test_means_are_of_each_size_the_largest_first_with_its_worst_task() -> None:
    rows = [
        _row("a", 0.25, 1.0, 0.0, 1.0, 1.0),
        _row("b", 0.5, 0.7, 0.3, 0.5, 1.0),
        _row("b", 0.25, 0.8, 0.2, 0.6, 3.0),
    ]
    half, quarter = guard_means(rows)
    assert (half.keep, quarter.keep) == (0.5, 0.25)
    assert (half.auroc, half.worst_auroc) == (0.7, 0.7)
    assert (quarter.auroc, quarter.worst_auroc) == (0.9, 0.8)
    assert (quarter.false_alarms, quarter.worst_false_alarms) == (0.1, 0.2)
    assert (quarter.detections, quarter.worst_detections) == (0.8, 0.6)
    assert quarter.own_time == {"mask": 1.0, "auto": 2.0, "exact": 3.0}
    assert quarter.own_accuracy["auto"] == 0.95
    assert quarter.others_bytes["exact"] == 5.0
