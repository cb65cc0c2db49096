"""`/v1/models`: the model itself, which retrieves the task of each query, and one name for each profiled task."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from service.context import PartsDep
from service.names import resolve_model
from service.parts import Parts

router = APIRouter(tags=["openai"])


@router.get("/v1/models")
async def list_models(parts: PartsDep) -> dict[str, Any]:
    """The model, which retrieves the task of each query, and one name for each task, which pins it."""
    tasks: list[str | None] = [None, *sorted(parts.catalogue.tasks)]
    return {"object": "list", "data": [model_object(parts, task) for task in tasks]}


@router.get("/v1/models/{name:path}")
async def get_model(name: str, parts: PartsDep) -> dict[str, Any]:
    """One of them."""
    return model_object(parts, resolve_model(name, parts))


def model_object(parts: Parts, task: str | None) -> dict[str, Any]:
    return {
        "id": parts.model_id if task is None else f"{parts.model_id}:{task}",
        "object": "model",
        "created": parts.started,
        "owned_by": "moepager",
        "root": parts.model_id,
        "parent": None if task is None else parts.model_id,
        "max_model_len": parts.max_context,
    }
