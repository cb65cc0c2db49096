"""What happens inside experts, summed up by the pass, against plain transformers one token at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.engine import Engine
from engine.tiny import FAMILIES, write_tiny
from profiler.batches import encode_corpus
from profiler.channels.gradients import NAMES, announce, means
from profiler.channels.weights import of_weights
from profiler.corpus import Item, gather
from profiler.extras import EXTRAS, Needs
from profiler.gather import gather_statistics
from profiler.progress import ignore
from profiler.run import Run
from profiler.statistics import Statistics
from store.errors import BudgetError, CheckpointError

NEEDS: Needs = frozenset(name for name, extra in EXTRAS.items() if extra.dims.endswith("F"))
CORPUS = gather([Item(f"number {n} " + "and more " * (n % 3), "yes" * (1 + n % 2)) for n in range(5)])


class Plain:
    """The plain model, item by item, every expert's inside computed by hand and summed in f64."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
        self.model.requires_grad_(False)
        self.model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_(True))
        shape = (engine.card.layers, engine.card.experts, engine.layers.channels.width)
        names = ("channel_sums", "channel_squares", "channel_gated", "channel_peaks", *NAMES)
        self.found = {name: np.zeros(shape) for name in names} | {"channel_inputs": np.zeros((2, *shape))}
        self.answers = False  # whose loss this is
        self.tokens = np.zeros(shape[:2])
        self._modules = [m for m in self.model.modules() if hasattr(m, "down_proj") and hasattr(m, "is_transposed")]
        self._calls: list[tuple[int, Any, Tensor, Tensor, Tensor, Tensor]] = []
        for layer, module in enumerate(self._modules):
            module.register_forward_hook(lambda m, args, out, layer=layer: self._note(layer, m, args, out))

    def _note(self, layer: int, module: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        out.retain_grad()
        self._calls.append((layer, module, *args, out))

    def run(self, tokens: tuple[int, ...], begin: int = 1, *, answers: bool = False) -> None:
        """The loss is that of the tokens from `begin` on; that of answers gives nothing but directions."""
        ids, self.answers = torch.tensor([tokens]), answers
        logits = self.model(input_ids=ids, use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits[begin - 1 : -1], ids[0, begin:], reduction="sum").backward()
        for layer, module, x, index, weights, out in self._calls:
            for token in range(len(x)):
                for place, expert in enumerate(index[token].tolist()):
                    self._add(layer, module, expert, x[token], float(weights.detach()[token, place]), out.grad[token])
        self._calls.clear()

    def _add(self, layer: int, module: Any, expert: int, x: Tensor, w: float, grad: Tensor) -> None:
        into, down = module.gate_up_proj[expert].detach(), module.down_proj[expert].detach()
        inputs = x.detach() @ into if module.is_transposed else into @ x.detach()
        inputs = inputs + module.gate_up_proj_bias[expert] if module.has_bias else inputs
        h = module._apply_gate(inputs[None])[0]
        q = w * (down @ grad if module.is_transposed else down.T @ grad)
        turns = module.has_bias  # gpt-oss lets gate and up take turns
        gate, up = (inputs[0::2], inputs[1::2]) if turns else inputs.chunk(2)
        here, found = (layer, expert), self.found
        if self.answers:
            length = float(q.double().norm()) or 1.0
            found["channel_directions"][here] += (w * h.double() * q.double() / length).square().numpy()
            return
        found["channel_products"][here] += (h.double() * q.double()).square().numpy()
        found["channel_sums"][here] += h.double().numpy()
        found["channel_squares"][here] += h.double().square().numpy()
        found["channel_gated"][here] += (w * h.double()).square().numpy()
        found["channel_peaks"][here] = np.maximum(found["channel_peaks"][here], (w * h.double()).abs().numpy())
        found["channel_inputs"][(0, *here)] += gate.double().square().numpy()
        found["channel_inputs"][(1, *here)] += up.double().square().numpy()
        found["channel_gradients"][here] += q.double().square().numpy()
        self.tokens[here] += 1


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_norms_and_gradients_equal_those_of_plain_transformers(family: str, tmp_path: Path) -> None:
    folder = write_tiny(family, tmp_path / "m", seed=5)
    with Engine.open(EngineConfig(folder, max_context=128, max_batch=4)) as engine:
        text = encode_corpus(engine, CORPUS)
        found = gather_statistics(engine, text, Run(tmp_path, "p", ""), "t", 3, ignore, NEEDS)
        found = found.with_extras(of_weights(engine, NEEDS) | means(engine, text, 3, NEEDS))
        plain = Plain(folder, engine)
    for one in text:
        plain.run(one.tokens)
        plain.run(one.tokens, len(one.prompt), answers=True)
    for name in NAMES:
        plain.found[name] /= np.maximum(plain.tokens, 1)[:, :, None]
    for layer, module in enumerate(plain._modules):
        down = module.down_proj.double() if module.is_transposed else module.down_proj.double().mT  # [E, F, H]
        np.testing.assert_allclose(found.total("down_norms")[layer], down.norm(dim=2), rtol=1e-6)
        np.testing.assert_allclose(found.total("down_sums")[layer], down.abs().sum(dim=2), rtol=1e-6)
    if family == "qwen3_next":  # states fade: of far tokens' parts in the loss float32 leaves no direction
        del plain.found["channel_directions"]
    for name, wanted in plain.found.items():
        np.testing.assert_allclose(found.total(name), wanted, rtol=2e-3, atol=1e-5 * wanted.max(), err_msg=name)
    np.testing.assert_array_equal(found.total("selected"), plain.tokens)


def test_halves_add_up_and_the_largest_values_of_two_parts_are_the_largest_of_both(tmp_path: Path) -> None:
    with Engine.open(EngineConfig(write_tiny("qwen2_moe", tmp_path / "m"), max_context=128)) as engine:
        text = encode_corpus(engine, CORPUS)
        parts = [gather_statistics(engine, part, Run(tmp_path, "p", ""), "t", 2, ignore, NEEDS)
                 for part in (text, text[:2], text[2:])]  # fmt: skip
    whole, joined = parts[0], parts[1] + parts[2]
    for name in NEEDS & whole.extras.keys():
        np.testing.assert_allclose(joined.extras[name], whole.extras[name], rtol=1e-4, atol=1e-7, err_msg=name)
    halves = [whole.half(0), whole.half(1)]
    np.testing.assert_allclose(sum(half.total("channel_gated") for half in halves), whole.total("channel_gated"))
    assert np.array_equal(halves[0].total("channel_peaks"), whole.total("channel_peaks"))
    again = Statistics.from_arrays(whole.arrays)
    assert again.extras.keys() == whole.extras.keys()


def test_directions_of_a_text_without_responses_are_those_of_all_its_tokens(tmp_path: Path) -> None:
    folder = write_tiny("qwen2_moe", tmp_path / "m", seed=5)
    with Engine.open(EngineConfig(folder, max_context=128, max_batch=4)) as engine:
        text = encode_corpus(engine, gather([Item(item.prompt) for item in CORPUS.items]))
        found = means(engine, text, 3, frozenset({"channel_directions"}))
        plain = Plain(folder, engine)
    for one in text:
        plain.run(one.tokens)
        plain.run(one.tokens, answers=True)
    wanted = plain.found["channel_directions"] / np.maximum(plain.tokens, 1)[:, :, None]
    assert list(found) == ["channel_directions"]
    np.testing.assert_allclose(found["channel_directions"], wanted, rtol=2e-3, atol=1e-5 * wanted.max())


def test_gradients_say_what_they_take_and_are_refused_where_the_budget_forbids_it(tmp_path: Path) -> None:
    folder = write_tiny("qwen2_moe", tmp_path / "m")
    with Engine.open(EngineConfig(folder, max_context=128)) as engine:
        assert announce(engine, frozenset({"channel_sums"})) is None
        told = announce(engine, frozenset({"channel_gradients"}))
        assert told is not None
        assert "loaded whole" in told
        floor = engine.plan.floor_bytes
    with Engine.open(EngineConfig(folder, max_context=8, max_batch=1, chunk_tokens=8, memory=floor)) as engine:
        from dataclasses import replace

        engine.plan = replace(engine.plan, budget=1000)
        with pytest.raises(BudgetError, match="camera"):
            announce(engine, frozenset({"channel_gradients"}))


def test_nan_in_a_down_projection_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_tiny("qwen2_moe", tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.experts.2.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with (
        Engine.open(EngineConfig(folder, max_context=128)) as engine,
        pytest.raises(CheckpointError, match="expert 2 in MoE layer 1"),
    ):
        of_weights(engine, frozenset({"down_norms"}))
