"""`bench decode`: what is made of what the arms say, of what was seen of them, and the search for the smallest cap."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import decode
from benchmarks.commands import app
from benchmarks.decode import Terms, bench_decode
from benchmarks.descent import STEP
from benchmarks.memory_cap import Ended
from benchmarks.plain_memory import active_bytes
from engine.tiny import write_tiny

NEEDS = {"mask": 3 * STEP, "transformers": 9 * STEP}
FAST = {"mask": 40.0, "transformers": 10.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("olmoe", tmp_path_factory.mktemp("tiny"), dtype="bfloat16")


@pytest.fixture(autouse=True)
def caps(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The caps that arms ran under: they complete when it is enough."""
    asked: list[int | None] = []

    def run(command: list[str], cap: int | None, *_: object) -> Ended:
        asked.append(cap)
        arm = json.loads(command[-1])["arm"]
        if cap is not None and cap < NEEDS[arm]:
            return Ended(-9, "", "Loading weights:  39%", cap, 1)
        figures = {"tok_per_s": FAST[arm], "ttft_s": 0.5, "read_bytes": 7}
        return Ended(0, json.dumps(figures), "", 30, 0, 10, 20)

    monkeypatch.setattr(decode, "run_capped", run)
    monkeypatch.setattr(decode, "memory_gb_per_s", lambda _: 10.0)
    return asked


def test_anonymous_memory_and_page_cache_are_shown_apart(model: Path) -> None:
    [arm], _ = bench_decode(Terms(model), ["mask"], 2)
    assert (arm.peak_anon_bytes, arm.peak_cache_bytes, arm.peak_group_bytes) == (10, 20, 30)


def test_an_arm_s_speed_is_set_beside_a_plain_read_of_memory(model: Path) -> None:
    arms, ratios = bench_decode(Terms(model), ["mask", "transformers"], 2)
    size = active_bytes(model)
    assert size is not None
    for arm in arms:
        assert (arm.active_bytes, arm.memory_gb_per_s) == (size, 10.0)
        assert arm.gb_per_s == pytest.approx(FAST[arm.name] * size / 1e9)
        assert arm.ratio_to_memory == pytest.approx(FAST[arm.name] * size / 1e10)
    assert ratios == {"mask/transformers": 4.0}


def test_descending_finds_each_arm_s_smallest_cap_also_of_one_that_failed(model: Path) -> None:
    arms, _ = bench_decode(Terms(model, cap=5 * STEP), ["mask", "transformers"], 1, descend=True)
    assert [arm.smallest_cap for arm in arms] == [3 * STEP, 9 * STEP]
    assert [arm.failed for arm in arms] == [None, "killed for want of memory"]


def test_without_descending_nobody_looks(model: Path, caps: list[int | None]) -> None:
    [arm], _ = bench_decode(Terms(model, cap=5 * STEP), ["mask"], 2)
    assert (arm.smallest_cap, caps) == (None, [5 * STEP] * 2)


def test_an_arm_that_takes_too_long_fails_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: Callable[..., Ended] = decode.run_capped

    def late(command: list[str], *rest: object) -> Ended:
        if json.loads(command[-1])["arm"] == "transformers":
            return Ended(-9, "", "\nnot done after 900 s", 0, 0)
        return run(command, *rest)

    monkeypatch.setattr(decode, "run_capped", late)
    arms, _ = bench_decode(Terms(model), ["transformers", "mask"], 2)
    assert [arm.failed for arm in arms] == ["exit code -9: not done after 900 s", None]
    assert arms[1].tok_per_s == FAST["mask"]


def test_the_command_prints_the_keys(model: Path) -> None:
    given = ["decode", "--model", str(model), "--arm", "mask", "--rounds", "1", "--cap", "500MiB", "--descend"]
    result = CliRunner().invoke(app, [*given, "--json"], catch_exceptions=False)
    [arm] = json.loads(result.stdout.splitlines()[-1])["arms"]
    assert arm["smallest_cap"] == 3 * STEP
    assert {"active_bytes", "gb_per_s", "memory_gb_per_s", "ratio_to_memory", "peak_cache_bytes"} <= arm.keys()
