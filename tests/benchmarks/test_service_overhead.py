"""The overhead bench end to end, small: its arms answer the same prompts, and idle streams are let go."""

from __future__ import annotations

import pytest

from benchmarks.service_overhead import ARMS, Work, bench_service


@pytest.mark.slow
def test_every_arm_is_timed_and_idle_streams_come_and_go() -> None:
    work = Work(requests=2, tokens=3, clients=2, idle=5, rounds=1, seconds=0.2, embedder="hash")
    arms, throughput = bench_service(work)
    assert [arm.name for arm in arms] == list(ARMS)
    assert all(0 < arm.p50_ms <= arm.p90_ms for arm in arms)
    assert arms[0].added_ms == 0
    assert throughput["idle_streams"] == 5
    assert throughput["tok_per_s_alone"] > 0
    assert throughput["ratio_lowest"] <= throughput["ratio_beside_idle"] <= throughput["ratio_highest"]
