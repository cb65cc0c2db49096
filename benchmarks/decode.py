"""Decoding under the same memory cap: the engine beside plain transformers, accelerate's disk offload and llama.cpp.

Same weights, same prompt, same number of tokens; every arm in a process of its own in a control group whose limit
counts the page cache, files evicted before each. Rounds are interleaved, figures are medians, ratios are taken inside
each round, which also reads plain memory on the same number of threads.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks.decode_arm import Task, prompt
from benchmarks.descent import smallest_cap
from benchmarks.llama_peer import LlamaPeer
from benchmarks.memory_cap import drop_page_cache, run_capped
from benchmarks.plain_memory import active_bytes, memory_gb_per_s

SECONDS = 900
LLAMA = "llama.cpp"
PYTHON_SHARE = 340 << 20  # what the interpreter with torch and transformers takes of a cap before any weight
AMPLE = 2 << 30  # beyond the weights: where the search for an arm's smallest cap begins


@dataclass(frozen=True, slots=True)
class Terms:
    """What every arm has to do, and under which cap."""

    model: Path
    cap: int | None = None
    keep: float = 0.25
    tokens: int = 48
    threads: int = 1
    prompt_tokens: int = 16
    peer: LlamaPeer | None = None

    @property
    def files(self) -> list[Path]:
        return [*sorted(self.model.glob("*.safetensors")), *([self.peer.gguf] if self.peer else [])]


@dataclass(frozen=True, slots=True)
class DecodeArm:
    """`failed` says why an arm has no figures: it could not run under the cap. `read_bytes` are those of prefill and
    decoding; peaks are the whole process's, opening included, seen every few milliseconds.

    `gb_per_s` is `active_bytes`, the weights a token needs, over its time; `ratio_to_memory` that over a plain read of
    memory in the same round, `memory_gb_per_s`. `smallest_cap` is None where nobody looked, or none was enough.
    """

    name: str
    memory_cap: int | None
    rounds: int
    failed: str | None = None
    tok_per_s: float | None = None
    ttft_s: float | None = None
    read_bytes: int | None = None
    peak_anon_bytes: int | None = None
    peak_cache_bytes: int | None = None
    peak_group_bytes: int | None = None
    active_bytes: int | None = None
    gb_per_s: float | None = None
    memory_gb_per_s: float | None = None
    ratio_to_memory: float | None = None
    smallest_cap: int | None = None


@dataclass(frozen=True, slots=True)
class _Run:
    tok_per_s: float
    ttft_s: float
    read_bytes: int
    peak_anon_bytes: int
    peak_cache_bytes: int | None  # not known where there is no control group
    peak_group_bytes: int


def bench_decode(
    terms: Terms, arms: Sequence[str], rounds: int, *, descend: bool = False
) -> tuple[list[DecodeArm], dict[str, float]]:
    """The arms and ratios between them; with `descend` also each arm's smallest cap, to 50 MiB."""
    arms = [*arms, *([LLAMA] if terms.peer else [])]
    runs: dict[str, list[_Run]] = {arm: [] for arm in arms}
    failures: dict[str, str] = {}
    memory: list[float] = []
    for _ in range(rounds):
        memory.append(memory_gb_per_s(terms.threads))
        for arm in arms:
            if arm in failures:
                continue
            found = _run(arm, terms, terms.cap)
            if isinstance(found, str):
                failures[arm] = found
            else:
                runs[arm].append(found)
    active = active_bytes(terms.model)
    lowest = {arm: _smallest_cap(arm, terms, arm in failures) if descend else None for arm in arms}
    made = [
        _failed(arm, terms, len(runs[arm]), failures[arm], lowest[arm])
        if arm in failures
        else _summary(arm, terms, runs[arm], active, memory, lowest[arm])
        for arm in arms
    ]
    return made, _ratios(runs, failures)


def _smallest_cap(arm: str, terms: Terms, failed: bool) -> int | None:
    """Downwards from the cap that was asked for, or from more than the weights where the arm failed there."""
    ample = sum(file.stat().st_size for file in terms.files) + AMPLE
    high = ample if terms.cap is None or failed else terms.cap
    return smallest_cap(lambda cap: isinstance(_run(arm, terms, cap), _Run), high)


