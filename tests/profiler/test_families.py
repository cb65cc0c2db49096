"""Statistics of whole tiny models against hooks on the plain transformers model: the observer shows the truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.engine import Engine
from engine.tiny import FAMILIES, write_tiny
from profiler.batches import encode_corpus
from profiler.corpus import Item, gather
from profiler.gather import gather_statistics
from profiler.progress import ignore
from profiler.run import Run
from profiler.statistics import Statistics

ITEMS = [Item(text, response) for text, response in [("a cat sat", "on a mat"), ("one", "two three"), ("red", None)]]


class Hooks:
    """Plain sums over one layer of one sequence, from what the stock router and experts modules are called with."""

    def __init__(self, experts: int) -> None:
        self.sums = {
            name: np.zeros(experts) for name in ("selected", "gates", "gated_norms", "shifted_norms", "top_logits")
        }
        self.residual = self.logits = None

    def norm(self, module, inputs) -> None:
        self.residual = inputs[0].reshape(-1, inputs[0].shape[-1]).double()

    def router(self, module, inputs, outputs) -> None:
        self.logits = outputs[0].double()

    def experts(self, module, inputs, output) -> None:
        hidden, index, weights = inputs
        after = self.residual + output.double()
        shift = (1 - torch.cosine_similarity(self.residual, after, dim=-1)).clamp_min(0)
        for t in range(len(hidden)):
            self.sums["top_logits"][int(self.logits[t].argmax())] += float(self.logits[t].max())
            for expert, weight in zip(index[t].tolist(), weights[t].double().tolist(), strict=True):
                # One token through one expert, by the module's own arithmetic, weight 1: its unweighted output.
                o = self.alone(module, hidden[t : t + 1], expert)
                norm = float(o.double().norm())
                parts = {"selected": 1, "gates": weight, "gated_norms": weight * norm}
                parts["shifted_norms"] = float(shift[t]) * weight * norm
                for name, value in parts.items():
                    self.sums[name][expert] += value

    def alone(self, module, hidden, expert):
        kind = type(module)
        return kind.forward(module, hidden, torch.tensor([[expert]]), torch.ones(1, 1))


@pytest.fixture(params=FAMILIES)
def tiny(request, tmp_path):
    return write_tiny(request.param, tmp_path, seed=11)


def plain_sums(folder, tokens, layers, experts) -> list[dict[str, np.ndarray]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    hooks = [Hooks(experts) for _ in range(layers)]
    for layer, (router, module, norm) in enumerate(_blocks(model, experts)):
        norm.register_forward_pre_hook(hooks[layer].norm)
        router.register_forward_hook(hooks[layer].router)
        module.register_forward_hook(hooks[layer].experts)
    with torch.inference_mode():
        for row in tokens:
            model(torch.tensor([row]))
    return [hook.sums for hook in hooks]


def _blocks(model, experts):
    for decoder in model.model.layers:
        inner = list(decoder.mlp.children()) if hasattr(decoder, "mlp") else []
        module = next((child for child in inner if hasattr(child, "gate_up_proj")), None)
        router = next((c for c in inner if c is not module and getattr(c, "num_experts", None) == experts), None)
        if module is not None and router is not None:
            yield router, module, decoder.post_attention_layernorm


def test_the_statistics_equal_hooks_on_the_plain_model(tiny, tmp_path):
    with Engine.open(EngineConfig(tiny, max_context=64)) as engine:
        text = encode_corpus(engine, gather(ITEMS))
        run = Run(tmp_path / "runs", "p", "rows=2")
        statistics = gather_statistics(engine, text, run, "t", rows=2, report=ignore)
        card = engine.card
    expected = plain_sums(tiny, [one.tokens for one in text], card.layers, card.experts)
    assert statistics.token_count == sum(len(one.tokens) for one in text)
    for layer, sums in enumerate(expected):
        assert sums["selected"].sum() == card.top_k * statistics.token_count
        for name, values in sums.items():
            found = statistics.total(name)[layer]
            np.testing.assert_allclose(found, values, rtol=2e-4, atol=2e-4, err_msg=f"{name} of layer {layer}")


def test_prompts_and_responses_lie_in_their_own_buckets(tmp_path):
    with Engine.open(EngineConfig(write_tiny("olmoe", tmp_path / "m"), max_context=64)) as engine:
        text = encode_corpus(engine, gather(ITEMS))
        statistics: Statistics = gather_statistics(engine, text, Run(tmp_path, "p", ""), "t", rows=2, report=ignore)
    by_number = sorted(text, key=lambda one: one.number)
    for half in (0, 1):
        mine = by_number[half::2]
        wanted = [sum(len(one.prompt) for one in mine), sum(len(one.response) for one in mine)]
        assert statistics.tokens[half].tolist() == wanted
        assert statistics.selected[half].sum(axis=2).tolist() == [[2.0 * wanted[role]] * 3 for role in (0, 1)]
