"""How likely the model finds its text: against odds worked out one token at a time, and what that gives to doubt."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.engine import Engine
from engine.tiny import write_tiny
from profiler.batches import Batch, encode_corpus
from profiler.corpus import Item, gather
from profiler.gather import gather_statistics
from profiler.hearing import hear
from profiler.progress import ignore
from profiler.run import Run
from profiler.statistics import PROMPT, RESPONSE
from profiler.stream import stream_statistics
from store.errors import CheckpointError

CORPUS = gather([Item(f"number {n} " + "and more " * (n % 4), "yes") for n in range(7)])


def batch_of(roles: list[list[int]], lengths: list[int], seed: int) -> tuple[torch.Tensor, Batch]:
    draw = torch.Generator().manual_seed(seed)
    shape = (len(roles), max(lengths))
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(0, 11, shape, generator=draw)
    halves = torch.arange(len(roles)) % 2
    return torch.randn(*shape, 11, generator=draw), Batch(ids, mask, torch.tensor(roles), halves)


def plainly(logits: torch.Tensor, batch: Batch) -> np.ndarray:
    found = np.zeros((2, 2))
    for row in range(len(logits)):
        length = int(batch.mask[row].sum())
        answered = RESPONSE in batch.roles[row, 1:length]
        for place in range(1, length):
            if not answered or int(batch.roles[row, place]) == RESPONSE:
                odds = logits[row, place - 1].double().softmax(-1)[int(batch.ids[row, place])]
                found[int(batch.halves[row])] += (1, -math.log(float(odds)) - math.log(11))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_of_a_response_where_there_is_one_and_of_all_tokens_else(seed):
    roles = [[PROMPT] * 3 + [RESPONSE] * 3, [PROMPT] * 6, [PROMPT, RESPONSE, RESPONSE, RESPONSE, PROMPT, PROMPT]]
    logits, batch = batch_of(roles, [6, 5, 4], seed)
    asked: list[int] = []
    heard = hear(lambda states: asked.append(len(states)) or states, 4, logits, batch)  # states that are logits
    np.testing.assert_allclose(heard, plainly(logits, batch), rtol=1e-5)
    assert heard[:, 0].tolist() == [3 + 3, 4]
    assert asked == [4, 4, 2]  # nothing else was asked, and never more at once


@pytest.mark.parametrize("stream", [False, True])
def test_logits_are_never_there_of_more_columns_than_the_plan_has_room_for(stream, tmp_path):
    """Of a whole shard they were what the streaming pass peaked at."""
    folder = write_tiny("olmoe", tmp_path / "m", seed=3)
    with Engine.open(EngineConfig(folder, memory=1 << 40, max_context=128, max_batch=4)) as engine:
        text, columns = encode_corpus(engine, CORPUS), []
        output = engine.passes._model.get_output_embeddings()
        output.register_forward_hook(lambda _, args, __: columns.append(args[0].numel() // args[0].shape[-1]))
        run = stream_statistics if stream else gather_statistics
        run(engine, text, Run(tmp_path, "p", ""), "t", 4, ignore)
    assert max(columns) == 4  # max_batch
    assert sum(columns) < sum(len(one.tokens) for one in text)


def test_both_passes_hear_the_whole_text_alike(tmp_path):
    folder = write_tiny("qwen2_moe", tmp_path / "m", seed=3)
    with Engine.open(EngineConfig(folder, max_context=128, max_batch=4)) as engine:
        text = encode_corpus(engine, CORPUS)
        whole = gather_statistics(engine, text, Run(tmp_path / "w", "p", ""), "t", 3, ignore)
        streamed = stream_statistics(engine, text, Run(tmp_path / "s", "p", ""), "t", 3, ignore)
    assert whole.total("heard")[0] == sum(len(one.response) for one in text)
    np.testing.assert_allclose(streamed.heard, whole.heard, rtol=1e-4)


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("stream", [False, True])
def test_weights_outside_the_experts_that_are_no_numbers_are_refused_by_both_passes(name, stream, tmp_path):
    folder = write_tiny("mixtral", tmp_path / "m", seed=3)
    weights = load_file(folder / "model.safetensors")
    weights[name][3] = torch.nan  # of the embeddings the row of a token that hardly any text has: a head is read whole
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    run = stream_statistics if stream else gather_statistics
    with Engine.open(EngineConfig(folder, max_context=128, max_batch=8)) as engine:
        text = encode_corpus(engine, CORPUS)
        if name == "model.embed_tokens.weight":  # token 3 is in no text, so nothing is wrong with what is summed up
            assert all(3 not in one.tokens for one in text)
            assert np.isfinite(run(engine, text, Run(tmp_path, "p", ""), "t", 4, ignore).total("norms")).all()
            return
        with pytest.raises(CheckpointError, match=r"logits are not finite .* Check the checkpoint's weights"):
            run(engine, text, Run(tmp_path, "p", ""), "t", 4, ignore)
