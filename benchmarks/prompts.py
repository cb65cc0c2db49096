"""Reading prompts, with all that is needed in memory: the engine beside plain transformers and llama.cpp.

Same weights, same prompts, same number of threads; every arm in a process of its own, arms interleaved round by round.
Figures are medians over rounds of the round's median, ratios are taken inside each round. What a request pays for
experts that are not there is `bench ttft`'s to say.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.llama_peer import LlamaPeer
from benchmarks.memory_cap import run_capped
from benchmarks.prompt_arm import Task

SECONDS = 900
LLAMA = "llama.cpp"


@dataclass(frozen=True, slots=True)
class Terms:
    model: Path
    lengths: tuple[int, ...] = (16, 64, 128, 512)
    keep: float = 0.25
    repeats: int = 3
    threads: int = 1
    peer: LlamaPeer | None = None
    copies: tuple[Path, ...] = ()  # of the model, such as quantised ones: arms more, like the first

    def arms(self, names: Sequence[str]) -> dict[str, tuple[str, Path]]:
        """By the name that is shown: what each arm does, and with which checkpoint."""
        copies = {f"{names[0]}, {copy.name}": (names[0], copy) for copy in self.copies}
        peer = {LLAMA: (LLAMA, self.model)} if self.peer else {}
        return {name: (name, self.model) for name in names} | copies | peer


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One arm and length. `failed` says why an arm has no figures; `ratio` is to the first arm's seconds in the same
    round, above 1 where that arm is faster, with the lowest and the highest."""

    arm: str
    prompt_tokens: int
    seconds: float | None = None
    tok_per_s: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    rounds: int = 0
    failed: str | None = None


class Ratio(NamedTuple):
    median: float | None
    low: float | None
    high: float | None


_Round = dict[int, float]  # seconds by length


def bench_prompts(terms: Terms, arms: Sequence[str], rounds: int) -> list[PromptRow]:
    """Rows arm by arm; the first arm is what the others are compared with."""
    named = terms.arms(arms)
    found: dict[str, list[_Round]] = {name: [] for name in named}
    failures: dict[str, str] = {}
    for number in range(rounds):
        for name, (arm, model) in named.items():
            if name in failures:
                continue
            seen = _run(arm, model, terms, number)
            if isinstance(seen, str):
                failures[name] = seen
            else:
                found[name].append(seen)
    base = [] if arms[0] in failures else found[arms[0]]
    return [_row(name, length, found[name], base, failures.get(name)) for name in named for length in terms.lengths]


def _run(arm: str, model: Path, terms: Terms, seed: int) -> _Round | str:
    """The arm's seconds, or why there are none."""
    environment = dict(os.environ) | {"OMP_NUM_THREADS": str(terms.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    task = Task(arm, str(model), terms.keep, terms.lengths, terms.repeats, terms.threads, seed)
    ended = run_capped(_command(task, terms.peer), None, environment, SECONDS)
    if ended.code != 0:
        return f"exit code {ended.code}: {(ended.errors.strip().splitlines() or ['no message'])[-1]}"
    figures = json.loads(ended.output.splitlines()[-1])["seconds"]
    return {int(length): median(seconds) for length, seconds in figures.items()}


def _command(task: Task, peer: LlamaPeer | None) -> list[str]:
    if task.arm != LLAMA or peer is None:
        return [sys.executable, "-m", "benchmarks.prompt_arm", json.dumps(asdict(task))]
    wish = {"gguf": str(peer.gguf), "prompts": [*task.prompts()], "threads": task.threads}
    return [str(peer.python), str(Path(__file__).with_name("llama_arm.py")), json.dumps(wish)]


def _row(arm: str, length: int, rounds: Sequence[_Round], base: Sequence[_Round], failed: str | None) -> PromptRow:
    if failed is not None:
        return PromptRow(arm, length, failed=failed)
    seconds = median(seen[length] for seen in rounds)
    ratios = [seen[length] / first[length] for seen, first in zip(rounds, base, strict=False)]
    of = Ratio(median(ratios), min(ratios), max(ratios)) if ratios else Ratio(None, None, None)
    return PromptRow(arm, length, seconds, length / seconds, of.median, of.low, of.high, len(rounds))
