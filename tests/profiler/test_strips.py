"""Experts in strips: the pack is the whole model for every engine, and rows go through the strips that they hold.

The slow truth of a selection of strips is plain transformers' model before it was packed: channels of strips that are
not held give nothing, and the router is limited to the experts of which a strip is.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.engine import Engine
from engine.products import instruction_sets
from engine.requests import FinishedEvent, GenerationRequest, Sampling, TokenEvent
from engine.routing import Routing
from engine.tiny import FAMILIES, write_tiny
from profiler.calls import check_active
from profiler.pack import write_pack
from profiler.pack_recipes import InStrips
from profiler.pack_ways import Pack
from store.errors import CheckpointError, InvalidInput, UnsupportedFamily
from store.records import Selection, StandIn

IDS = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(0))
ONES = torch.ones_like(IDS)
NEAR = {"atol": 1e-4, "rtol": 1e-4}
SPLITTABLE = [family for family in FAMILIES if family != "deepseek_v3"]


class Packed:
    """A tiny checkpoint and its pack in strips."""

    def __init__(self, family: str, beside: Path, strips: int = 2, **fields: Any) -> None:
        self.whole = write_tiny(family, beside / "model", seed=3, **fields)
        self.folder = beside / "pack"
        with Engine.open(EngineConfig(self.whole, max_context=64)) as engine:
            card, width = engine.card, engine.layers.channels.width
            scores = np.random.default_rng(0).random((card.layers, card.experts, width))
            self.recipe = InStrips(scores, strips, engine.layers.share_of_strips(strips))
            self.card = write_pack(engine, self.recipe, self.folder, lambda _: {})

    def open(self, **fields: Any) -> Engine:
        return Engine.open(EngineConfig(self.folder, max_context=64, **fields))

    def reference(self, selection: Selection, beside: Path) -> Tensor:
        """Logits of `IDS` by plain transformers' weights without the channels, in the engine that limits its router."""
        model = _plain(self.whole)
        modules = [module for module in model.modules() if hasattr(module, "down_proj") and hasattr(module, "has_gate")]
        strips = self.recipe.strips
        for layer, (module, ids) in enumerate(zip(modules, selection.experts, strict=True)):
            for expert in range(module.num_experts):
                channels = self.recipe.channels(layer, expert)  # [P, F/P]
                down = module.down_proj.data[expert]
                for strip in set(range(strips)) - {each % strips for each in ids if each // strips == expert}:
                    (down if module.is_transposed else down.T)[channels[strip]] = 0
                    if module.has_bias and strip == 0:
                        module.down_proj_bias.data[expert] = 0
        folder = beside / selection.digest
        model.save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((self.whole / file).read_bytes())
        experts = Selection.of([sorted({each // strips for each in ids}) for ids in selection.experts])
        with Engine.open(EngineConfig(folder, max_context=64)) as engine:
            return engine.forward(IDS, ONES, [experts] * 2)


def _plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _drawn(engine: Engine, seed: int) -> Selection:
    """As few as a layer may hold, anywhere."""
    card, rng = engine.card, random.Random(seed)
    return Selection.of([rng.sample(range(card.experts), card.top_k) for _ in range(card.layers)])


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Packed]:
    """`packed(family, **fields)`: made once for the same fields."""

    @cache
    def make(family: str = "qwen3_moe", **fields: Any) -> Packed:
        return Packed(family, tmp_path_factory.mktemp(family), **fields)

    return make


@pytest.mark.parametrize("family", SPLITTABLE)
def test_all_strips_are_the_whole_model_in_both_engines(family: str, packed: Callable[..., Packed]) -> None:
    made = packed(family)
    with torch.inference_mode():
        wanted = _plain(made.whole)(input_ids=IDS).logits
        torch.testing.assert_close(_plain(made.folder)(input_ids=IDS).logits, wanted, **NEAR)
    with made.open() as engine:
        whole = Selection.whole(engine.card.layers, engine.card.experts)
        assert (engine.card.experts, engine.card.top_k, engine.card.strips) == (16, 4, 2)
        for selections in ([None, None], [whole, whole], [None, whole]):
            torch.testing.assert_close(engine.forward(IDS, ONES, selections), wanted, **NEAR)
    assert (made.card["strips"], made.card["experts"], made.card["channels"]) == (2, [8, 16], [16, 8])


@pytest.mark.parametrize("family", SPLITTABLE)
def test_a_selection_is_the_unsplit_model_without_the_other_channels(
    family: str, packed: Callable[..., Packed], tmp_path: Path
) -> None:
    made = packed(family)
    with made.open() as engine:
        selection = _drawn(engine, 1)
        found, coverage = engine.forward_metered(IDS, ONES, [selection] * 2)
    torch.testing.assert_close(found, made.reference(selection, tmp_path), **NEAR)
    assert all(0 < share < 1 for share in coverage)


def test_four_strips_of_which_rows_hold_one_and_all(packed: Callable[..., Packed], tmp_path: Path) -> None:
    """Two tasks share experts: one has their first strips, the other whole ones of them. Each row has its own alone."""
    made = packed(intermediate_size=32, moe_intermediate_size=32, strips=4)
    with made.open() as engine:
        card = engine.card
        firsts = Selection.of([range(0, card.experts, 4)] * card.layers)
        wholes = Selection.of([[*range(4), *range(8, 16)]] * card.layers)
        found, coverage = engine.forward_metered(IDS, ONES, [firsts, wholes])
        assert engine.bank.resident_bytes == (8 + 12 - 3) * card.layers * engine.bank.slot_bytes, "shared once"
        assert coverage[0] == pytest.approx(0.25)
        for at, selection in enumerate((firsts, wholes)):
            alone = engine.forward(IDS, ONES, [selection] * 2)
            torch.testing.assert_close(found[at], alone[at], **NEAR)
    torch.testing.assert_close(found[0], made.reference(firsts, tmp_path)[0], **NEAR)
    torch.testing.assert_close(found[1], made.reference(wholes, tmp_path)[1], **NEAR)


def _of_two_tasks_and_exact(engine: Engine) -> list[GenerationRequest]:
    return [
        GenerationRequest((5, 6, 7), each, "exact" if each is None else "mask", Sampling(max_tokens=8))
        for each in (_drawn(engine, 1), _drawn(engine, 2), None)
    ]


def _answers(engine: Engine, requests: list[GenerationRequest]) -> list[str]:
    ended = {event.row: event.text for event in engine.generate(requests) if isinstance(event, FinishedEvent)}
    return [ended[row] for row in range(len(requests))]


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "mixtral"])
def test_answers_of_a_mixed_batch_are_those_of_each_task_alone(
    family: str, kernel: str, packed: Callable[..., Packed]
) -> None:
    """Decoded token by token, where rows of one batch hold other strips of the same experts, or route freely."""
    with packed(family).open(kernel=kernel) as engine:
        requests = _of_two_tasks_and_exact(engine)
        mixed = _answers(engine, requests)
        engine.evict()
        assert mixed == [_answers(engine, [request])[0] for request in requests]


@pytest.mark.skipif(not instruction_sets(), reason="the products were not built: there was no C compiler")
def test_a_decoder_layer_of_strips_is_two_calls_too(packed: Callable[..., Packed]) -> None:
    """The router's choice of experts comes from the first; which strips of them a row holds is said between the two."""
    made, found = packed("olmoe"), []
    for kernel in ("own", "torch"):
        with made.open(kernel=kernel) as engine:
            found.append(_answers(engine, _of_two_tasks_and_exact(engine)))
            if kernel == "own":
                layers = [each.forward.__self__ for each in engine.passes.decoders]
                assert [layer._shape.choice.top_k for layer in layers] == [2, 2, 2]
                assert engine.kernel.endswith(
                    "3 of 3 decoder layers in two calls, nothing around them, experts in 2 strips"
                )
    assert found[0] == found[1]


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "mixtral"])
def test_prompts_in_16_bits_are_read_as_by_torch(family: str, packed: Callable[..., Packed]) -> None:
    """Two tasks and one that routes freely, of different lengths: coverage, which meters every token of them, and the
    first token's probability."""
    made, found = packed(family), []
    for kernel in ("own", "torch"):
        with made.open(kernel=kernel, dtype="bfloat16") as engine:
            requests = [
                replace(each, prompt=tuple(range(5, 25 + 9 * place)), sampling=Sampling(max_tokens=1, logprobs=1))
                for place, each in enumerate(_of_two_tasks_and_exact(engine))
            ]
            events = list(engine.generate(requests))
            first = {each.row: each.score.logprob for each in events if isinstance(each, TokenEvent) and each.score}
            covered = {each.row: each.served.coverage for each in events if isinstance(each, FinishedEvent)}
            found.append([value for row in range(3) for value in (first[row], covered[row])])
    assert found[0] == pytest.approx(found[1], abs=0.06)


