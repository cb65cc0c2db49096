"""The profiling pass beside a plain forward of the same tokens, and its peak memory where the model does not fit.

Both models are loaded in one process and take turns, run by run, on the same padded batches. The peak is that of a
process of its own, in which the engine's budget holds one layer's experts and the pass streams layer by layer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from demo.prepare import corpus
from demo.tasks.registry import TASKS
from engine.card import ModelCard
from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import plan_memory
from profiler.batches import Batch, Encoded, cut, encode_corpus, pad
from profiler.corpus import Corpus, gather
from profiler.gather import ROWS, gather_statistics
from profiler.progress import ignore
from profiler.run import Run
from profiler.stream import stream_statistics
from store.checkpoint import CheckpointMap

CONTEXT = 512
AMPLE = 1 << 45
IMPLEMENTATIONS = ("eager", "grouped_mm")  # which is faster depends on shape and threads: the plain forward may choose


@dataclass(frozen=True, slots=True)
class ProfileFigures:
    """Medians over the runs; `ratio` is the median of the ratios run by run, `tok_per_s` that of the pass in memory.

    `peak_anon_bytes` is the streaming process's whole anonymous memory, `idle_anon_bytes` what it has before a model.
    """

    model: str
    tokens: int
    tok_per_s: float
    forward_tok_per_s: float
    ratio: float
    forward_implementation: str
    stream_tok_per_s: float
    memory_cap: int
    peak_anon_bytes: int
    idle_anon_bytes: int
    model_bytes: int
    runs: int


def bench_profile(model: Path, items: int, runs: int) -> ProfileFigures:
    cap = one_layer(model)
    with Engine.open(_config(model, None)) as engine:
        text = encode_corpus(engine, calibration(items))
        passes, forwards, name = _interleaved(engine, text, runs)
    tokens = sum(len(one.tokens) for one in text)
    streamed = _streamed(model, items, cap)
    return ProfileFigures(
        model=model.name,
        tokens=tokens,
        tok_per_s=tokens / median(passes),
        forward_tok_per_s=tokens / median(forwards),
        ratio=median(forward / here for forward, here in zip(forwards, passes, strict=True)),
        forward_implementation=name,
        stream_tok_per_s=tokens / streamed["seconds"],
        memory_cap=cap,
        peak_anon_bytes=streamed["peak_anon_bytes"],
        idle_anon_bytes=streamed["idle_anon_bytes"],
        model_bytes=CheckpointMap.open(model).weight_bytes,
        runs=runs,
    )


def calibration(items: int) -> Corpus:
    """The first items of every demo task: real text, of real lengths, for any model."""
    parts = [corpus(task.name, "calibration", items) for task in TASKS]
    return gather([item for part in parts for item in part.items])


def one_layer(model: Path) -> int:
    """The budget that holds one layer's experts, or what one token needs in every layer if that is more."""
    card = ModelCard.read(model)
    plan = plan_memory(card, _config(model, AMPLE))
    return plan.fixed_bytes + max(card.experts, card.layers * card.top_k) * plan.slot_bytes


def _config(model: Path, memory: int | None) -> EngineConfig:
    return EngineConfig(model, memory=memory, max_context=CONTEXT, max_batch=ROWS, chunk_tokens=2048)


def _interleaved(engine: Engine, text: Sequence[Encoded], runs: int) -> tuple[list[float], list[float], str]:
    """Seconds of the pass and of the faster plain forward, in turns; the first round warms up."""
    plain = AutoModelForCausalLM.from_pretrained(engine.card.folder, dtype=getattr(torch, engine.plan.dtype)).eval()
    batches = [pad(part) for part in cut(engine, text, ROWS)]
    passes: list[float] = []
    forwards: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for number in range(runs + 1):
        seconds = _pass_seconds(engine, text)
        others = {name: _forward_seconds(plain, name, batches) for name in IMPLEMENTATIONS}
        if number:
            passes.append(seconds)
            for name, value in others.items():
                forwards[name].append(value)
    name = min(forwards, key=lambda each: median(forwards[each]))
    return passes, forwards[name], name


def _pass_seconds(engine: Engine, text: Sequence[Encoded]) -> float:
    with tempfile.TemporaryDirectory(prefix="moepager-profile-") as folder:
        started = time.perf_counter()
        gather_statistics(engine, text, Run(Path(folder), "bench", ""), "bench", ROWS, ignore)
        return time.perf_counter() - started


@torch.inference_mode()
def _forward_seconds(plain: Any, implementation: str, batches: Sequence[Batch]) -> float:
    """Logits of the last position only: the pass is not charged for a head that a plain forward does not need."""
    plain.set_experts_implementation(implementation)
    started = time.perf_counter()
    for batch in batches:
        plain(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    return time.perf_counter() - started


def _streamed(model: Path, items: int, cap: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.profile_pass", str(model), str(items), str(cap)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return figures


def stream_alone(model: Path, items: int, cap: int) -> dict[str, Any]:
    """The streaming pass in this process, watched: what it takes at most and how long it lasts."""
    idle = anonymous_bytes()
    folder = tempfile.TemporaryDirectory(prefix="moepager-profile-")
    with folder as runs, _Watch() as watch, Engine.open(_config(model, cap)) as engine:
        text = encode_corpus(engine, calibration(items))
        started = time.perf_counter()
        stream_statistics(engine, text, Run(Path(runs), "bench", ""), "bench", ROWS, ignore)
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_anon_bytes": watch.peak, "idle_anon_bytes": idle}


class _Watch:
    """The peak of this process's anonymous memory, looked at every few milliseconds."""

    def __enter__(self) -> _Watch:
        self.peak = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(0.005):
            self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


if __name__ == "__main__":
    print(json.dumps(stream_alone(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
