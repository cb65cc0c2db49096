"""Decoding under the same memory cap: the engine beside plain transformers, accelerate's disk offload and llama.cpp.

Same weights, same prompt, same number of tokens; every arm in a process of its own in a control group whose limit
counts the page cache, files evicted before each. Rounds are interleaved, figures are medians, ratios are taken inside
each round.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks.decode_arm import Task, prompt
from benchmarks.llama_peer import LlamaPeer
from benchmarks.memory_cap import drop_page_cache, run_capped

SECONDS = 900
LLAMA = "llama.cpp"
PYTHON_SHARE = 340 << 20  # what the interpreter with torch and transformers takes of a cap before any weight


@dataclass(frozen=True, slots=True)
class DecodeArm:
    """`failed` says why an arm has no figures: it could not run under the cap. `read_bytes` are
    those of prefill and decoding; peaks are the whole process's, opening included, seen every few milliseconds."""

    name: str
    memory_cap: int | None
    tok_per_s: float | None
    ttft_s: float | None
    read_bytes: int | None
    peak_anon_bytes: int | None
    peak_cache_bytes: int | None
    peak_group_bytes: int | None
    rounds: int
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class _Run:
    tok_per_s: float
    ttft_s: float
    read_bytes: int
    peak_anon_bytes: int
    peak_cache_bytes: int | None  # not known where there is no control group
    peak_group_bytes: int


def bench_decode(
    model: Path,
    arms: Sequence[str],
    cap: int | None,
    keep: float,
    tokens: int,
    threads: int,
    rounds: int,
    peer: LlamaPeer | None = None,
    prompt_tokens: int = 16,
) -> tuple[list[DecodeArm], dict[str, float]]:
    files = [*sorted(model.glob("*.safetensors")), *([peer.gguf] if peer else [])]
    arms = [*arms, *([LLAMA] if peer else [])]
    runs: dict[str, list[_Run]] = {arm: [] for arm in arms}
    failures: dict[str, str] = {}
    for _ in range(rounds):
        for arm in arms:
            if arm in failures:
                continue
            drop_page_cache(files)
            found = _run(_task(arm, model, cap, keep, tokens, threads, prompt_tokens), cap, peer)
            if isinstance(found, str):
                failures[arm] = found
            else:
                runs[arm].append(found)
    made = [_summary(arm, cap, runs[arm], failures.get(arm)) for arm in arms]
    return made, _ratios(runs, failures)


def _task(arm: str, model: Path, cap: int | None, keep: float, tokens: int, threads: int, prompt_tokens: int) -> Task:
    memory = None if cap is None else max(cap - PYTHON_SHARE, 1)
    return Task(arm, str(model), memory, keep, prompt_tokens=prompt_tokens, tokens=tokens, threads=threads)


def _run(task: Task, cap: int | None, peer: LlamaPeer | None) -> _Run | str:
    """The arm's figures, or why there are none."""
    command = _command(task, peer)
    environment = dict(os.environ) | {"OMP_NUM_THREADS": str(task.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    ended = run_capped(command, cap, environment, SECONDS)
    if ended.code != 0:
        killed = "killed for want of memory" if ended.oom_kills else f"exit code {ended.code}"
        return f"{killed}: {ended.errors.strip().splitlines()[-1] if ended.errors.strip() else 'no message'}"
    figures = json.loads(ended.output.splitlines()[-1])
    return _Run(
        figures["tok_per_s"],
        figures["ttft_s"],
        figures["read_bytes"],
        peak_anon_bytes=ended.peak_anon_bytes,
        peak_cache_bytes=ended.peak_cache_bytes,
        peak_group_bytes=ended.peak_bytes,
    )


def _command(task: Task, peer: LlamaPeer | None) -> list[str]:
    if task.arm != LLAMA or peer is None:
        return [sys.executable, "-m", "benchmarks.decode_arm", json.dumps(asdict(task))]
    wish = {"gguf": str(peer.gguf), "prompt": prompt(task), "tokens": task.tokens, "threads": task.threads}
    return [str(peer.python), str(Path(__file__).with_name("llama_arm.py")), json.dumps(wish)]


def _summary(name: str, cap: int | None, runs: Sequence[_Run], failed: str | None) -> DecodeArm:
    if failed is not None or not runs:
        return DecodeArm(name, cap, None, None, None, None, None, None, len(runs), failed)
    return DecodeArm(
        name=name,
        memory_cap=cap,
        tok_per_s=median(run.tok_per_s for run in runs),
        ttft_s=median(run.ttft_s for run in runs),
        read_bytes=int(median(run.read_bytes for run in runs)),
        peak_anon_bytes=max(run.peak_anon_bytes for run in runs),
        peak_cache_bytes=max((run.peak_cache_bytes for run in runs if run.peak_cache_bytes is not None), default=None),
        peak_group_bytes=max(run.peak_group_bytes for run in runs),
        rounds=len(runs),
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
