"""Does a family keep the engine's rules? Each rule on a tiny random checkpoint, against plain transformers.

B rows, S positions, M experts kept of every layer.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.plain import LayerSums, greedy, logits_of, plain_model, smaller_model, statistics_of
from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import plan_memory
from engine.requests import GenerationRequest, Sampling, TokenEvent
from engine.tiny import write_tiny
from engine.tiny_config import tiny_fields
from profiler.batches import encode_corpus
from profiler.corpus import Item, gather
from profiler.extras import Needs
from profiler.gather import gather_statistics
from profiler.progress import ignore
from profiler.run import Run
from store.checkpoint import CheckpointMap
from store.experts import ExpertMap
from store.records import F64, Selection

TOLERANCE = 1e-3  # of float32 sums in another order, which a norm behind numbers near zero makes large
KEPT = 5  # experts a layer, of eight
CONTEXT = 64
SUMMED: Needs = frozenset({"coactivations", "logit_products", "output_sums"})  # beside what every profile has
ITEMS = [Item("a cat sat", "on a mat"), Item("one", "two three"), Item("red", None)]


@dataclass(frozen=True, slots=True)
class Subject:
    """A family's tiny checkpoint, the engine over it, and transformers' own model of it."""

    folder: Path
    engine: Engine
    plain: Any

    @property
    def whole(self) -> Selection:
        return Selection.whole(self.engine.card.layers, self.engine.card.experts)

    def selection(self, seed: int) -> Selection:
        card, rng = self.engine.card, random.Random(seed)
        return Selection.of([rng.sample(range(card.experts), KEPT) for _ in range(card.layers)])


def whole_rule(subject: Subject) -> float:
    """All experts selected: the plain model's logits."""
    ids, mask = _batch(3, 17, 1)
    ours = subject.engine.forward(ids, mask, [subject.whole] * 3)
    return _apart(ours, logits_of(subject.plain, ids, mask), mask)


def selection_rule(subject: Subject) -> float:
    """A selection: the logits of transformers' own model with so few experts."""
    ids, mask = _batch(2, 15, 2)
    selection = subject.selection(2)
    ours = subject.engine.forward(ids, mask, [selection] * 2)
    return _apart(ours, logits_of(smaller_model(subject.folder, selection), ids, mask), mask)


def row_rule(subject: Subject) -> float:
    """Rows of several selections in one batch: each the logits of that row alone."""
    ids, mask = _batch(4, 13, 3)
    selections = [subject.selection(3), subject.selection(4), None, subject.whole]
    together = subject.engine.forward(ids, mask, selections)
    alone = [subject.engine.forward(ids[r : r + 1], mask[r : r + 1], [selections[r]]) for r in range(4)]
    return _apart(together, torch.cat(alone), mask)


def exact_rule(subject: Subject) -> float:
    """Free routing under the smallest budget that serves: the plain model's logits."""
    floor = plan_memory(
        subject.engine.card, EngineConfig(subject.folder, memory=2**40, max_context=CONTEXT)
    ).floor_bytes
    ids, mask = _batch(2, 19, 5)
    with Engine.open(EngineConfig(subject.folder, memory=floor, max_context=CONTEXT)) as small:
        ours = small.forward(ids, mask, [None, None])
    return _apart(ours, logits_of(subject.plain, ids, mask), mask)


def answer_rule(subject: Subject) -> float:
    """Greedy answers of a batch through the KV cache: those of plain models without one. The share of rows that err."""
    selection = subject.selection(6)
    prompts = [(70, 3, 99, 120, 11), (5, 200, 31), (17, 18, 19, 44, 250, 9, 61, 140)]
    models = [smaller_model(subject.folder, selection), subject.plain, subject.plain]
    selections = [selection, None, subject.whole]
    requests = [
        GenerationRequest(prompt, chosen, "exact" if chosen is None else "mask", Sampling(max_tokens=8))
        for prompt, chosen in zip(prompts, selections, strict=True)
    ]
    ours: dict[int, list[int]] = {row: [] for row in range(3)}
    for event in subject.engine.generate(requests):
        if isinstance(event, TokenEvent):
            ours[event.row].append(event.token)
    lengths = [len(ours[row]) for row in range(3)]
    wanted = [greedy(model, prompt, length) for model, prompt, length in zip(models, prompts, lengths, strict=True)]
    return sum(not ours[row] or ours[row] != wanted[row] for row in range(3)) / 3


def statistics_rule(subject: Subject) -> float:
    """All sums of the profiler that need no look inside an expert: those of hooks on the plain model, one token and
    one expert at a time."""
    card = subject.engine.card
    text = encode_corpus(subject.engine, gather(ITEMS))
    with tempfile.TemporaryDirectory() as folder:
        ours = gather_statistics(subject.engine, text, Run(Path(folder), "p", "rows=2"), "t", 2, ignore, SUMMED)
    wanted = plain_statistics(subject, [one.tokens for one in text])
    apart = _outside(ours.total("utility"), np.stack([layer.tails for layer in wanted]))
    for name in wanted[0].sums:
        sums = np.stack([layer.sums[name] for layer in wanted])  # [L, ...]
        found = ours.peak if name == "peak" else ours.total(name)
        apart = max(apart, float(np.abs(found - sums).max() / max(1.0, float(np.abs(sums).max()))))
    return apart if ours.total("selected").sum() == card.layers * card.top_k * ours.token_count else 1.0


RULES: Mapping[str, Callable[[Subject], float]] = {
    "whole": whole_rule,
    "selection": selection_rule,
    "rows": row_rule,
    "exact": exact_rule,
    "answers": answer_rule,
    "statistics": statistics_rule,
}


def plain_statistics(subject: Subject, rows: list[Any]) -> list[LayerSums]:
    experts = ExpertMap.build(CheckpointMap.open(subject.folder))
    owners = [name for name, module in subject.plain.named_modules() if hasattr(module, "has_gate")]
    return statistics_of(subject.plain, rows, owners, experts.experts, subject.engine.card.hidden)


def _outside(utility: F64, tails: F64) -> float:
    """How far the histograms [L, E, B], summed from each bin on, lie outside of `tails` [L, 2, E, B]."""
    ours = utility[:, :, ::-1].cumsum(axis=2)[:, :, ::-1]  # [L, E, B]
    apart = np.maximum(tails[:, 0] - ours, ours - tails[:, 1]).max()
    return max(0.0, float(apart) / max(1.0, float(tails.max())))


def open_subject(family: str, folder: Path) -> Subject:
    """Raises UnsupportedFamily with the reason."""
    # In one group, for a model cut down to a selection has no groups of the same size; groups are tested by themselves.
    ungrouped: dict[str, Any] = {name: 1 for name in ("n_group", "topk_group") if name in tiny_fields(family)}
    write_tiny(family, folder, **ungrouped)
    engine = Engine.open(EngineConfig(folder, max_context=CONTEXT))
    return Subject(folder, engine, plain_model(folder))


def _batch(rows: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random tokens, padded on the left by a random amount: [B, S], [B, S]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (rows, width), generator=generator)
    starts = torch.randint(0, width // 2, (rows, 1), generator=generator)
    return ids, (torch.arange(width) >= starts).long()


def _apart(ours: Tensor, theirs: Tensor, mask: Tensor) -> float:
    """The largest difference of logits [B, S, V] outside the padding."""
    return float((ours - theirs)[mask.bool()].abs().max())
