"""Which share of a model's experts a card or machine of some size holds, from the model's published config alone."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.blueprint import write_blueprint
from engine.card import ModelCard
from engine.config import EngineConfig
from engine.plan import MemoryPlan, plan_memory
from store.checkpoint import CheckpointMap
from store.errors import BudgetError
from store.sizes import show_bytes


@dataclass(frozen=True, slots=True)
class Recipe:
    """One model on one amount of memory. `slots_per_layer` None: not even one token's experts fit."""

    model: str
    weight_bytes: int
    memory: int
    floor_bytes: int
    fixed_bytes: int
    slots_per_layer: int | None
    experts: int
    top_k: int

    @property
    def keep(self) -> float | None:
        return None if self.slots_per_layer is None else self.slots_per_layer / self.experts

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "keep": self.keep}


def recipes(
    config: Path, memories: Sequence[int], *, context: int | None, batch: int, device: str, way: str | None = None
) -> Sequence[Recipe]:
    """What `plan` says of the model that `config` describes, or of its copy in `way`, for every budget of `memories`
    (bytes).

    No weights are needed. Raises InvalidInput for a file that is no config, UnsupportedFamily for one that can't be
    served.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_blueprint(config, Path(scratch) / "model", way=way)
        weight_bytes = CheckpointMap.open(folder).weight_bytes
        card = ModelCard.read(folder)
    settings = EngineConfig(folder, None, device=device, max_context=context, max_batch=batch, chunk_tokens=512)
    whole = plan_memory(card, settings)
    name = config.stem if way is None else f"{config.stem}, {way.upper()}"
    return [_recipe(name, weight_bytes, whole, memory, card, settings) for memory in memories]


def _recipe(
    model: str, weight_bytes: int, whole: MemoryPlan, memory: int, card: ModelCard, settings: EngineConfig
) -> Recipe:
    budgeted = EngineConfig(
        settings.model, memory, settings.device, settings.dtype, settings.max_context, settings.max_batch
    )
    try:
        slots: int | None = plan_memory(card, budgeted).slots_per_layer
    except BudgetError:
        slots = None
    return Recipe(model, weight_bytes, memory, whole.floor_bytes, whole.fixed_bytes, slots, card.experts, card.top_k)


def show_recipes(found: Sequence[Recipe]) -> str:
    """A Markdown table, a row a model and a column an amount of memory."""
    memories = sorted({recipe.memory for recipe in found})
    head = ["model", "weights", "experts", "least budget", *(show_bytes(memory) for memory in memories)]
    lines = [head, ["---"] * len(head)]
    for model in dict.fromkeys(recipe.model for recipe in found):
        of = {recipe.memory: recipe for recipe in found if recipe.model == model}
        one = of[memories[0]]
        first = [model, show_bytes(one.weight_bytes), f"{one.experts}, top {one.top_k}", show_bytes(one.floor_bytes)]
        lines.append(first + [_cell(of[memory]) for memory in memories])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(recipe: Recipe) -> str:
    if recipe.slots_per_layer is None:
        return "no"
    return f"{recipe.slots_per_layer} ({recipe.keep:.0%})"
