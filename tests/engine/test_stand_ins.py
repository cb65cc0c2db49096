"""Vectors in place of experts that were left out, against plain transformers with the same done by hand."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.engine import Engine
from engine.requests import Event, FinishedEvent, GenerationRequest
from engine.stand_ins import DeviceStandIns
from store.errors import BudgetError, InvalidInput
from store.records import Selection, StandIn

Draw = Callable[[Engine, random.Random], Selection]


def _with(engine: Engine, selection: Selection, seed: int = 0) -> Selection:
    card = engine.card
    vectors = np.random.default_rng(seed).normal(size=(card.layers, card.experts, card.hidden)).astype(np.float32)
    return Selection(selection.experts, StandIn(f"random-{seed}", vectors))


def _replaced(model: Any, selection: Selection) -> Any:
    """The plain model whose experts outside the selection each give one vector, whatever they are asked."""
    assert selection.stand_in is not None
    blocks = [module for module in model.modules() if hasattr(getattr(module, "experts", None), "down_proj")]
    for block, ids, layer in zip(blocks, selection.experts, selection.stand_in.vectors, strict=True):
        vectors, inside = torch.from_numpy(layer), torch.zeros(len(layer), dtype=torch.bool)
        inside[list(ids)] = True

        def forward(
            module: Any, hidden: Tensor, index: Tensor, weights: Tensor, vectors: Tensor = vectors,
            inside: Tensor = inside, plain: Any = block.experts.forward,
        ) -> Tensor:  # fmt: skip
            out: Tensor = plain(hidden, index, weights * inside[index])
            for token, row in enumerate(index.tolist()):
                for place, expert in enumerate(row):
                    if not inside[expert]:
                        out[token] += weights[token, place] * vectors[expert]
            return out

        block.experts.forward = MethodType(forward, block.experts)
    return model


class Nobody:
    """An observer that looks at nothing."""

    def residual(self, layer: int, h: Tensor) -> None: ...
    def routed(self, layer: int, x: Tensor, logits: Tensor, weights: Tensor, index: Tensor, valid: Tensor) -> None: ...
    def experts(self, layer: int, experts: Tensor, tokens: Tensor, weights: Tensor, outputs: Tensor) -> None: ...
    def combined(self, layer: int, y: Tensor) -> None: ...


def _logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.inference_mode():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.float()


def _batch(rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, width // 2, (rows, 1), generator=draw)
    return torch.randint(0, 256, (rows, width), generator=draw), (torch.arange(width) >= starts).long()


def test_a_selection_with_stand_ins_is_the_plain_model_with_those_experts_replaced(
    family: str, checkpoint: Callable[..., Path], open_engine: Callable[..., Engine],
    plain_model: Callable[[Path], Any], random_selection: Draw,
) -> None:  # fmt: skip
    folder = checkpoint(family)
    engine = open_engine(folder, stand_ins=1)
    for seed in range(2):
        selection = _with(engine, random_selection(engine, random.Random(seed)), seed)
        ids, mask = _batch(2, 11, seed)
        wanted = _logits(_replaced(plain_model(folder), selection), ids, mask)[mask.bool()]
        got = engine.forward(ids, mask, [selection] * 2)[mask.bool()]
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_a_layer_in_which_nobody_chooses_an_expert_that_is_there_gives_its_vectors_alone(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine], plain_model: Callable[[Path], Any]
) -> None:
    """One token over and over is routed alike everywhere in the first layer: to two experts, which are left out."""
    folder = checkpoint("qwen2_moe")
    engine = open_engine(folder, stand_ins=1)
    ids = torch.full((2, 24), 7)
    mask = torch.ones_like(ids)
    chosen: set[int] = set()

    class Watch(Nobody):
        def routed(self, layer: int, x: Tensor, logits: Tensor, weights: Tensor, index: Tensor, valid: Tensor) -> None:
            chosen.update(index.flatten().tolist() if layer == 0 else [])

    engine.forward(ids, mask, [None] * 2, Watch())
    others = tuple(sorted(set(range(engine.card.experts)) - chosen))
    assert len(others) == engine.card.experts - engine.card.top_k
    selection = _with(engine, Selection((others,) * engine.card.layers))
    wanted = _logits(_replaced(plain_model(folder), selection), ids, mask)
    for _ in range(2):  # the second time everything is at hand
        torch.testing.assert_close(engine.forward(ids, mask, [selection] * 2), wanted, atol=1e-4, rtol=1e-4)


def test_rows_with_stand_ins_beside_rows_of_every_other_kind_equal_those_rows_alone(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine], random_selection: Draw
) -> None:
    engine = open_engine(checkpoint("qwen3_moe"), stand_ins=2)
    draw = random.Random(3)
    masks = [random_selection(engine, draw) for _ in range(3)]
    selections = [_with(engine, masks[0], 0), masks[0], None, _with(engine, masks[1], 1), _with(engine, masks[2], 0)]
    ids, mask = _batch(5, 13, seed=2)
    together, coverage = engine.forward_metered(ids, mask, selections)
    for row, selection in enumerate(selections):
        start = int((mask[row] == 0).sum())
        alone, own = engine.forward_metered(ids[row : row + 1, start:], mask[row : row + 1, start:], [selection])
        torch.testing.assert_close(together[row, start:], alone[0], atol=1e-4, rtol=1e-4)
        assert coverage[row] == pytest.approx(own[0], abs=1e-5)
    assert coverage[2] == 1.0
    assert 0 < coverage[0] < 1


def test_decoding_one_row_goes_on_as_a_forward_of_all_its_tokens_would(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine], random_selection: Draw,
    ask: Callable[..., GenerationRequest], finished: Callable[[Iterator[Event]], dict[int, FinishedEvent]],
) -> None:  # fmt: skip
    engine = open_engine(checkpoint("qwen2_moe"), stand_ins=1)
    selection = _with(engine, random_selection(engine, random.Random(4)))
    prompt = tuple(range(40, 49))
    events = list(engine.generate([ask(prompt, selection, max_tokens=6, ignore_eos=True)]))
    tokens = [event.token for event in events if not isinstance(event, FinishedEvent)]
    ids = torch.tensor([[*prompt, *tokens]])
    guessed = engine.forward(ids, torch.ones_like(ids), [selection])[0, len(prompt) - 1 : -1].argmax(-1)
    assert tokens == guessed.tolist()
    assert 0 < finished(iter(events))[0].served.coverage < 1


def test_a_token_whose_experts_are_all_left_out_gets_vectors_alone() -> None:
    """What the index then holds is E alone, and the sum is the router's weights times the vectors."""
    from engine.stand_ins import Replacement

    vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]])
    layer = Replacement(torch.tensor([False, False, True]), vectors)
    weights, chosen = torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([[0, 1], [2, 1]])
    _, index, added = layer.apply(torch.zeros(2, 4), (torch.zeros(2, 3), weights, chosen))
    assert index.tolist() == [[3, 3], [2, 3]]
    assert added.tolist() == [[0.75, 0.5], [0.0, 1.0]]


