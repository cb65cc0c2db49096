"""Router signatures of whole lists of texts, for comparing PreMoe's own retrieval with a sentence embedding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.retrieve import Vectorise
from engine.config import EngineConfig
from engine.engine import Engine
from engine.signature import signature
from store.records import F32


@contextmanager
def signatures(model: Path) -> Iterator[Vectorise]:
    """A function from texts to f32 [n, E]. Texts longer than the context are cut, as a prompt would have to be."""
    with Engine.open(EngineConfig(model, max_batch=1)) as engine:
        limit = min(engine.plan.max_context, engine.plan.chunk_tokens) - 1

        def vectorise(texts: Sequence[str]) -> F32:
            prompts = [engine.tokenizer.encode_chat([{"role": "user", "content": text}])[:limit] for text in texts]
            return np.stack([signature(engine, prompt) for prompt in prompts])  # [n, E]

        yield vectorise
