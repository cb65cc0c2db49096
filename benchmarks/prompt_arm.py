"""One arm of `bench prompts`, in a process of its own: seconds to the first token of warm prompts, one JSON object on
the last line.

`python -m benchmarks.prompt_arm '{"arm": "mask", ...}'`. Every arm reads the same random tokens with the same weights,
which are all in memory, and gives one token; no prompt is asked twice.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.before_torch import prepare_process

FirstToken = Callable[[tuple[int, ...]], int]


@dataclass(frozen=True, slots=True)
class Task:
    """What an arm is asked to do: `repeats` prompts of every length, after one of the longest."""

    arm: str
    model: str
    keep: float
    lengths: tuple[int, ...]
    repeats: int
    threads: int
    seed: int = 0

    def prompts(self) -> Iterator[tuple[int, ...]]:
        """The one that warms up, then the others, all lengths in turn."""
        rng = random.Random(self.seed)
        for length in (max(self.lengths), *self.lengths * self.repeats):
            yield tuple(rng.randrange(256) for _ in range(length))


@dataclass(frozen=True, slots=True)
class Prompted:
    """Seconds by length, as many of each as asked, and the first token of each prompt."""

    seconds: dict[int, list[float]]
    first_tokens: list[int]


def run(task: Task) -> Prompted:
    import torch  # noqa: PLC0415 - after the wait policy

    torch.set_num_threads(task.threads)
    seconds: dict[int, list[float]] = {length: [] for length in task.lengths}
    tokens: list[int] = []
    with ARMS[task.arm](task) as first_token:
        warm, *prompts = task.prompts()
        first_token(warm)
        for prompt in prompts:
            started = time.perf_counter()
            tokens.append(first_token(prompt))
            seconds[len(prompt)].append(time.perf_counter() - started)
    return Prompted(seconds, tokens)


@contextmanager
def resident(task: Task) -> Iterator[FirstToken]:
    """The engine: `mask` inside a random selection of the kept share, which is leased, `exact` with all experts
    there."""
    from engine.config import EngineConfig  # noqa: PLC0415
    from engine.engine import Engine  # noqa: PLC0415
    from engine.requests import GenerationRequest, Sampling, TokenEvent  # noqa: PLC0415
    from store.records import Selection  # noqa: PLC0415

    with Engine.open(EngineConfig(Path(task.model), max_context=max(task.lengths) + 1, max_batch=1)) as engine:
        card, rng = engine.card, random.Random(task.seed)
        count = max(card.top_k, round(task.keep * card.experts)) if task.arm == "mask" else card.experts
        held = Selection.of([rng.sample(range(card.experts), count) for _ in range(card.layers)])
        sampling = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)

        def first_token(prompt: tuple[int, ...]) -> int:
            masked = task.arm == "mask"
            request = GenerationRequest(prompt, held if masked else None, "mask" if masked else "exact", sampling)
            return next(event.token for event in engine.generate([request]) if isinstance(event, TokenEvent))

        with engine.lease(held):
            yield first_token


@contextmanager
def transformers_plain(task: Task) -> Iterator[FirstToken]:
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(task.model, dtype="bfloat16")

    def first_token(prompt: tuple[int, ...]) -> int:
        return int(model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1).logits[0, -1].argmax())

    with torch.inference_mode():
        yield first_token


ARMS = {"mask": resident, "exact": resident, "transformers": transformers_plain}


def main() -> None:
    prepare_process()
    given = json.loads(sys.argv[1])
    print(json.dumps(asdict(run(Task(**given | {"lengths": tuple(given["lengths"])})))))


if __name__ == "__main__":
    main()