def test_strips_in_plain_numbers_are_those_of_tensors(packed: Callable[..., Packed]) -> None:
    """Of single tokens, one a row: of two tasks and of one that routes freely, and of an expert that is none."""
    with packed("olmoe").open() as engine:
        selections = [_drawn(engine, 1), None, _drawn(engine, 2)]
        routing = Routing(engine.board, selections, torch.device("cpu"))
        routing.begin(1)
        experts = engine.board.experts
        index = torch.tensor([[0, 1], [2, experts], [3, 0]])
        for layer in range(engine.card.layers):
            weights, wanted = routing.in_strips(layer, torch.rand(3, 2), index)
            assert routing.strips_of(layer, index.flatten().tolist()) == wanted.flatten().tolist()
            assert weights.shape == wanted.shape == (3, 2 * engine.card.strips)


def test_a_layer_serves_with_one_strip_of_as_many_experts_as_a_token_goes_through(
    packed: Callable[..., Packed], tmp_path: Path
) -> None:
    """Half of what one token's whole experts take. Two strips of one expert are not enough."""
    made = packed()
    with made.open() as engine:
        least = Selection.of([[1, 6], [0, 15], [8, 11]])
        assert engine.plan.fits(least)
        found = engine.forward(IDS, ONES, [least] * 2)
        with pytest.raises(
            InvalidInput, match=r"at least 2 \(a token's top-k, in 2 strips each\) of the experts 0 to 15"
        ):
            engine.forward(IDS, ONES, [Selection.of([[6, 7], [0, 15], [8, 11]])] * 2)
    torch.testing.assert_close(found, made.reference(least, tmp_path), **NEAR)


