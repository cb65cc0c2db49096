"""One arm of `bench decode`, in a process of its own: greedy decoding of one request, one JSON object on the last line.

`python -m benchmarks.decode_arm '{"arm": "mask", ...}'`. Every arm decodes the same number of tokens after the same
prompt with the same weights in bf16; they differ in where the experts come from.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.own_counters import device_bytes
from engine.before_torch import prepare_process

if TYPE_CHECKING:
    from torch import Tensor


READ_AHEAD = 8  # experts at a time, in the arm that reads ahead


@dataclass(frozen=True, slots=True)
class Task:
    """What an arm is asked to do. `memory` bounds the engine's own arms and accelerate's share of the host."""

    arm: str
    model: str
    memory: int | None
    keep: float
    prompt_tokens: int
    tokens: int
    threads: int
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Decoded:
    open_s: float
    ttft_s: float
    tok_per_s: float
    read_bytes: int
    first_tokens: list[int]


def run(task: Task) -> Decoded:
    import torch  # noqa: PLC0415 - after the wait policy

    torch.set_num_threads(task.threads)
    started = time.perf_counter()
    steps = ARMS[task.arm](task)
    next(steps)  # open
    opened = time.perf_counter()
    before = device_bytes()
    times, tokens = [], []
    for token in steps:
        times.append(time.perf_counter())
        tokens.append(token)
    return Decoded(
        open_s=opened - started,
        ttft_s=times[0] - opened,
        tok_per_s=(len(times) - 1) / (times[-1] - times[0]),
        read_bytes=device_bytes() - before,
        first_tokens=tokens[:8],
    )


def paged(task: Task) -> Iterator[int]:
    """The engine: `mask` inside a random selection of the kept share, `exact-lru` routed freely, misses paged in, and
    `exact-ahead` the same with what the next layer's router, run early, asks for read ahead."""
    import random  # noqa: PLC0415

    from engine.config import EngineConfig  # noqa: PLC0415
    from engine.engine import Engine  # noqa: PLC0415
    from engine.requests import GenerationRequest, Sampling, TokenEvent  # noqa: PLC0415
    from store.records import Selection  # noqa: PLC0415

    limit = task.prompt_tokens + task.tokens
    ahead = READ_AHEAD if task.arm == "exact-ahead" else 0
    config = EngineConfig(
        Path(task.model), memory=task.memory, max_context=limit, max_batch=1, chunk_tokens=64, read_ahead=ahead
    )
    with Engine.open(config) as engine:
        card, rng = engine.card, random.Random(task.seed)
        count = max(card.top_k, round(task.keep * card.experts))
        chosen = Selection.of([rng.sample(range(card.experts), count) for _ in range(card.layers)])
        yield -1
        sampling = Sampling(max_tokens=task.tokens, temperature=0.0, ignore_eos=True)
        mask = task.arm == "mask"
        request = GenerationRequest(prompt(task), chosen if mask else None, "mask" if mask else "exact", sampling)
        for event in engine.generate([request]):
            if isinstance(event, TokenEvent):
                yield event.token


def transformers_plain(task: Task) -> Iterator[int]:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    yield from _greedy(AutoModelForCausalLM.from_pretrained(task.model, dtype="bfloat16"), task)


def accelerate_offload(task: Task) -> Iterator[int]:
    """transformers with accelerate's disk offload: whole decoder layers beyond the host's share go to disk."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    with tempfile.TemporaryDirectory(dir=Path(task.model).parent) as folder:
        share = {"cpu": (task.memory or 1 << 40) // 2}  # measured: more than half of a cap leaves no room to load
        model = AutoModelForCausalLM.from_pretrained(
            task.model, dtype="bfloat16", device_map="auto", max_memory=share, offload_folder=folder
        )
        yield from _greedy(model, task)


def _greedy(model: Any, task: Task) -> Iterator[int]:
    import torch  # noqa: PLC0415

    yield -1
    ids: Tensor = torch.tensor([prompt(task)])
    cache = None
    with torch.inference_mode():
        for _ in range(task.tokens):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            yield int(ids)


ARMS: dict[str, Callable[[Task], Iterator[int]]] = {
    "mask": paged,
    "exact-lru": paged,
    "exact-ahead": paged,
    "transformers": transformers_plain,
    "accelerate": accelerate_offload,
}


def prompt(task: Task) -> tuple[int, ...]:
    """The same random tokens for every arm."""
    import random  # noqa: PLC0415

    rng = random.Random(task.seed + 1)
    return tuple(rng.randrange(256) for _ in range(task.prompt_tokens))


def main() -> None:
    prepare_process()
    print(json.dumps(asdict(run(Task(**json.loads(sys.argv[1]))))))


if __name__ == "__main__":
    main()
