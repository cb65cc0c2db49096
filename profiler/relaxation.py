"""DiEP's relaxation (arXiv 2509.16105): gradients by one number an expert and one a layer, all weights frozen.

`y_l = beta_l * sum over S_t of E softmax(alpha_l)_e w_te o_te`. The source sums over all experts, without a router,
which costs E/K times a forward and forgets who is routed where; here the router chooses as ever (ours). The loss is
that of the next token plus how far the logits move. The plain transformers model does the arithmetic, whole in memory.
T tokens, L MoE layers, E experts, K = top_k, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.engine import Engine
from profiler.batches import Batch, Encoded, cut, pad
from profiler.second_copy import announce_copy
from profiler.unfinished import NOWHERE, Arrays, Unfinished
from store.errors import CheckpointError
from store.records import F64

EPOCHS, RATE, MOVED = 10, 5e-3, 0.01  # of the source: passes over the text, learning rate, weight of moved logits
TURNS = 4  # of four steps three move alpha, the fourth beta
ROWS = 16
NAMES = ("alpha", "beta")

Routed = tuple[Tensor, Tensor, Tensor]  # logits [T, E], weights [T, K], index [T, K]


class Relaxed:
    """The parameters, and the hooks by which a model's routers multiply their weights with them."""

    def __init__(self, layers: int, experts: int, device: torch.device) -> None:
        self.alpha = torch.zeros(layers, experts, device=device, requires_grad=True)  # [L, E]
        self.beta = torch.ones(layers, device=device, requires_grad=True)  # [L]
        self.active = True

    def importance(self) -> Tensor:
        """`beta_l E softmax(alpha_l)_e`, [L, E]: 1 everywhere to begin with; a layer's mean is its beta."""
        return self.beta[:, None] * self.alpha.softmax(dim=1) * self.alpha.shape[1]

    def watch(self, layer: int, router: Any) -> None:
        def hook(_: Any, __: tuple[Any, ...], routed: Routed) -> Routed | None:
            if not self.active:
                return None
            logits, weights, index = routed
            return logits, weights * self.importance()[layer][index].to(weights.dtype), index

        router.register_forward_hook(hook)


def check_relaxation(engine: Engine) -> str:
    """What will be loaded, to be said before it is. Raises as announce_copy does."""
    return announce_copy(engine, "DiEP", "another scorer and allocator")


def relaxations(engine: Engine, text: Sequence[Encoded], kept: Unfinished = NOWHERE) -> F64:
    """The learned importance, f64 `[L, E]`. The same text gives the same numbers on the same machine, whether or not
    the run was killed and went on with what `kept` holds."""
    model, routers = _open(engine)
    relaxed = Relaxed(engine.card.layers, engine.card.experts, engine.device)
    for layer, router in enumerate(routers):
        relaxed.watch(layer, router)
    batches = [pad(part) for part in cut(engine, text, ROWS)]
    train(model, relaxed, batches, kept=kept)
    engine.checkpoint.check()
    found: F64 = relaxed.importance().detach().double().cpu().numpy()
    if not math.isfinite(found.sum()):
        raise CheckpointError(
            "The gradients of diep are not finite (NaN or infinity). Check the checkpoint's weights, or profile in "
            "float32."
        )
    return found


def train(
    model: Any, relaxed: Relaxed, batches: Sequence[Batch], epochs: int = EPOCHS, kept: Unfinished = NOWHERE
) -> None:
    """Cosine schedule to 0. A batch is a step, in the order of the text."""
    optimisers = [torch.optim.Adam([parameter], RATE) for parameter in (relaxed.alpha, relaxed.beta)]
    steps = epochs * len(batches)
    for step in range(_go_on(kept, relaxed, optimisers), steps):
        chosen = optimisers[step % TURNS == TURNS - 1]
        for group in chosen.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        for each in optimisers:
            each.zero_grad()
        with torch.enable_grad():
            loss(model, relaxed, batches[step % len(batches)]).backward()  # type: ignore[no-untyped-call]
        chosen.step()
        kept.save_in_time(partial(_state, step + 1, relaxed, optimisers))


def _state(step: int, relaxed: Relaxed, optimisers: Sequence[torch.optim.Optimizer]) -> Arrays:
    """All that the next step depends on: the parameters, and what Adam remembers of each."""
    arrays = {"step": np.asarray(step)}
    for name, parameter, optimiser in zip(NAMES, (relaxed.alpha, relaxed.beta), optimisers, strict=True):
        arrays[name] = parameter.detach().cpu().numpy()
        for memory, value in optimiser.state[parameter].items():
            arrays[f"{name}.{memory}"] = value.cpu().numpy()
    return arrays


def _go_on(kept: Unfinished, relaxed: Relaxed, optimisers: Sequence[torch.optim.Optimizer]) -> int:
    """The step to go on with; parameters and optimisers are then as they were before it."""
    arrays = kept.load()
    if arrays is None:
        return 0
    for name, parameter, optimiser in zip(NAMES, (relaxed.alpha, relaxed.beta), optimisers, strict=True):
        parameter.data.copy_(torch.from_numpy(arrays[name]))
        memories = {key.split(".")[1]: value for key, value in arrays.items() if key.startswith(f"{name}.")}
        # Adam counts its steps on the CPU, and keeps the rest beside the parameter.
        optimiser.state[parameter] = {
            key: torch.from_numpy(value).to("cpu" if key == "step" else parameter.device)
            for key, value in memories.items()
        }
    return int(arrays["step"].item())


def loss(model: Any, relaxed: Relaxed, batch: Batch) -> Tensor:
    """Of the next tokens, plus MOVED times how far a token's logits lie from the plain model's, on average."""
    device = relaxed.alpha.device
    ids, mask = batch.ids.to(device), batch.mask.to(device)
    relaxed.active = False
    with torch.no_grad():
        before = _logits(model, ids, mask)  # [B, S, V]
    relaxed.active = True
    after = _logits(model, ids, mask)  # [B, S, V]
    valid = mask.bool()
    moved = (after - before)[valid]  # [n, V]
    # The length of no difference at all has no gradient; a hair beside it has.
    distance = (moved.square().sum(dim=-1) + 1e-12).sqrt().mean()
    wanted = ids[:, 1:].masked_fill(~valid[:, 1:], -100)  # [B, S - 1]
    told = F.cross_entropy(after[:, :-1].flatten(0, 1), wanted.flatten())
    return told + MOVED * distance


def _logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # [B, S]
    logits: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return logits.float()


def _open(engine: Engine) -> tuple[Any, list[Any]]:
    """The model and its routers, which are found by the engine's own names for them."""
    model = AutoModelForCausalLM.from_pretrained(
        engine.card.folder,
        dtype=getattr(torch, engine.plan.dtype),
        experts_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
    )
    model.config.use_cache = False
    model.eval().requires_grad_(False).to(engine.device)
    return model, [model.get_submodule(name) for name in engine.layers.router_names]