def test_a_swap_reads_the_strips_that_are_missing_and_no_others(packed: Callable[..., Packed]) -> None:
    with packed(intermediate_size=32, moe_intermediate_size=32, strips=4).open() as engine:
        layers = engine.card.layers
        first = Selection.of([range(0, 32, 4)] * layers)
        more = Selection.of([sorted({*range(0, 32, 4), 1, 2, 3})] * layers)
        with engine.lease(first) as lease:
            assert lease.experts_paged == 8 * layers
            with engine.lease(more) as grown:
                assert (grown.experts, grown.experts_paged) == (11 * layers, 3 * layers)
                assert grown.bytes_paged == 3 * layers * engine.card.expert_bytes


def test_exact_answers_page_strips_through_few_slots(packed: Callable[..., Packed]) -> None:
    made = packed()
    with made.open() as engine:
        plan = engine.plan
        wanted = engine.forward(IDS, ONES, [None, None])
    with made.open(memory=plan.floor_bytes, chunk_tokens=plan.chunk_tokens) as engine:
        assert engine.plan.slots == engine.card.layers * engine.card.least == 3 * 2
        torch.testing.assert_close(engine.forward(IDS, ONES, [None, None]), wanted, **NEAR)


class Watching:
    """Notes what routing and experts show of one pass."""

    def __init__(self) -> None:
        self.routed_as: list[tuple[Tensor, Tensor, Tensor]] = []
        self.seen: list[Tensor] = []

    def residual(self, layer: int, h: Tensor) -> None: ...

    def routed(self, layer: int, x: Tensor, logits: Tensor, weights: Tensor, index: Tensor, valid: Tensor) -> None:
        self.routed_as.append((x, logits, index))

    def experts(self, layer: int, experts: Tensor, tokens: Tensor, weights: Tensor, outputs: Tensor) -> None:
        self.seen.append(experts)

    def combined(self, layer: int, y: Tensor) -> None: ...


