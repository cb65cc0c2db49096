"""Gradients of the loss by the experts' inner numbers: one forward and one backward of the whole model.

The one pass that the engine can't page: it needs every weight in memory at once, and activations of a shard. The plain
transformers model does the arithmetic; only its experts are run here, one by one, so that their inside can be seen.
T tokens, n tokens of one expert, H hidden, F channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from engine.engine import Engine
from profiler.batches import Encoded, cut, pad
from profiler.extras import Needs
from profiler.second_copy import announce_copy
from profiler.statistics import RESPONSE
from profiler.unfinished import NOWHERE, Arrays, Unfinished
from store.errors import CheckpointError
from store.records import F64

IMPLEMENTATION = "moepager_gradients"

Term = Callable[[Tensor, Tensor, Tensor], Tensor]  # h, q [n, F] and the router's weights [n, 1], f64 -> [n, F]
Seen = Callable[[int, Tensor, Tensor, Tensor], None]  # expert, h [n, F], weights [n], q [n, F]


def _along(h: Tensor, q: Tensor, w: Tensor) -> Tensor:
    length = q.norm(dim=1, keepdim=True)  # [n, 1]: 0 where the token has no part in the loss
    along: Tensor = w * h * q / length.where(length > 0, 1.0)
    return along.square()


# What is averaged over the tokens that an expert got, by the loss of all tokens and by that of the responses.
OF_ALL: Mapping[str, Term] = {
    "channel_gradients": lambda _, q, __: q.square(),
    "channel_products": lambda h, q, _: (h * q).square(),
}
OF_ANSWERS: Mapping[str, Term] = {"channel_directions": _along}
NAMES = frozenset(OF_ALL) | frozenset(OF_ANSWERS)


def announce(engine: Engine, needs: Needs) -> str | None:
    """What will be loaded, to be said before it is, if `needs` are gradients. Raises as announce_copy does."""
    if not NAMES & needs:
        return None
    return announce_copy(engine, "HEAPr", "scorers that need none: camera, wifv, router_wanda, coverage")


def means(
    engine: Engine, text: Sequence[Encoded], rows: int, needs: Needs, kept: Unfinished = NOWHERE
) -> dict[str, F64]:
    """Those of `needs` that gradients give: means over the tokens that each expert got, f64 `[L, E, F]`; 0 where it got
    none.

    The loss is the sum of the next tokens' negative log likelihoods, so that neither batches nor shards change q: of
    prompts and responses alike, or of responses alone (of all where the text has none). A killed run goes on after the
    last shard that `kept` holds.
    """
    if not NAMES & needs:
        return {}
    model = _open(engine)
    found: dict[str, F64] = {}
    answers = any(one.response for one in text)
    for terms, of_answers in ((OF_ALL, False), (OF_ANSWERS, answers)):
        wanted = {name: terms[name] for name in sorted(terms.keys() & needs)}
        if wanted:
            part = kept.part("answer_gradients" if terms is OF_ANSWERS else "gradients")
            found |= _means(engine, model, text, rows, wanted, of_answers, part)
    engine.checkpoint.check()
    return found


def _means(
    engine: Engine,
    model: Any,
    text: Sequence[Encoded],
    rows: int,
    terms: Mapping[str, Term],
    of_answers: bool,
    kept: Unfinished,
) -> dict[str, F64]:
    card, width = engine.card, engine.layers.channels.width
    sums = torch.zeros(len(terms), card.layers, card.experts, width, dtype=torch.float64)
    counts = torch.zeros(card.layers, card.experts, dtype=torch.float64)
    done = _go_on(kept, sums, counts)
    for layer, module in enumerate(_experts(model, engine)):
        module.moepager_seen = _adder(list(terms.values()), sums[:, layer], counts[layer])
    for number, part in enumerate(cut(engine, text, rows)[done:], done + 1):
        batch = pad(part)
        scored = (batch.mask == 1) & ((batch.roles == RESPONSE) | (not of_answers))
        _backward(model, *(each.to(engine.device) for each in (batch.ids, batch.mask, scored)))
        kept.save_in_time(partial(_state, number, sums, counts))
    found = (sums / counts.clamp(min=1)[:, :, None]).numpy()
    if not np.isfinite(found).all():
        layer = int(np.argwhere(~np.isfinite(found))[0, 1])
        raise CheckpointError(
            f"The gradients of MoE layer {layer} are not finite (NaN or infinity). Check the checkpoint's weights, or "
            "profile in float32."
        )
    return dict(zip(terms, found, strict=True))


def _state(done: int, sums: Tensor, counts: Tensor) -> Arrays:
    return {"done": np.asarray(done), "sums": sums.numpy(), "counts": counts.numpy()}


def _go_on(kept: Unfinished, sums: Tensor, counts: Tensor) -> int:
    """How many shards are summed up already, in `sums` and `counts` after this."""
    state = kept.load()
    if state is None:
        return 0
    sums.copy_(torch.from_numpy(state["sums"]))
    counts.copy_(torch.from_numpy(state["counts"]))
    return int(state["done"].item())


def _open(engine: Engine) -> Any:
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
    model = AutoModelForCausalLM.from_pretrained(
        engine.card.folder,
        dtype=getattr(torch, engine.plan.dtype),
        experts_implementation=IMPLEMENTATION,
        local_files_only=True,
        trust_remote_code=False,
    )
    model.config.use_cache = False
    model.eval().requires_grad_(False).to(engine.device)
    # Nothing but activations has gradients: the graph begins behind the embeddings.
    model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_(True))
    return model


def _experts(model: Any, engine: Engine) -> list[Any]:
    found = [module for module in model.modules() if hasattr(module, "down_proj") and hasattr(module, "is_transposed")]
    assert len(found) == engine.card.layers, (len(found), engine.card.layers)
    return found


def _adder(terms: Sequence[Term], sums: Tensor, counts: Tensor) -> Seen:
    """`sums` [terms, E, F] and `counts` [E] of one layer."""

    def add(expert: int, h: Tensor, weights: Tensor, q: Tensor) -> None:
        h, q, weights = h.double(), q.double(), weights.double()[:, None]
        for number, term in enumerate(terms):
            sums[number, expert] += term(h, q, weights).sum(dim=0).cpu()  # [F]
        counts[expert] += len(q)

    return add


def _forward(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The experts over [T, H], one after the other, padding and all: what padding gets has no gradient."""
    combined = hidden.new_zeros(hidden.shape, dtype=torch.promote_types(hidden.dtype, weights.dtype))
    valid: Tensor = module.moepager_valid  # bool [T]
    after = module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else lambda outputs: outputs
    for expert in sorted(set(index[valid].flatten().tolist())):
        tokens, place = ((index == expert) & valid[:, None]).nonzero(as_tuple=True)  # [n], [n]
        inputs = _product(module, "gate_up_proj" if module.has_gate else "up_proj", expert, hidden[tokens])  # [n, 2F]
        h: Any = module._apply_gate(inputs) if module.has_gate else module.act_fn(inputs)  # [n, F]
        h.register_hook(partial(module.moepager_seen, expert, h.detach(), weights[tokens, place].detach()))
        outputs = after(_product(module, "down_proj", expert, h)) * weights[tokens, place, None]  # [n, H]
        combined = combined.index_add(0, tokens, outputs.to(combined.dtype))
    return combined.to(hidden.dtype)


def _product(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    """`x` [n, K] -> [n, N], by one of the expert's two matrices and its bias."""
    weight = getattr(module, name)[expert]
    y: Tensor = x @ (weight if module.is_transposed else weight.T)
    return y + getattr(module, f"{name}_bias")[expert] if module.has_bias else y


def _backward(model: Any, ids: Tensor, mask: Tensor, scored: Tensor) -> None:
    """`scored` bool [B, S]: the tokens whose likelihood is the loss."""
    for module in model.modules():
        if hasattr(module, "moepager_seen"):
            module.moepager_valid = mask.flatten().bool()
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # [B, S]
    with torch.enable_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits  # [B, S, V]
        wanted = ids[:, 1:].masked_fill(~scored[:, 1:], -100)  # [B, S - 1]
        loss: Any = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted.flatten(), reduction="sum")
        loss.backward()
