"""`bench prompts`: what is made of what the arms say, and the arms themselves on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import prompts
from benchmarks.commands import app
from benchmarks.llama_peer import LlamaPeer
from benchmarks.memory_cap import Ended
from benchmarks.prompt_arm import ARMS, Task, run
from benchmarks.prompts import LLAMA, Terms, bench_prompts
from engine.tiny import write_tiny

SPEED = {"mask": 100.0, "exact": 80.0, "transformers": 20.0, LLAMA: 50.0}  # tokens a second


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("olmoe", tmp_path_factory.mktemp("tiny"), dtype="bfloat16")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arms in the order in which they ran, each at its own speed."""
    seen: list[str] = []

    def ran(command: list[str], *_: object) -> Ended:
        wish = json.loads(command[-1])
        arm = wish.get("arm", LLAMA)
        seen.append(arm)
        lengths = wish.get("lengths") or sorted({len(prompt) for prompt in wish["prompts"]})
        seconds = {length: [length / SPEED[arm]] * 3 for length in lengths}
        return Ended(0, "Loading\n" + json.dumps({"seconds": seconds}), "", 0, 0)

    monkeypatch.setattr(prompts, "run_capped", ran)
    return seen


def test_arms_take_turns_and_are_compared_with_the_first(model: Path, asked: list[str]) -> None:
    peer = LlamaPeer(Path("python"), Path("model.gguf"))
    rows = bench_prompts(Terms(model, (8, 32), peer=peer), ["mask", "transformers"], 2)
    assert asked == ["mask", "transformers", LLAMA] * 2
    assert [(row.arm, row.prompt_tokens) for row in rows[::2]] == [("mask", 8), ("transformers", 8), (LLAMA, 8)]
    for row in rows:
        assert row.tok_per_s == pytest.approx(SPEED[row.arm])
        assert row.seconds == pytest.approx(row.prompt_tokens / SPEED[row.arm])
        assert (row.ratio, row.ratio_low, row.ratio_high) == pytest.approx((100 / SPEED[row.arm],) * 3)
        assert row.rounds == 2


def test_copies_of_the_model_are_arms_like_the_first(model: Path, asked: list[str]) -> None:
    copies = (Path("somewhere/in-four-bits"), Path("in-eight"))
    rows = bench_prompts(Terms(model, (8,), copies=copies), ["exact", "transformers"], 1)
    assert [row.arm for row in rows] == ["exact", "transformers", "exact, in-four-bits", "exact, in-eight"]
    assert asked == ["exact", "transformers", "exact", "exact"]


def test_an_arm_that_fails_says_why_and_leaves_the_others_their_figures(
    model: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = prompts.run_capped

    def failing(command: list[str], *rest: object) -> Ended:
        if json.loads(command[-1])["arm"] == "mask":
            return Ended(1, "", "Traceback\nOSError: no such model", 0, 0)
        return ran(command, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(prompts, "run_capped", failing)
    mask, plain = bench_prompts(Terms(model, (8,)), ["mask", "transformers"], 1)
    assert mask.failed == "exit code 1: OSError: no such model"
    assert (mask.seconds, plain.ratio) == (None, None)
    assert plain.tok_per_s == pytest.approx(20)


def test_every_arm_reads_the_same_prompts_and_ours_say_what_transformers_says(model: Path) -> None:
    """With all experts; rounding aside, which random weights seldom show."""
    tasks = {arm: Task(arm, str(model), 0.5, (9, 40), 3, 1) for arm in ARMS}
    assert len({tuple(task.prompts()) for task in tasks.values()}) == 1
    assert [len(prompt) for prompt in tasks["mask"].prompts()] == [40, *(9, 40) * 3]
    found = {arm: run(task) for arm, task in tasks.items()}
    for one in found.values():
        assert {length: len(seconds) for length, seconds in one.seconds.items()} == {9: 3, 40: 3}
        assert len(one.first_tokens) == 6
    agreeing = zip(found["exact"].first_tokens, found["transformers"].first_tokens, strict=True)
    assert sum(one == other for one, other in agreeing) >= 5


def test_a_wrong_arm_is_refused(model: Path) -> None:
    shown = CliRunner().invoke(app, ["prompts", "--model", str(model), "--arm", "vllm"])
    assert shown.exit_code != 0
    assert "mask, exact, transformers" in str(shown.exception)


def test_one_object_on_the_last_line(model: Path, asked: list[str]) -> None:
    words = ["prompts", "--model", str(model), "--length", "8", "--arm", "mask", "--rounds", "1", "--json"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.output.splitlines()[-1])
    assert found["rows"][0]["tok_per_s"] == pytest.approx(100)
    assert "cpu" in found["machine"]
