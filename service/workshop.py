"""What the running of profiling jobs needs: a store, a model's folder, an embedder, and settings. No engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.card import ModelCard
from engine.embedder import Embedder, open_embedder
from service.model import engine_config
from service.parts import Parts
from service.settings import Settings
from store.database import Store, open_store


@dataclass(frozen=True, slots=True)
class Workshop:
    """Of one model. The service has one beside its engine; `moepager worker` has one alone."""

    settings: Settings
    folder: Path
    model: str  # fingerprint
    store: Store
    embedder: Embedder


def workshop_of(parts: Parts) -> Workshop:
    return Workshop(parts.settings, parts.folder, parts.catalogue.model, parts.store, parts.retriever.embedder)


@contextmanager
def open_workshop(settings: Settings) -> Iterator[Workshop]:
    config = engine_config(settings)
    card = ModelCard.read(config.model)
    with open_store(settings.store) as store:
        yield Workshop(settings, card.folder, card.fingerprint, store, open_embedder(settings.embedder))
