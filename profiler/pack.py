"""A new checkpoint made of an old one by a recipe: hub layout, loadable by plain transformers, whole or absent.

One layer's experts are in memory at a time. E' experts after, F channels before, F' after.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.channels import Expert
from engine.engine import Engine
from profiler.pack_config import changed_config, channel_dim, is_of_router
from profiler.pack_folder import CARD, Shards, dense_tensors, refuse_existing, written_whole
from profiler.pack_recipes import NewLayer, Recipe
from store.checkpoint import CheckpointMap
from store.errors import CheckpointError, InvalidInput, UnsupportedFamily
from store.experts import ExpertMap
from store.records import ExpertKey

Finish = Callable[[Path], dict[str, Any]]  # the finished folder, still unnamed -> what its card says beside the recipe


def write_pack(engine: Engine, recipe: Recipe, folder: Path, finish: Finish) -> dict[str, Any]:
    """Writes the pack and gives its card. `engine` holds the model to be packed, in the checkpoint's own type.

    Raises Conflict where `folder` exists, UnsupportedFamily where the pack could not be loaded, BudgetError where the
    disk has no room, ShardChanged where the model's files changed meanwhile; whatever goes wrong, nothing is left of
    it.
    """
    refuse_existing(folder)
    _check(engine, recipe)
    source = engine.checkpoint
    experts, channels = engine.card.experts, engine.layers.channels
    config = changed_config(engine.card.folder, channels, experts, recipe.kept, recipe.width, recipe.strips)
    with written_whole(folder, source, config) as made:
        _write_weights(engine, recipe, source, made)
        card = {**_card(engine, recipe), **finish(made)}
        (made / CARD).write_text(json.dumps(card, indent=2) + "\n")
    return card


def _check(engine: Engine, recipe: Recipe) -> None:
    card = engine.card
    if not card.top_k <= recipe.kept <= card.experts * recipe.strips:
        raise InvalidInput(
            f"A packed layer keeps between {card.top_k} (what a token goes through) and {card.experts} experts, got "
            f"{recipe.kept}.",
            param="experts",
        )
    if engine.plan.dtype != card.geometry.stored or card.geometry.packed:
        raise UnsupportedFamily(
            f"The experts are stored as {card.geometry.stored or 'a quantised type'} and were opened as "
            f"{engine.plan.dtype}. A pack keeps the stored type: open the model with dtype auto, unquantised."
        )
    if card.strips > 1:
        raise UnsupportedFamily(
            f"{card.folder} is a pack whose experts lie in {card.strips} strips; pack the model that it was made of."
        )
    if recipe.kept != card.experts and engine.layers.grouped:
        raise UnsupportedFamily(
            "This family's router chooses groups of experts first, and fewer or more experts would fall into other "
            "groups. Keep all experts whole, and fewer channels of each."
        )


def _card(engine: Engine, recipe: Recipe) -> dict[str, Any]:
    card, before = engine.card, engine.layers.channels.width
    size = card.layers * recipe.kept * card.expert_bytes * recipe.width // before
    return {
        "packed_from": card.fingerprint,
        "family": card.family,
        "experts": [card.experts, recipe.kept],
        "channels": [before, recipe.width],
        "strips": recipe.strips,
        "expert_bytes": [card.layers * card.experts * card.expert_bytes, size],
        **recipe.said,
    }


def _write_weights(engine: Engine, recipe: Recipe, source: CheckpointMap, folder: Path) -> None:
    experts = ExpertMap.build(source)
    shards = Shards(folder)
    rows: dict[str, Tensor] = {}  # by block
    for layer, module in enumerate(experts.modules):
        made = recipe.layer(layer, _experts(engine, layer))
        _refuse_nan(made, layer)
        rows[module.removesuffix(".experts")] = made.rows
        shards.add(_hub_tensors(engine, source, experts, layer, made.experts))
    for part in dense_tensors(source, experts):
        shards.add({name: _routed(name, tensor, rows, engine.card.experts) for name, tensor in part.items()})
    source.check()  # the dense tensors were read by their files' paths
    shards.close()


def _experts(engine: Engine, layer: int) -> list[Expert]:
    """All of a layer, copied out of the bank."""
    found = {}
    for number, views in engine.layers.expert_weights(layer):
        found[number] = engine.layers.channels.split([view.clone().cpu() for view in views])
    return [found[number] for number in range(engine.card.experts)]


def _refuse_nan(made: NewLayer, layer: int) -> None:
    for number, expert in enumerate(made.experts):
        tensors = (*expert.inputs, *expert.input_biases, expert.down)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            raise CheckpointError(
                f"Expert {number} of MoE layer {layer} of the pack would have NaN or infinity: the checkpoint has. "
                "Download it again."
            )


def _hub_tensors(
    engine: Engine, source: CheckpointMap, experts: ExpertMap, layer: int, made: Sequence[Expert]
) -> dict[str, Tensor]:
    """The new experts under the names that the old ones have: a tensor for each, or one for all."""
    module, channels, layout = experts.modules[layer], engine.layers.channels, engine.bank.layout
    joined = [channels.join(expert) for expert in made]
    found: dict[str, Tensor] = {}
    for part in experts.span(ExpertKey(layer, 0)).parts:
        landing = layout.landings[part.projection]
        along = channel_dim(layout.parameters[landing.field].name, channels) == landing.dim
        start, length = landing.start, landing.length
        if along:
            start, length = (each * made[0].width // channels.width for each in (start, length))
        cut = [views[landing.field].narrow(landing.dim, start, length) for views in joined]
        if f"{module}.0.{part.projection}" in source.tensors:
            found |= {f"{module}.{number}.{part.projection}": each for number, each in enumerate(cut)}
        else:
            found[f"{module}.{part.projection}"] = torch.stack(cut)
    return found


def _routed(name: str, tensor: Tensor, rows: dict[str, Tensor], experts: int) -> Tensor:
    """A dense tensor as it is; of a router, its new rows."""
    blocks = {block for block in rows if is_of_router(name, {block})}
    if not blocks or tensor.dim() == 0 or len(tensor) != experts:
        return tensor
    mixing = rows[blocks.pop()]  # [E', E]
    chosen = mixing.argmax(dim=1)
    if torch.equal(mixing, torch.nn.functional.one_hot(chosen, experts).to(mixing)):
        return tensor[chosen]  # bit for bit
    return torch.einsum("ne,e...->n...", mixing, tensor.double()).to(tensor.dtype)
