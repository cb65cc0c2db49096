"""What observers are shown, against a plain model instrumented by hand."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.engine import Engine
from store.errors import InvalidInput
from store.records import Selection

Checkpoint = Callable[..., Path]
Open = Callable[..., Engine]


class Statistics:
    """Gate mass, counts, norms and residual agreement: the sums that the profiler's scorers are made of."""

    def __init__(self, layers: int, experts: int) -> None:
        self.count = torch.zeros(layers, experts, dtype=torch.float64)
        self.gate = torch.zeros(layers, experts, dtype=torch.float64)
        self.norm = torch.zeros(layers, experts, dtype=torch.float64)
        self.cosine = torch.zeros(layers, dtype=torch.float64)
        self.calls: list[tuple[str, int]] = []
        self._h = torch.empty(0)
        self._valid = torch.empty(0)

    def residual(self, layer: int, h: Tensor) -> None:
        self.calls.append(("residual", layer))
        self._h = h

    def routed(self, layer: int, x: Tensor, logits: Tensor, weights: Tensor, index: Tensor, valid: Tensor) -> None:
        self.calls.append(("routed", layer))
        assert x.shape == self._h.shape
        assert logits.shape == (len(x), self.count.shape[1])
        self._valid = valid
        for token in valid.nonzero().flatten().tolist():
            self.gate[layer, index[token]] += weights[token].double()

    def experts(self, layer: int, experts: Tensor, tokens: Tensor, weights: Tensor, outputs: Tensor) -> None:
        assert self._valid[tokens].all()
        self.calls.append(("experts", layer))
        for expert, weight, output in zip(experts.tolist(), weights, outputs, strict=True):
            self.count[layer, expert] += 1
            self.norm[layer, expert] += weight.double() * output.double().norm()

    def combined(self, layer: int, y: Tensor) -> None:
        self.calls.append(("combined", layer))
        h, y = self._h[self._valid].double(), y[self._valid].double()
        self.cosine[layer] += torch.cosine_similarity(h, h + y, dim=-1).sum()


def _by_hand(model: Any, ids: Tensor, mask: Tensor, statistics: Statistics) -> None:
    """The same sums from a stock model: hooks on router, experts and norm, experts re-run one token at a time."""
    blocks = [m for m in model.modules() if hasattr(m, "experts") and hasattr(m.experts, "down_proj")]
    decoders = [layer for layer in model.model.layers if any(block in layer.modules() for block in blocks)]
    valid = mask.flatten().bool()
    for layer, (block, decoder) in enumerate(zip(blocks, decoders, strict=True)):
        state: dict[str, Tensor] = {}
        decoder.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args, s=state: s.update(h=args[0].flatten(0, 1))
        )

        def see(module: Any, args: tuple[Tensor, ...], output: Tensor, layer: int = layer, s: Any = state) -> None:
            hidden, index, weights = (each.flatten(0, -2) for each in args)
            for token in valid.nonzero().flatten().tolist():
                for expert, weight in zip(index[token].tolist(), weights[token].tolist(), strict=True):
                    out = _one_expert(module, hidden[token], expert)
                    statistics.count[layer, expert] += 1
                    statistics.gate[layer, expert] += weight
                    statistics.norm[layer, expert] += weight * out.double().norm()
            h, y = s["h"][valid].double(), output.flatten(0, -2)[valid].double()
            statistics.cosine[layer] += torch.cosine_similarity(h, h + y, dim=-1).sum()

        block.experts.register_forward_hook(see)
    with torch.inference_mode():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model(input_ids=ids, attention_mask=mask, position_ids=positions)


def _one_expert(module: Any, x: Tensor, expert: int) -> Tensor:
    one, zero = torch.ones(1, 1), torch.tensor([[expert]])
    forward = type(module).forward
    hooks, module._forward_hooks = module._forward_hooks, {}
    try:
        out: Tensor = forward(module, x.unsqueeze(0), zero, one)[0]
    finally:
        module._forward_hooks = hooks
    return out


def test_statistics_of_a_padded_batch_equal_those_of_a_stock_model_token_by_token(
    family: str, checkpoint: Checkpoint, open_engine: Open, plain_model: Callable[[Path], Any]
) -> None:
    folder = checkpoint(family)
    engine = open_engine(folder)
    ids = torch.randint(0, 256, (3, 8))
    mask = (torch.arange(8) >= torch.tensor([[0], [3], [6]])).long()
    ours, theirs = (Statistics(engine.card.layers, engine.card.experts) for _ in range(2))
    engine.forward(ids, mask, [None] * 3, ours)
    _by_hand(plain_model(folder), ids, mask, theirs)
    assert torch.equal(ours.count, theirs.count)
    for name in ("gate", "norm", "cosine"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-4)


def test_the_hooks_come_in_order_once_a_layer(checkpoint: Checkpoint, open_engine: Open) -> None:
    engine = open_engine(checkpoint("deepseek_v3"))
    statistics = Statistics(engine.card.layers, engine.card.experts)
    ids = torch.randint(0, 256, (2, 6))
    engine.forward(ids, torch.ones_like(ids), [None] * 2, statistics)
    names = ("residual", "routed", "experts", "combined")
    assert statistics.calls == [(name, layer) for layer in range(2) for name in names]


def test_an_observer_sees_the_restricted_routing_and_the_free_logits(
    checkpoint: Checkpoint, open_engine: Open, random_selection: Callable[[Engine, random.Random], Selection]
) -> None:
    engine = open_engine(checkpoint("qwen3_moe"))
    selection = random_selection(engine, random.Random(4))
    statistics = Statistics(engine.card.layers, engine.card.experts)
    ids = torch.randint(0, 256, (2, 6))
    engine.forward(ids, torch.ones_like(ids), [selection] * 2, statistics)
    for layer, row in enumerate(selection.experts):
        outside = sorted(set(range(8)) - set(row))
        assert statistics.count[layer, outside].sum() == 0
        assert statistics.count[layer].sum() == 2 * 6 * 2


@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_observing_changes_no_answer_and_ends_with_the_pass(
    kernel: str, checkpoint: Checkpoint, open_engine: Open
) -> None:
    """Where our products compute experts of few tokens in another order of sums than of many, but for rounding."""
    engine = open_engine(checkpoint("gpt_oss"), kernel=kernel)
    ids = torch.randint(0, 256, (1, 6))
    plain = engine.forward(ids, torch.ones_like(ids), [None])
    statistics = Statistics(engine.card.layers, engine.card.experts)
    found = engine.forward(ids, torch.ones_like(ids), [None], statistics)
    near = 0.0 if kernel == "torch" else 1e-5
    torch.testing.assert_close(found, plain, rtol=near, atol=near)
    calls = len(statistics.calls)
    engine.forward(ids, torch.ones_like(ids), [None])
    assert len(statistics.calls) == calls


def test_a_pass_larger_than_the_workspace_is_refused_with_the_limit(checkpoint: Checkpoint, open_engine: Open) -> None:
    engine = open_engine(checkpoint("qwen2_moe"), chunk_tokens=16)
    ids = torch.zeros(3, 6, dtype=torch.long)
    with pytest.raises(InvalidInput, match="18 tokens in one pass; the plan's workspace is for 16"):
        engine.forward(ids, torch.ones_like(ids), [None] * 3)
    with pytest.raises(InvalidInput, match="one shape"):
        engine.forward(ids, torch.ones(3, 5, dtype=torch.long), [None] * 3)