def _run(arm: str, terms: Terms, cap: int | None) -> _Run | str:
    """The arm's figures under `cap`, cold, or why there are none."""
    drop_page_cache(terms.files)
    environment = dict(os.environ) | {"OMP_NUM_THREADS": str(terms.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    ended = run_capped(_command(_task(arm, terms, cap), terms.peer), cap, environment, SECONDS)
    if ended.code != 0:
        if ended.oom_kills:
            return "killed for want of memory"  # what it printed before is a bar of progress at best
        return (
            f"exit code {ended.code}: {ended.errors.strip().splitlines()[-1] if ended.errors.strip() else 'no message'}"
        )
    figures = json.loads(ended.output.splitlines()[-1])
    return _Run(
        figures["tok_per_s"],
        figures["ttft_s"],
        figures["read_bytes"],
        peak_anon_bytes=ended.peak_anon_bytes,
        peak_cache_bytes=ended.peak_cache_bytes,
        peak_group_bytes=ended.peak_bytes,
    )


def _task(arm: str, terms: Terms, cap: int | None) -> Task:
    memory = None if cap is None else max(cap - PYTHON_SHARE, 1)
    counts = {"prompt_tokens": terms.prompt_tokens, "tokens": terms.tokens, "threads": terms.threads}
    return Task(arm, str(terms.model), memory, terms.keep, **counts)


def _command(task: Task, peer: LlamaPeer | None) -> list[str]:
    if task.arm != LLAMA or peer is None:
        return [sys.executable, "-m", "benchmarks.decode_arm", json.dumps(asdict(task))]
    wish = {"gguf": str(peer.gguf), "prompt": prompt(task), "tokens": task.tokens, "threads": task.threads}
    return [str(peer.python), str(Path(__file__).with_name("llama_arm.py")), json.dumps(wish)]


def _failed(name: str, terms: Terms, rounds: int, why: str, lowest: int | None) -> DecodeArm:
    return DecodeArm(name, terms.cap, rounds, why, smallest_cap=lowest)


def _summary(
    name: str, terms: Terms, runs: Sequence[_Run], active: int | None, memory: Sequence[float], lowest: int | None
) -> DecodeArm:
    def over_runs(rate: Callable[[_Run, float, int], float]) -> float | None:
        if active is None:
            return None
        return median(rate(run, plain, active) for run, plain in zip(runs, memory, strict=True))

    return DecodeArm(
        name=name,
        memory_cap=terms.cap,
        rounds=len(runs),
        tok_per_s=median(run.tok_per_s for run in runs),
        ttft_s=median(run.ttft_s for run in runs),
        read_bytes=int(median(run.read_bytes for run in runs)),
        peak_anon_bytes=max(run.peak_anon_bytes for run in runs),
        peak_cache_bytes=max((run.peak_cache_bytes for run in runs if run.peak_cache_bytes is not None), default=None),
        peak_group_bytes=max(run.peak_group_bytes for run in runs),
        active_bytes=active,
        gb_per_s=over_runs(lambda run, _, size: run.tok_per_s * size / 1e9),
        memory_gb_per_s=median(memory),
        ratio_to_memory=over_runs(lambda run, plain, size: run.tok_per_s * size / 1e9 / plain),
        smallest_cap=lowest,
    )


def _ratios(runs: dict[str, list[_Run]], failures: dict[str, str]) -> dict[str, float]:
    """Our arms over every peer, round by round."""
    ratios = {}
    for ours in ("mask", "exact-lru", "exact-ahead"):
        for peer, theirs in runs.items():
            if peer != ours and {ours, peer}.isdisjoint(failures) and runs.get(ours) and theirs:
                pairs = zip(runs[ours], theirs, strict=True)
                ratios[f"{ours}/{peer}"] = median(a.tok_per_s / b.tok_per_s for a, b in pairs)
    return ratios
