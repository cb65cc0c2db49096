"""One pass over a task's text with every expert reachable, shard by shard, each shard's sum kept on disk."""

from __future__ import annotations

from collections.abc import Sequence

from engine.engine import Engine
from profiler.batches import Encoded, cut, pad
from profiler.channels.accumulator import make_accumulator
from profiler.extras import NOTHING, Needs
from profiler.hearing import hear
from profiler.progress import Progress, Report
from profiler.run import Run
from profiler.statistics import Statistics

ROWS = 16


def gather_statistics(
    engine: Engine,
    text: Sequence[Encoded],
    run: Run,
    task: str,
    rows: int,
    report: Report,
    needs: Needs = NOTHING,
) -> Statistics:
    """The whole text's statistics, with those of `needs` that add up.

    Goes on after the last shard that `run` holds, at most a second of work back. The sums are added in the same order,
    so an interrupted run ends with the same bits as one that was not. The caller forgets the run once they are stored.
    """
    parts = cut(engine, text, rows)
    done, total = run.load() or (0, empty(engine, needs))
    items = sum(len(part) for part in parts[:done])
    for number, part in enumerate(parts[done:], done + 1):
        report(Progress(task, "calibrate", items, len(text)))
        total += _statistics(engine, part, needs)
        items += len(part)
        run.save_in_time(number, total)
    report(Progress(task, "calibrate", len(text), len(text)))
    return total


def empty(engine: Engine, needs: Needs) -> Statistics:
    """Nothing seen yet, in the model's shapes."""
    card = engine.card
    return Statistics.zeros(card.layers, card.experts, card.top_k, needs, card.hidden, engine.layers.channels.width)


def _statistics(engine: Engine, part: Sequence[Encoded], needs: Needs) -> Statistics:
    accumulator = make_accumulator(engine, needs)
    batch = pad(part)
    accumulator.begin(batch.roles, batch.halves)
    # Routed freely: an expert that is not resident is paged in, so that no score depends on what happened to be.
    states = engine.layers.whole(batch.ids, batch.mask, accumulator)  # [B, S, H]
    return accumulator.statistics().with_heard(hear(engine.head.logits, engine.plan.max_batch, states, batch))
