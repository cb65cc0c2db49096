"""Names of models: `base` retrieves the task of each query, `base:task` pins it."""

from __future__ import annotations

from dataclasses import replace

from service.parts import Parts
from service.refusals import UnknownModel
from service.serving import Wish
from store.errors import InvalidInput, NotFound


def resolve_model(name: str, parts: Parts) -> str | None:
    """The task that a model's name pins; None for the base model. Raises UnknownModel, for the task too."""
    if name == parts.model_id:
        return None
    if name.startswith(parts.model_id + ":"):
        try:
            return parts.catalogue.named(name.removeprefix(parts.model_id + ":")).name
        except NotFound as error:
            raise UnknownModel(str(error)) from None
    raise UnknownModel(
        f"No model {name!r} is served here. Served: {parts.model_id!r}, and {parts.model_id!r} followed by a colon "
        "and a task; GET /v1/models lists them all."
    )


def wish_for(model: str, wish: Wish, parts: Parts) -> Wish:
    """The request's wish, with the task that its model's name pins. Refuses two different tasks."""
    task = resolve_model(model, parts)
    if task is not None and wish.task not in (None, task):
        raise InvalidInput(
            f"The model {model!r} pins task {task!r}, but `expert.task` names {wish.task!r}. Name one task.",
            param="expert.task",
        )
    return replace(wish, task=task or wish.task)
