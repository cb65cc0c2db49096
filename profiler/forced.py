"""The same evidence as `evaluate` gives, from one forward an item instead of one a token of its answer.

Where the model's first choice is the response's token all along and then an end, greedy decoding gives just that
response; where the first other choice spells something else, it can't. The few items that this does not decide (the
same text in other tokens, spaces before the end) are generated. B rows, S length, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.engine import Engine
from engine.text import INCOMPLETE
from profiler.batches import Encoded, pad, shards, token_limit
from profiler.evaluate import ROWS, Measured, evaluate, judged_role
from profiler.finite import require_finite
from store.records import Selection


def evaluate_forced(
    engine: Engine,
    encoded: Sequence[Encoded],
    selection: Selection | None,
    rows: int = ROWS,
    role: int | None = None,
) -> Measured:
    """As `evaluate`, but that `coverage` is metered over prompt and response instead of prompt and answer."""
    return evaluate_each(engine, encoded, [selection] * len(encoded), rows, role)


def evaluate_each(
    engine: Engine,
    encoded: Sequence[Encoded],
    selections: Sequence[Selection | None],
    rows: int = ROWS,
    role: int | None = None,
) -> Measured:
    """As `evaluate_forced`, every item inside a selection of its own."""
    role = judged_role(encoded) if role is None else role
    total, at = Measured(0, 0, 0, 0.0, 0, 0.0), 0
    for shard in shards(encoded, min(rows, engine.plan.max_batch), token_limit(engine)):
        here = selections[at : at + len(shard)]
        at += len(shard)
        total += _shard(engine, shard, here, role)
    return total


def _shard(engine: Engine, shard: Sequence[Encoded], selections: Sequence[Selection | None], role: int) -> Measured:
    batch = pad(shard)
    logits, coverage = engine.forward_metered(batch.ids, batch.mask, selections)  # [B, S, V]
    logits = logits.cpu()
    scored = (batch.mask[:, 1:] == 1) & (batch.roles[:, 1:] == role)  # [B, S - 1]
    guessed = logits[:, :-1][scored].float()  # [n, V]
    losses = torch.nn.functional.cross_entropy(guessed, batch.ids[:, 1:][scored], reduction="none")  # [n]
    require_finite(losses)
    first = logits.argmax(-1).tolist()  # [B, S]
    judged = [_judge(engine, one, choices) for one, choices in zip(shard, first, strict=True)]
    unsure = [row for row, right in enumerate(judged) if right is None]
    generated = sum(evaluate(engine, [shard[row]], selections[row], 1).right for row in unsure)
    return Measured(
        items=len(shard),
        right=sum(right is True for right in judged) + generated,
        answered=sum(one.item.response is not None for one in shard),
        losses=float(losses.double().sum()),
        scored=len(losses),
        covered=sum(coverage),
    )


def _judge(engine: Engine, one: Encoded, first: Sequence[int]) -> bool | None:
    """Whether greedy decoding gives the item's response; None where this can't tell. `first` [S] is the choice after

    each token.
    """
    if one.item.response is None:
        return False
    wanted, end = one.item.response.strip(), engine.tokenizer.eos
    said = first[len(one.prompt) - 1 : len(one.tokens)]  # after the prompt, and after each token of the response
    expected = [*one.response, None]
    same = next(at for at, (token, here) in enumerate(zip(expected, said, strict=True)) if token != here)
    cut_off = same == len(one.response) and len(one.tokens) == engine.plan.max_context
    if cut_off or said[same] in end:
        return engine.tokenizer.decode(said[:same]).strip() == wanted
    text = engine.tokenizer.decode(said[: same + 1]).rstrip(INCOMPLETE).strip()
    return None if wanted.startswith(text) else False