def test_who_watches_sees_strips_as_experts(packed: Callable[..., Packed]) -> None:
    """So a profile scores strips; and what an observer saw, routed anew within a set, is what that set serves."""
    with packed().open() as engine:
        card, free, within, selection = engine.card, Watching(), Watching(), _drawn(engine, 4)
        engine.forward(IDS, ONES, [None, None], free)
        engine.forward(IDS, ONES, [selection] * 2, within)
        x, logits, index = free.routed_as[0]
        assert (logits.shape[1], index.shape[1]) == (card.experts, card.top_k)
        assert torch.equal(logits[:, 0::2], logits[:, 1::2])
        counts = torch.bincount(free.seen[0], minlength=card.experts)
        assert torch.equal(counts[0::2], counts[1::2])
        assert set(within.seen[0].tolist()) <= set(selection.experts[0])
        again = engine.layers.route_within(0, x, logits, selection.experts[0])[1]
        assert torch.equal(again.sort(1).values, within.routed_as[0][2].sort(1).values)


def test_rows_of_a_router_that_do_not_repeat_are_refused(tmp_path: Path) -> None:
    folder = write_tiny("qwen3_moe", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for strips, said in ((2, "do not come in 2 equal ones"), (3, "a number that divides 8 experts"), (0, "divides")):
        (folder / "config.json").write_text(json.dumps(config | {"expert_strips": strips}))
        with pytest.raises(CheckpointError, match=said):
            Engine.open(EngineConfig(folder, max_context=64))


def test_what_strips_can_not_do_is_refused(packed: Callable[..., Packed], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFamily, match="groups"):
        Packed("deepseek_v3", tmp_path / "groups")
    made = packed()
    with made.open(stand_ins=1) as engine:
        card, drawn = engine.card, _drawn(engine, 0)
        vectors = np.zeros((card.layers, card.experts, card.hidden), np.float32)
        with pytest.raises(InvalidInput, match="nothing stands in for a strip"):
            engine.admission.check_selection(Selection(drawn.experts, StandIn("means", vectors)))
        with pytest.raises(UnsupportedFamily, match="pack the model that it was made of"):
            write_pack(engine, made.recipe, tmp_path / "again", lambda _: {})
        with pytest.raises(InvalidInput, match="Leave --active out"):
            check_active(engine, [0.5], None)
    with pytest.raises(InvalidInput, match=r"each a multiple of 8: 2, 4\. Got 3\."):
        InStrips(np.zeros((1, 2, 32)), 3, 1.0)
    for shares in ({"way": "experts"}, {"way": "camera", "channels": 0.5}, {"way": "camera", "experts": 0.5}):
        with pytest.raises(InvalidInput, match="Strips hold the whole model"):
            Pack(strips=2, **shares)


def test_the_best_channels_are_in_the_first_strip() -> None:
    scores = np.arange(32.0).reshape(1, 2, 16)
    scores[0, 1] *= -1
    recipe = InStrips(scores, 2, 0.5)
    assert recipe.channels(0, 0).tolist() == [list(range(8, 16)), list(range(8))]
    assert recipe.channels(0, 1).tolist() == [list(range(8)), list(range(8, 16))]
