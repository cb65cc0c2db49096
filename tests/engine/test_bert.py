"""A BERT in few operations: what transformers' own modules give, and no other model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

from engine import embedder
from engine.bert import Bert, BertLayer, QuickSentences
from engine.embedder import PROBES, SentenceEmbedder

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")

TEXTS = ["one", "one two", "a rather long text of some words", " ".join(["many"] * 40)]


class FirstPart(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.auto_model = model


class MeanOfTokens(nn.Module):
    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        shown = features["attention_mask"][..., None]  # [n, T, 1]
        return {**features, "sentence_embedding": (features["token_embeddings"] * shown).sum(1) / shown.sum(1)}


class Library(nn.Sequential):
    """What sentence-transformers gives of a model; a token is a word's length."""

    def preprocess(self, texts: list[str]) -> dict[str, Any]:
        rows = [[1, *(1 + len(word) for word in text.split()), 2] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    @torch.inference_mode()
    def encode(self, texts: list[str], **_: object) -> np.ndarray[Any, Any]:
        features = self.preprocess(texts)
        features["token_embeddings"] = self[0].auto_model(**features).last_hidden_state
        vectors: Tensor = self[1](features)["sentence_embedding"]
        return torch.nn.functional.normalize(vectors).numpy()


def tiny_bert(**changes: Any) -> BertModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**{**sizes, "intermediate_size": 48, "max_position_embeddings": 64, **changes})
    model = BertModel(config).eval()
    for name, weights in model.named_parameters():  # they are born so small that a wrong activation hardly shows
        if "weight" in name and weights.dim() == 2:
            nn.init.normal_(weights, std=0.3)
        if "bias" in name:
            nn.init.normal_(weights, std=0.1)
    return model


def library_of(model: nn.Module) -> Library:
    return Library(FirstPart(model), MeanOfTokens())


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def open_(model: nn.Module) -> SentenceEmbedder:
        monkeypatch.setattr(embedder, "_load_sentence_model", lambda _: library_of(model))
        return SentenceEmbedder("tiny")

    return open_


@pytest.mark.parametrize("tokens", [1, 2, 13, 64])
def test_hidden_states_are_those_of_the_modules(tokens: int) -> None:
    model = tiny_bert()
    ids = torch.randint(64, (tokens,))
    with torch.inference_mode():
        wanted = model(ids[None]).last_hidden_state[0]
        [found] = Bert.of(model)([ids])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_vectors_are_those_of_the_library_and_come_from_the_few_operations(opened: Any) -> None:
    found = opened(tiny_bert())
    wanted = library_of(tiny_bert()).encode(TEXTS)
    assert isinstance(found._quick, QuickSentences)
    np.testing.assert_allclose(found.embed(TEXTS), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("together", [4, 14, 512])
def test_a_texts_vector_does_not_hang_on_the_texts_beside_it(
    opened: Any, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    monkeypatch.setattr("engine.bert.TOGETHER", together)
    found = opened(tiny_bert())
    rows = found.embed(TEXTS)
    for row, text in enumerate(TEXTS):
        np.testing.assert_allclose(found.embed([text])[0], rows[row], rtol=0, atol=1e-6)
    assert found.embed([]).shape == (0, 32)


def test_the_layers_are_held_once(opened: Any) -> None:
    model = tiny_bert()
    opened(model)
    assert not list(model.encoder.parameters())


@pytest.mark.parametrize("changes", [{"hidden_act": "relu"}, {"hidden_act": "gelu_new"}, {"is_decoder": True}])
def test_a_bert_that_does_something_else_is_served_by_the_library(opened: Any, changes: dict[str, Any]) -> None:
    found = opened(tiny_bert(**changes))
    assert found._quick is None
    np.testing.assert_allclose(found.embed(TEXTS), library_of(tiny_bert(**changes)).encode(TEXTS), rtol=0, atol=1e-5)


def test_a_model_of_other_parts_is_served_by_the_library(opened: Any) -> None:
    torch.manual_seed(0)
    model = DistilBertModel(DistilBertConfig(vocab_size=64, dim=32, n_layers=1, n_heads=4, hidden_dim=48)).eval()
    wanted = library_of(model).encode(TEXTS)
    found = opened(model)
    assert found._quick is None
    np.testing.assert_allclose(found.embed(TEXTS), wanted, rtol=0, atol=1e-5)


def test_operations_that_give_something_else_are_not_used(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = BertLayer.__call__
    monkeypatch.setattr(BertLayer, "__call__", lambda layer, hidden, n: right(layer, hidden, n) + 0.01 * hidden)
    found = opened(tiny_bert())
    assert found._quick is None
    np.testing.assert_allclose(found.embed(list(PROBES)), library_of(tiny_bert()).encode(list(PROBES)), atol=1e-5)
