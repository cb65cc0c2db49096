"""The same pass layer by layer over the whole text, for models larger than memory: each layer's experts are read once.

Statistics equal those of gather.py to rounding. Peak memory is the dense weights, one layer's experts (the engine's
slots), one shard's states and the plan's workspace, in which logits are heard, too; hidden states lie in a file between
layers. A killed run goes on after its last finished layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from engine.engine import Engine
from profiler.batches import Batch, Encoded, cut, pad
from profiler.channels.accumulator import make_accumulator
from profiler.extras import NOTHING, Needs
from profiler.gather import empty
from profiler.hearing import hear
from profiler.progress import Progress, Report
from profiler.run import Run
from profiler.spill import Spill
from profiler.statistics import Statistics


def pays(engine: Engine, text: Sequence[Encoded], rows: int) -> bool:
    """Whether the pass should stream: the model does not fit, one layer does, and there is more than one shard."""
    slots, card = engine.plan.slots, engine.card
    return card.experts <= slots < card.layers * card.experts and len(cut(engine, text, rows)) > 1


def stream_statistics(
    engine: Engine,
    text: Sequence[Encoded],
    run: Run,
    task: str,
    rows: int,
    report: Report,
    needs: Needs = NOTHING,
    folder: Path | None = None,
) -> Statistics:
    """The whole text's statistics, with those of `needs` that add up. `folder` takes the hidden states."""
    card = engine.card
    parts = cut(engine, text, rows)
    shapes = [(len(part), max(len(one.tokens) for one in part), card.hidden) for part in parts]
    spill = Spill(folder or run.folder, run.name, shapes, getattr(torch, engine.plan.dtype))
    done, total = run.load() or (0, empty(engine, needs))
    last = engine.layers.decoder_numbers[-1]
    if 0 < done <= last and not spill.has(done - 1):
        done, total = 0, empty(engine, needs)
    for layer in range(done, last + 1):
        report(Progress(task, "calibrate", len(text) * layer // (last + 1), len(text)))
        total += _layer(engine, layer, parts, spill, needs, final=layer == last)
        run.save(layer + 1, total)
        spill.forget(keep=layer)
    spill.forget()
    report(Progress(task, "calibrate", len(text), len(text)))
    return total


def _layer(
    engine: Engine, layer: int, parts: Sequence[Sequence[Encoded]], spill: Spill, needs: Needs, *, final: bool
) -> Statistics:
    """One decoder layer over all shards; their hidden states go on to the next. After the last that counts it is heard
    what the model says.
    """
    accumulator = make_accumulator(engine, needs)

    def one(number: int, batch: Batch, run: Callable[..., torch.Tensor]) -> torch.Tensor:
        accumulator.begin(batch.roles, batch.halves)
        before = spill.read(layer - 1, number) if layer else None  # [B, S, H]
        return run(layer, batch.ids, batch.mask, before, accumulator)  # [B, S, H]

    batches = enumerate(map(pad, parts))
    if final:
        heard = [
            hear(engine.head.logits, engine.plan.max_batch, one(number, batch, engine.layers.to_the_end), batch)
            for number, batch in batches
        ]
        return accumulator.statistics().with_heard(np.sum(heard, axis=0))
    with spill.writing(layer) as file:
        for number, batch in batches:
            spill.append(file, one(number, batch, engine.layers.forward))
    return accumulator.statistics()
