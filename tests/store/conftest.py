"""Real parts for the store's tests: safetensors written by hand, SQLite files, and a real PostgreSQL."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import create_engine

from store.database import Store, open_store
from store.records import Evaluation, Exemplar, ModelRecord, Profile, Selection, StoredSelection, TaskRecord, Trust

# --- checkpoints -----------------------------------------------------------------------------------------------------

Header = dict[str, Any]


def raw_shard(header: Header | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def shard_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    """What a safetensors file of these arrays holds, in their order."""
    names = {"float32": "F32", "float16": "F16", "uint8": "U8", "int64": "I64", "int32": "I32", "uint16": "BF16"}
    header: Header = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        end = len(data) + array.nbytes
        header[name] = {"dtype": names[str(array.dtype)], "shape": array.shape, "data_offsets": [len(data), end]}
        data += array.tobytes()
    return raw_shard(header, data)


@pytest.fixture
def raw() -> Callable[[Header | bytes, bytes], bytes]:
    return raw_shard


@pytest.fixture
def write_model(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model folder: one file, or as many shards as are asked for, tensors dealt round."""

    def write(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None, shards: int = 1) -> Path:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config or {"model_type": "test"}))
        if shards == 1:
            (folder / "model.safetensors").write_bytes(shard_bytes(tensors))
            return folder
        files = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
        weight_map = dict(zip(tensors, itertools.cycle(files), strict=False))
        for file in files:
            held = {name: array for name, array in tensors.items() if weight_map[name] == file}
            (folder / file).write_bytes(shard_bytes(held))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    return write


# --- databases -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Every test that takes this, or `store`, runs on both."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.db'}"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    with open_store(database_url) as opened:
        yield opened


@pytest.fixture
def run_sql_on() -> Callable[[str, str], None]:
    """Does to a database what the store would never do."""

    def run(url: str, statement: str) -> None:
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.exec_driver_sql(statement)
        engine.dispose()

    return run


@pytest.fixture
def run_sql(database_url: str, run_sql_on: Callable[[str, str], None]) -> Callable[[str], None]:
    return partial(run_sql_on, database_url)


# --- records ---------------------------------------------------------------------------------------------------------

MODEL = ModelRecord("f" * 64, "Tiny MoE", "qwen3_moe", 2, 4, 2, "c" * 64, "w" * 64, "t" * 64)
TASK = TaskRecord("sql", "questions about tables")


@pytest.fixture
def model() -> ModelRecord:
    return MODEL


@pytest.fixture
def stocked(store: Store) -> Store:
    """A store that knows MODEL and TASK."""
    store.models.put(MODEL)
    store.tasks.put(TASK)
    return store


@pytest.fixture
def make_profile() -> Callable[..., Profile]:
    def make(**changes: Any) -> Profile:
        rng = np.random.default_rng(1)
        fields: dict[str, Any] = {
            "id": "p1",
            "model": MODEL.fingerprint,
            "task": TASK.name,
            "statistics": {"gate": rng.random((2, 4)), "count": rng.integers(0, 2**40, (2, 4))},
            "tokens": 5_000_000_000,
            "calibration_hash": "a" * 64,
            "calibration_items": frozenset({"b" * 64, "c" * 64}),
            "scorers": {"gate": "1", "peu": "3"},
            "created": datetime(2025, 5, 1, 12, 30, 0, 123456, tzinfo=UTC),
            "trust": Trust(12.5, 0.25, 9.0, 1.5, None, ("Too little text.", "Too much of one kind.")),
        }
        return Profile(**{**fields, **changes})

    return make


@pytest.fixture
def make_selection() -> Callable[..., StoredSelection]:
    def make(**changes: Any) -> StoredSelection:
        fields: dict[str, Any] = {
            "id": "s1",
            "profile": "p1",
            "scorer": "gate",
            "allocator": "uniform",
            "keep": 0.5,
            "selection": Selection.of([[0, 3], [1, 2]]),
        }
        return StoredSelection(**{**fields, **changes})

    return make


@pytest.fixture
def make_evaluation() -> Callable[..., Evaluation]:
    def make(**changes: Any) -> Evaluation:
        fields: dict[str, Any] = {
            "selection": "s1",
            "evaluation_hash": "e" * 64,
            "items": 100,
            "accuracy": 0.9,
            "full_accuracy": 0.95,
            "nll": 0.25,
            "coverage": 0.8,
        }
        return Evaluation(**{**fields, **changes})

    return make


@pytest.fixture
def make_exemplars() -> Callable[..., list[Exemplar]]:
    """Random unit vectors with texts that say which they are."""

    def make(task: str, count: int, width: int = 8, embedder: str = "hash", seed: int = 0) -> list[Exemplar]:
        vectors = np.random.default_rng([seed, *task.encode()]).normal(size=(count, width))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return [Exemplar(task, f"{task} {i}", vector, embedder) for i, vector in enumerate(vectors.astype(np.float32))]

    return make
