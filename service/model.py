"""Which model the settings mean, and what clients call it. Loads nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from engine.config import EngineConfig
from service.settings import Settings
from store.home import bundled_model
from store.hub import model_folder

BUNDLED = "demo"  # the bundled model's name; its folder is just `model`


def engine_config(settings: Settings) -> EngineConfig:
    return EngineConfig(
        model=model_folder(settings.model),
        memory=settings.memory,
        device=settings.device,
        dtype=settings.dtype,
        max_context=settings.max_context,
        max_batch=settings.max_batch,
        threads=settings.threads,
        stand_ins=settings.stand_ins,
        kernel=settings.kernel,
    )


def job_config(settings: Settings) -> EngineConfig:
    """As a profiling job opens the model (`moepager profile`): an item goes through in one piece."""
    memory = settings.job_memory or settings.memory
    chunk = max(settings.max_context or 2048, 4096 if memory is None else 0)
    return replace(engine_config(settings), memory=memory, chunk_tokens=chunk, stand_ins=0, kernel="auto")


def model_id(name: str | None, folder: Path) -> str:
    """What clients call the model: its folder's name, its hub id, or `demo`."""
    if folder.resolve() == bundled_model().resolve():
        return BUNDLED
    is_folder = name is None or Path(name).expanduser().is_dir()
    return folder.resolve().name if is_folder else str(name)
