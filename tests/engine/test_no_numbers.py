"""One expert of NaN: the request that goes through it ends with an error, and nobody else notices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.engine import Engine
from engine.generate import Batch
from engine.requests import FailedEvent, FinishedEvent, GenerationRequest, Sampling, Submission
from engine.tiny import write_tiny
from store.errors import CheckpointError
from store.records import Selection

BROKEN = 5  # an expert of MoE layer 1
PROMPT = tuple(range(40, 80))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_tiny("mixtral", tmp_path_factory.mktemp("broken"), seed=3)
    weights = load_file(made / "model.safetensors")
    [name] = [name for name in weights if f"layers.1.block_sparse_moe.experts.{BROKEN}.w2" in name]
    weights[name][0, 0] = torch.nan
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    return made


def _ask(selection: Selection | None, prompt: tuple[int, ...] = PROMPT, tokens: int = 6) -> GenerationRequest:
    sampling = Sampling(max_tokens=tokens, min_tokens=tokens, prompt_logprobs=not tokens, logprobs=0)
    return GenerationRequest(prompt, selection, "exact" if selection is None else "mask", sampling)


def _without(engine: Engine) -> Selection:
    kept = [expert for expert in range(engine.card.experts) if expert != BROKEN]
    return Selection.of([kept] * engine.card.layers)


def _run(engine: Engine, requests: list[GenerationRequest]) -> dict[int, FinishedEvent | FailedEvent]:
    ended: dict[int, FinishedEvent | FailedEvent] = {}
    with Batch(engine) as batch:
        for number, request in enumerate(requests):
            batch.admit(number, request, Submission(0.0, engine.admission.predict(request)))
        while len(batch):
            ended |= {e.row: e for e in batch.step() if isinstance(e, FinishedEvent | FailedEvent)}
    return ended


@pytest.mark.parametrize("tokens", [6, 0])
def test_a_request_that_meets_no_numbers_fails_and_its_neighbours_do_not(folder: Path, tokens: int) -> None:
    with Engine.open(EngineConfig(folder, max_context=64, max_batch=4)) as engine:
        masked = _ask(_without(engine))
        [alone] = [event for event in engine.generate([masked]) if isinstance(event, FinishedEvent)]
        ended = _run(engine, [masked, _ask(None, tokens=tokens), masked])
        failed = ended[1]
        assert isinstance(failed, FailedEvent)
        assert isinstance(failed.error, CheckpointError)
        assert "not finite (NaN or infinity) after 0 tokens" in str(failed.error)
        for row in (0, 2):
            event = ended[row]
            assert isinstance(event, FinishedEvent)
            assert event.text == alone.text
        # What is left of it in the cache does not reach those that come after, padded over the same columns.
        for prompt in (PROMPT, PROMPT[:5]):
            [after] = [e for e in engine.generate([_ask(_without(engine), prompt)]) if isinstance(e, FinishedEvent)]
            with Engine.open(EngineConfig(folder, max_context=64, max_batch=4)) as fresh:
                again = fresh.generate([_ask(_without(fresh), prompt)])
                [first] = [event for event in again if isinstance(event, FinishedEvent)]
            assert after.text == first.text
