"""A selection for each request, made of what its own prompt was routed to: PESF's counts as a choice of what stays.

For evaluation only. PESF (arXiv 2508.01625) drops what the prompt hardly used while it reads it; here it is dropped for
the answer as well, which would free memory, and prompts of a task that nobody profiled would have a selection.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.routing_rules import RuleRow
from demo.prepare import DTYPE, THREADS, corpus
from engine.config import EngineConfig
from engine.engine import Engine
from profiler.allocation import uniform
from profiler.batches import Encoded, encode_corpus
from profiler.evaluate import judged_role
from profiler.forced import evaluate_each
from profiler.progress import Progress, Report
from profiler.sample import RouterSample
from profiler.scorers.base import break_ties
from store.home import bundled_model
from store.records import F64, Selection

KEEPS = (0.5, 0.25, 0.125)
ROWS = 32


def bench_prompts(tasks: Sequence[str], items: int, report: Report) -> list[RuleRow]:
    """Each task's test items at each size, the same number of experts in every layer. No call is saved."""
    config = EngineConfig(bundled_model(), max_context=256, max_batch=ROWS, dtype=DTYPE, threads=THREADS)
    rows = []
    with Engine.open(config) as engine:
        for number, task in enumerate(tasks):
            report(Progress(task, "evaluate", number, len(tasks)))
            text = encode_corpus(engine, corpus(task, "test", items))
            scores = [prompt_scores(engine, one) for one in text]
            for keep in KEEPS:
                own: list[Selection | None] = [uniform(each, keep, engine.card.top_k) for each in scores]
                found = evaluate_each(engine, text, own, ROWS, judged_role(text))
                rows.append(RuleRow(f"prompt's own, keep {keep:g}", task, found.accuracy or 0.0, 0.0, len(text)))
    return rows


def prompt_scores(engine: Engine, one: Encoded) -> F64:
    """What each expert's weights on the prompt's tokens add up to, the whole model routing; f64 [L, E].

    What no token chose is ordered by its mean logit.
    """
    ids = torch.tensor([one.prompt])  # [1, S]
    seen = RouterSample(engine.card.layers)
    seen.begin(torch.ones_like(ids, dtype=torch.bool))
    engine.forward(ids, torch.ones_like(ids), [None], seen)
    gates = np.zeros((engine.card.layers, engine.card.experts))
    means = np.zeros_like(gates)
    for layer in range(engine.card.layers):
        _, logits, weights, index = seen.layer(layer, None)
        np.add.at(gates[layer], index.numpy(), weights.double().numpy())
        means[layer] = logits.double().mean(dim=0).numpy()
    return break_ties(gates, means - means.min(axis=1, keepdims=True))
