"""Every option of sampling against a slow plain reference, on random logits."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from engine.requests import Sampling, Score
from engine.sampling import Sampler, scores_of
from store.errors import InvalidInput

VOCAB, ENDS = 24, frozenset({3, 7})


def _adjusted(logits: list[float], s: Sampling, prompt: list[int], said: list[int]) -> list[float]:
    """The module's order, one token at a time."""
    out = list(logits)
    if len(said) < s.min_tokens:
        out = [-math.inf if token in ENDS | s.stop_tokens else value for token, value in enumerate(out)]
    for token, bias in s.bias:
        out[token] += bias
    for token in range(VOCAB):
        if token in prompt or token in said:
            out[token] = out[token] / s.repetition_penalty if out[token] > 0 else out[token] * s.repetition_penalty
        if token in said:
            out[token] -= s.frequency_penalty * said.count(token) + s.presence_penalty
    return out


def _kept(logits: list[float], s: Sampling) -> list[tuple[int, float]]:
    """Tokens with their probabilities, likeliest first, after temperature, min_p, top_k and top_p."""
    exponents = [math.exp((value - max(logits)) / s.temperature) for value in logits]
    found = [(token, value / sum(exponents)) for token, value in enumerate(exponents)]
    found.sort(key=lambda pair: -pair[1])
    found = [pair for pair in found if pair[1] >= s.min_p * found[0][1] and pair[1] > 0]
    found = found[: s.top_k] if s.top_k else found
    total, kept, before = sum(p for _, p in found), [], 0.0
    for token, probability in found:
        if before >= s.top_p:
            break
        kept.append((token, probability / total))
        before += probability / total
    return kept


def _drawn(kept: list[tuple[int, float]], point: float) -> int:
    point *= sum(p for _, p in kept)
    for token, probability in kept:
        point -= probability
        if point < 0:
            return token
    return kept[-1][0]


def _options(rng: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.3, 1.0, 2.0]),
        "top_p": rng.choice([1.0, 0.9, 0.5, 1e-6]),
        "top_k": rng.choice([0, 1, 3, 10, 1000]),
        "min_p": rng.choice([0.0, 0.05, 0.5, 1.0]),
        "min_tokens": rng.choice([0, 4]),
        "presence_penalty": rng.choice([0.0, 1.5, -1.0]),
        "frequency_penalty": rng.choice([0.0, 0.7, -0.4]),
        "repetition_penalty": rng.choice([1.0, 1.3, 0.8]),
        "bias": tuple((rng.randrange(VOCAB), rng.uniform(-5, 5)) for _ in range(rng.choice([0, 2]))),
        "stop_tokens": frozenset(rng.sample(range(VOCAB), rng.choice([0, 1]))),
    }
    return dict(rng.sample(sorted(found.items()), rng.randint(0, len(found))))


@pytest.mark.parametrize("seed", range(60))
def test_any_mixture_of_options_chooses_as_the_plain_reference_does(seed: int) -> None:
    rng = random.Random(seed)
    sampling = Sampling(max_tokens=20, seed=seed, **_options(rng))
    prompt, said = [rng.randrange(VOCAB) for _ in range(5)], list[int]()
    sampler = Sampler(sampling, prompt, ENDS)
    points = torch.Generator()
    points.manual_seed(seed)
    for _ in range(12):
        logits = torch.tensor([rng.gauss(0, 3) for _ in range(VOCAB)], dtype=torch.float32)
        adjusted = _adjusted(logits.tolist(), sampling, prompt, said)
        if sampling.temperature == 0:
            wanted = adjusted.index(max(adjusted))
        else:
            point = float(torch.rand((), dtype=torch.float64, generator=points))
            wanted = _drawn(_kept(adjusted, sampling), point)
        token, score = sampler.choose(logits, int(logits.argmax()))
        assert (token, score) == (wanted, None), sampling
        said.append(token)


def test_scores_are_log_probabilities_of_the_model_itself_and_sampling_does_not_touch_them() -> None:
    rng = random.Random(5)
    logits = [rng.gauss(0, 3) for _ in range(VOCAB)]
    total = math.log(sum(math.exp(value) for value in logits))
    ranked = sorted(range(VOCAB), key=lambda token: -logits[token])
    sampling = Sampling(temperature=1.5, top_k=5, bias=((ranked[0], -50.0),), logprobs=4, seed=1)
    token, score = Sampler(sampling).choose(torch.tensor(logits), ranked[0])
    assert token != ranked[0]
    assert score is not None
    assert score.logprob == pytest.approx(logits[token] - total, abs=1e-5)
    assert [place for place, _ in score.top] == ranked[:4]
    assert [value for _, value in score.top] == pytest.approx([logits[place] - total for place in ranked[:4]], abs=1e-5)


def test_scores_of_several_columns_are_those_of_each() -> None:
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(0))
    together = scores_of(logits, [1, 2, 3, 4, 5], 2)
    alone = [scores_of(logits[row : row + 1], [row + 1], 2)[0] for row in range(5)]
    assert [score.token for score in together] == [1, 2, 3, 4, 5]
    for one, other in zip(together, alone, strict=True):
        assert one.logprob == pytest.approx(other.logprob)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
    assert scores_of(logits[:1], [0], 0) == [Score(0, pytest.approx(float(logits[0].log_softmax(-1)[0])), ())]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt_logprobs": True}, "logprobs"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_options_out_of_range_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        Sampling(**fields)
    assert refused.value.param == param
