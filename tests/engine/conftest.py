"""Tiny checkpoints, engines over them, and plain transformers models as the slow truth."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.engine import Engine
from engine.products import Products, instruction_sets
from engine.requests import Event, FinishedEvent, GenerationRequest, Sampling
from engine.tiny import FAMILIES, write_tiny
from store.records import Selection

Checkpoint = Callable[..., Path]
Open = Callable[..., Engine]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """`checkpoint(family, **fields)`: written once a session for the same fields."""
    made: dict[str, Path] = {}

    def make(family: str, **fields: Any) -> Path:
        key = repr((family, sorted(fields.items())))
        if key not in made:
            made[key] = write_tiny(family, tmp_path_factory.mktemp(family), **fields)
        return made[key]

    return make


@pytest.fixture
def open_engine() -> Iterator[Open]:
    """Engines that are closed when the test ends, whose residency must be sound and without leases by then."""
    opened: list[Engine] = []

    def make(folder: Path, **fields: Any) -> Engine:
        opened.append(Engine.open(EngineConfig(folder, **fields)))
        return opened[-1]

    yield make
    for engine in opened:
        engine.bank.residency.check()
        assert engine.bank.residency.leased == 0
        engine.close()


@pytest.fixture(params=list(instruction_sets()))
def own(request: pytest.FixtureRequest) -> Products:
    """For every set of instructions that this processor has."""
    return Products(request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets how many torch and our products take, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def plain_model() -> Callable[[Path], Any]:
    """The same checkpoint as transformers runs it."""

    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder).eval()

    return load


@pytest.fixture
def random_selection() -> Callable[[Engine, random.Random], Selection]:
    def draw(engine: Engine, rng: random.Random) -> Selection:
        card = engine.card
        sizes = [rng.randint(card.top_k, card.experts) for _ in range(card.layers)]
        return Selection.of([rng.sample(range(card.experts), size) for size in sizes])

    return draw


@pytest.fixture
def ask() -> Callable[..., GenerationRequest]:
    """`ask(prompt, selection, **sampling)`: a request; without a selection it is exact."""

    def make(prompt: tuple[int, ...], selection: Selection | None = None, **sampling: Any) -> GenerationRequest:
        return GenerationRequest(prompt, selection, "exact" if selection is None else "mask", Sampling(**sampling))

    return make


@pytest.fixture
def finished() -> Callable[[Iterator[Event]], dict[int, FinishedEvent]]:
    def collect(events: Iterator[Event]) -> dict[int, FinishedEvent]:
        return {event.row: event for event in events if isinstance(event, FinishedEvent)}

    return collect


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
