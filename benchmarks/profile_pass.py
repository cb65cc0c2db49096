"""The profiling pass beside a plain forward of the same tokens, and its peak memory where the model does not fit.

Both models are loaded in one process and take turns, run by run, on the same padded batches. The peak is that of a
process of its own, in which the engine's budget holds one layer's experts and the pass streams layer by layer. Under
`--cap` that process is in a control group whose limit counts the page cache and is below the model's bytes.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.decode import PYTHON_SHARE
from benchmarks.memory_cap import drop_page_cache, run_capped
from benchmarks.own_counters import anonymous_bytes
from benchmarks.watch import Watch
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
from store.errors import InvalidInput, MoepagerError
from store.sizes import show_bytes

AMPLE = 1 << 45
SECONDS = 1800
SPECIAL = 32  # tokens that a template may put around an item
LOOK_SECONDS = 0.005  # between two looks at the streaming pass's memory
CHUNK = 1024  # tokens of a shard at most
IMPLEMENTATIONS = ("eager", "grouped_mm")  # which is faster depends on shape and threads: the plain forward may choose


@dataclass(frozen=True, slots=True)
class Parts:
    """What a streaming process may take. Keys and values, and running states, are there in any engine; the pass itself
    writes none."""

    python_bytes: int  # the interpreter with torch and transformers, before any weight
    dense_bytes: int
    layer_bytes: int  # one layer's experts, or one token's in every layer if those are more
    hidden_bytes: int  # the largest shard's states, before the layer and after
    workspace_bytes: int  # activations, logits of a column a row, kernels, reader's buffers, router copies, as planned
    kv_bytes: int
    state_bytes: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True, slots=True)
class Streamed:
    """The streaming pass in its process. `peak_anon_bytes` counts all its anonymous memory, `idle_anon_bytes` what it

    had before a model, `peak_group_bytes` the page cache too (0 without a cap). `within` says whether the peak is at
    most the sum of `parts`. A process that was killed has no figures.
    """

    memory_cap: int | None
    killed: bool
    tok_per_s: float | None
    peak_anon_bytes: int | None
    idle_anon_bytes: int | None
    peak_group_bytes: int
    parts: Parts
    parts_bytes: int
    within: bool | None


@dataclass(frozen=True, slots=True)
class ProfileFigures:
    """Medians over the runs; `ratio` is the median of the ratios run by run, `tok_per_s` that of the pass in memory.

    The plain forward gives logits of all tokens, the pass of what it hears alone; `ratio_without_head` is beside
    a plain forward that gives logits of the last position only.
    """

    model: str
    tokens: int
    tok_per_s: float
    forward_tok_per_s: float
    ratio: float
    ratio_without_head: float
    forward_implementation: str
    memory_cap: int | None
    peak_anon_bytes: int | None
    model_bytes: int
    streamed: Streamed
    runs: int


def bench_profile(model: Path, items: int, runs: int, cap: int | None = None) -> ProfileFigures:
    size = CheckpointMap.open(model).weight_bytes
    if cap is not None and cap >= size:
        raise InvalidInput(
            f"--cap {show_bytes(cap)} holds all of the model's {show_bytes(size)}, which would show nothing. Give a "
            "smaller cap, a larger model, or none.",
            param="cap",
        )
    found = streamed(model, items, cap)  # first: nothing here maps the files yet, so their pages can be dropped
    with Engine.open(_config(model, None, longest(model, items))) as engine:
        text = encode_corpus(engine, calibration(items))
        turns = _interleaved(engine, text, runs)
    name = min(IMPLEMENTATIONS, key=lambda each: median(turns.forwards[each]))
    forwards = turns.forwards[name]
    tokens = sum(len(one.tokens) for one in text)
    return ProfileFigures(
        model=model.name,
        tokens=tokens,
        tok_per_s=tokens / median(turns.passes),
        forward_tok_per_s=tokens / median(forwards),
        ratio=turns.ratio(forwards),
        ratio_without_head=turns.ratio(turns.headless[name]),
        forward_implementation=name,
        memory_cap=cap,
        peak_anon_bytes=found.peak_anon_bytes,
        model_bytes=size,
        streamed=found,
        runs=runs,
    )


def calibration(items: int) -> Corpus:
    """The first items of every demo task: real text, of real lengths, for any model."""
    parts = [corpus(task.name, "calibration", items) for task in TASKS]
    return gather([item for part in parts for item in part.items])


def longest(model: Path, items: int) -> int:
    """The tokens that a row may have: those of the longest item, and some for a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = [len(tokenizer(item.prompt + (item.response or "")).input_ids) for item in calibration(items).items]
    return max(lengths) + SPECIAL


def one_layer(model: Path, context: int) -> int:
    """The budget that holds one layer's experts, or what one token needs in every layer if that is more."""
    card = ModelCard.read(model)
    plan = plan_memory(card, _config(model, AMPLE, context))
    return plan.fixed_bytes + max(card.experts, card.layers * card.top_k) * plan.slot_bytes