def test_a_constant_expert_is_replaced_exactly_by_its_mean(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    """gpt-oss has a bias behind its down projection: with the projection at zero an expert gives its bias alone."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "constant"
    shutil.copytree(checkpoint("gpt_oss"), folder)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("experts.down_proj"):
            tensor[3] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    engine = open_engine(folder, stand_ins=1)
    biases = [weights[f"model.layers.{layer}.mlp.experts.down_proj_bias"] for layer in range(engine.card.layers)]
    others = [expert for expert in range(engine.card.experts) if expert != 3]
    stand_in = StandIn("biases", torch.stack(biases).float().numpy())
    ids, mask = _batch(3, 12)
    whole = engine.forward(ids, mask, [None] * 3)[mask.bool()]
    without = engine.forward(ids, mask, [Selection.of([others] * engine.card.layers, stand_in)] * 3)[mask.bool()]
    torch.testing.assert_close(without, whole, atol=1e-5, rtol=1e-5)


def test_stand_ins_that_nobody_planned_for_or_of_another_model_are_refused(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine], random_selection: Draw,
    ask: Callable[..., GenerationRequest],
) -> None:  # fmt: skip
    folder = checkpoint("qwen2_moe")
    without, engine = open_engine(folder), open_engine(folder, stand_ins=1)
    selection = random_selection(engine, random.Random(1))
    with pytest.raises(BudgetError, match="MOEPAGER_STAND_INS"):
        without.admission.check(ask((1, 2), _with(without, selection)))
    other = Selection(selection.experts, StandIn("other", np.zeros((3, 8, 4), np.float32)))
    with pytest.raises(InvalidInput, match="another model"):
        engine.admission.check(ask((1, 2), other))
    assert engine.plan.fixed_bytes - without.plan.fixed_bytes == engine.plan.stand_in_bytes == 3 * 8 * 32 * 4
    with pytest.raises(InvalidInput, match="at least 0"):
        EngineConfig(folder, stand_ins=-1)


def test_a_set_that_is_held_stays_and_an_idle_one_makes_room() -> None:
    held = DeviceStandIns(1, torch.device("cpu"))
    one, two = (StandIn(name, np.ones((1, 2, 3), np.float32)) for name in ("one", "two"))
    with held.hold(one), held.hold(one):
        assert held.has_room(one)
        assert not held.has_room(two)
        with pytest.raises(BudgetError, match="1 sets"), held.hold(two):
            pass
    with held.hold(two):
        assert held.vectors(two).shape == (1, 2, 3)
    with pytest.raises(KeyError):
        held.vectors(one)
