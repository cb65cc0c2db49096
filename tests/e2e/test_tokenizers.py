"""A tokenizer that is another model's: as many tokens, in another order. Every id is in range, every answer rubbish."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from demo.prepare import corpus
from engine.config import EngineConfig
from engine.embedder import HashEmbedder
from engine.engine import Engine
from profiler.job import profile_task
from profiler.options import Options
from store.database import open_store
from store.records import TaskRecord, Trust


def test_a_tokenizer_of_as_many_tokens_in_another_order_is_doubted(model: Path, tmp_path: Path) -> None:
    right = _judged(model, tmp_path / "right")
    assert right.surprise is not None
    assert right.surprise < -3
    assert not any("tokenizer" in doubt for doubt in right.doubts)
    wrong = _judged(_shuffled(model, tmp_path / "model"), tmp_path / "wrong")
    assert wrong.surprise is not None
    assert wrong.surprise > 0
    assert any("the tokenizer belongs to another model" in doubt for doubt in wrong.doubts)


def _judged(model: Path, folder: Path) -> Trust:
    options = Options(scorers=["gate"], keeps=(0.25,), runs=folder)
    with (
        open_store(f"sqlite:///{folder}.db") as store,
        Engine.open(EngineConfig(model, max_batch=16, max_context=256)) as engine,
    ):
        task, text = TaskRecord("sql"), corpus("sql", "calibration", 32)
        found = profile_task(engine, store, task, text, None, embedder=HashEmbedder(), options=options).trust
    assert found is not None
    return found


def _shuffled(model: Path, target: Path) -> Path:
    shutil.copytree(model, target)
    made = json.loads((target / "tokenizer.json").read_text())
    vocab, special = made["model"]["vocab"], {one["content"] for one in made["added_tokens"]}
    names = [name for name in vocab if name not in special]
    ids = [vocab[name] for name in names]
    random.Random(7).shuffle(ids)
    vocab.update(zip(names, ids, strict=True))
    (target / "tokenizer.json").write_text(json.dumps(made))
    return target