def _config(model: Path, memory: int | None, context: int) -> EngineConfig:
    return EngineConfig(model, memory=memory, max_context=context, max_batch=ROWS, chunk_tokens=CHUNK)


@dataclass(frozen=True, slots=True)
class Turns:
    """Seconds of each run: of the pass, and of plain forwards by implementation, with and without their head."""

    passes: list[float] = field(default_factory=list)
    forwards: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in IMPLEMENTATIONS})
    headless: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in IMPLEMENTATIONS})

    def ratio(self, others: Sequence[float]) -> float:
        return median(other / here for other, here in zip(others, self.passes, strict=True))


def _interleaved(engine: Engine, text: Sequence[Encoded], runs: int) -> Turns:
    """The pass and plain forwards, in turns; the first round warms up."""
    plain = AutoModelForCausalLM.from_pretrained(engine.card.folder, dtype=getattr(torch, engine.plan.dtype)).eval()
    batches = [pad(part) for part in cut(engine, text, ROWS)]
    warm, turns = Turns(), Turns()
    for each in (warm, *[turns] * runs):
        each.passes.append(_pass_seconds(engine, text))
        for name in IMPLEMENTATIONS:
            each.forwards[name].append(_forward_seconds(plain, name, batches, keep=0))
            each.headless[name].append(_forward_seconds(plain, name, batches, keep=1))
    return turns


def _pass_seconds(engine: Engine, text: Sequence[Encoded]) -> float:
    with tempfile.TemporaryDirectory(prefix="moepager-profile-") as folder:
        started = time.perf_counter()
        gather_statistics(engine, text, Run(Path(folder), "bench", ""), "bench", ROWS, ignore)
        return time.perf_counter() - started


@torch.inference_mode()
def _forward_seconds(plain: Any, implementation: str, batches: Sequence[Batch], keep: int) -> float:
    """With logits of the last `keep` positions of a row, of all for 0."""
    plain.set_experts_implementation(implementation)
    started = time.perf_counter()
    for batch in batches:
        plain(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=keep)
    return time.perf_counter() - started


def streamed(model: Path, items: int, cap: int | None) -> Streamed:
    """In a process of its own, its page cache cold; under the cap, if there is one."""
    parts = _parts(model, longest(model, items))
    command = [sys.executable, "-m", "benchmarks.profile_pass", str(model), str(items)]
    drop_page_cache(sorted(model.glob("*.safetensors")))
    ended = run_capped(command, cap, os.environ, SECONDS)
    if ended.oom_kills:
        return Streamed(cap, True, None, None, None, ended.peak_bytes, parts, parts.total, None)
    if ended.code:
        raise MoepagerError(f"The streaming pass ended with code {ended.code}: {ended.errors.strip()[-400:]}")
    found = json.loads(ended.output.splitlines()[-1])
    return Streamed(
        memory_cap=cap,
        killed=False,
        tok_per_s=found["tokens"] / found["seconds"],
        peak_anon_bytes=found["peak_anon_bytes"],
        idle_anon_bytes=found["idle_anon_bytes"],
        peak_group_bytes=ended.peak_bytes,
        parts=parts,
        parts_bytes=parts.total,
        within=found["peak_anon_bytes"] <= parts.total,
    )


def _parts(model: Path, context: int) -> Parts:
    card = ModelCard.read(model)
    plan = plan_memory(card, _config(model, one_layer(model, context), context))
    return Parts(
        python_bytes=PYTHON_SHARE,
        dense_bytes=plan.dense_bytes,
        layer_bytes=plan.slots * plan.slot_bytes,
        hidden_bytes=2 * CHUNK * card.hidden * getattr(torch, plan.dtype).itemsize,
        workspace_bytes=plan.workspace_bytes + plan.kernel_bytes + plan.staging_bytes + plan.router_bytes,
        kv_bytes=plan.kv_bytes,
        state_bytes=plan.state_bytes,
    )


def stream_alone(model: Path, items: int) -> dict[str, Any]:
    """The streaming pass in this process, watched: what it takes at most and how long it lasts."""
    context = longest(model, items)
    config = _config(model, one_layer(model, context), context)
    idle = anonymous_bytes()
    folder = tempfile.TemporaryDirectory(prefix="moepager-profile-")
    with folder as runs, Watch(lambda: (anonymous_bytes(), 0), LOOK_SECONDS) as watch, Engine.open(config) as engine:
        text = encode_corpus(engine, calibration(items))
        started = time.perf_counter()
        stream_statistics(engine, text, Run(Path(runs), "bench", ""), "bench", ROWS, ignore)
        seconds = time.perf_counter() - started
    tokens = sum(len(one.tokens) for one in text)
    return {"seconds": seconds, "tokens": tokens, "peak_anon_bytes": watch.anon, "idle_anon_bytes": idle}


if __name__ == "__main__":
    print(json.dumps(stream_alone(Path(sys.argv[1]), int(sys.argv[2]))))
