"""An alarm where a task's traffic changes, once, and none where it only varies."""

from __future__ import annotations

import numpy as np

from service.drift import DELAY, WARM_UP, Alarm, DriftWatch


def watch() -> tuple[DriftWatch, list[Alarm]]:
    alarms: list[Alarm] = []
    return DriftWatch(alarms.append), alarms


def test_a_shift_is_found_within_ten_requests_and_told_once() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        watched, alarms = watch()
        for step in range(230):
            watched.observe("t", "p", 1.0 - rng.normal(0.1 if step < 200 else 0.2, 0.01))
            assert not (alarms and step < 200), (seed, step)
            if step == 210:
                assert len(alarms) == 1, seed
        assert len(alarms) == 1
        assert watched.drifting("t")
        assert alarms[0].level > alarms[0].bound > 0.1


def test_an_alarm_ends_when_the_traffic_is_as_before_and_may_ring_again() -> None:
    watched, alarms = watch()
    for miss in [0.1, 0.12] * 30 + [0.5] * 10 + [0.1] * 20:
        watched.observe("t", "p", 1.0 - miss)
    assert (len(alarms), watched.drifting("t")) == (1, False)
    for _ in range(10):
        watched.observe("t", "p", 0.5)
    assert (len(alarms), watched.drifting("t")) == (2, True)


def test_nothing_is_judged_before_there_is_a_baseline() -> None:
    watched, alarms = watch()
    for miss in [0.0] * (WARM_UP + DELAY - 1) + [1.0]:
        watched.observe("t", "p", 1.0 - miss)
    assert not alarms


def test_a_new_profile_begins_anew_and_tasks_are_apart() -> None:
    watched, alarms = watch()
    for _ in range(50):
        watched.observe("t", "old", 0.9)
        watched.observe("u", "p", 0.2)
    for _ in range(50):
        watched.observe("t", "new", 0.3)
    assert not alarms
    assert not watched.drifting("t")
    assert not watched.drifting("unknown")
