"""BERT, as sentence-transformers loads it, in few operations a layer: for the embedder, whose queries are a few tokens.

A short query is 3 ms of arithmetic, and nearly twice that in modules, masks and a pooler that nobody asks for. Loading,
tokens, pooling and normalising stay the library's. Whether this gives what the library does is not known here: a use
of it is compared before it is used (engine.embedder).

T tokens, H hidden, A heads of width D = H / A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, layer_norm, scaled_dot_product_attention

from engine.packed_linear import Packed

TOGETHER = 512  # tokens of several texts that go through at once: enough for products to be at full speed
Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class BertLayer:
    """Weights of one layer, and the names of its steps."""

    heads: int
    query_key_value: Packed
    mixed: Packed
    mixed_norm: Norm
    inner: Packed
    outer: Packed
    outer_norm: Norm

    @classmethod
    def of(cls, layer: Any) -> BertLayer:
        """Of a module of transformers. Raises AttributeError where that has other parts."""
        attention, parts = layer.attention.self, layer.attention.output
        three = (attention.query, attention.key, attention.value)
        together = Packed(torch.cat([one.weight for one in three]), torch.cat([one.bias for one in three]))
        return cls(
            attention.num_attention_heads,
            together,
            Packed(parts.dense.weight, parts.dense.bias),
            _norm(parts.LayerNorm),
            Packed(layer.intermediate.dense.weight, layer.intermediate.dense.bias),
            Packed(layer.output.dense.weight, layer.output.dense.bias),
            _norm(layer.output.LayerNorm),
        )

    def __call__(self, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        """[T, H] -> [T, H]; `lengths` of the texts in it, one after the other."""
        tokens, width = hidden.shape
        parts = self.query_key_value.of(hidden).view(tokens, 3, self.heads, width // self.heads)
        heads = torch.cat([_attention(text) for text in parts.split_with_sizes(lengths)])
        hidden = self.mixed_norm(self.mixed.added_to(hidden, heads))
        return self.outer_norm(self.outer.added_to(hidden, self.inner.gelu_of(hidden)))


def _attention(parts: Tensor) -> Tensor:
    """Queries, keys and values [T, 3, A, D] of one text, each token of which sees all -> [T, H]."""
    query, key, value = parts[None].permute(2, 0, 3, 1, 4).unbind()  # [1, A, T, D] each
    heads = scaled_dot_product_attention(query, key, value)
    return heads[0].transpose(0, 1).flatten(1)


@dataclass(frozen=True, slots=True)
class Bert:
    """A BERT without padding, masks or a second segment: texts lie one after the other."""

    words: Tensor  # [vocabulary, H]
    places: Tensor  # [positions, H], the first segment's vector in each
    norm: Norm
    layers: tuple[BertLayer, ...]

    @classmethod
    def of(cls, model: Any) -> Bert:
        """Of transformers' model, float32 on the CPU. Raises AttributeError where that has other parts."""
        embeddings = model.embeddings
        places = embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]
        layers = tuple(BertLayer.of(layer) for layer in model.encoder.layer)
        return cls(embeddings.word_embeddings.weight.detach(), places.detach(), _norm(embeddings.LayerNorm), layers)

    def __call__(self, texts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The last hidden states [T, H] of each text, given as ids i64 [T]."""
        lengths = [len(ids) for ids in texts]
        places = torch.cat([self.places[:length] for length in lengths])
        hidden = self.norm(embedding(torch.cat(list(texts)), self.words) + places)
        for layer in self.layers:
            hidden = layer(hidden, lengths)
        return hidden.split_with_sizes(lengths)


class QuickSentences:
    """A sentence-transformers model whose first part is a BERT; the rest of it as it is."""

    def __init__(self, model: Any) -> None:
        """Raises AttributeError where its parts have other names."""
        self._model = model
        first, *self._rest = model.children()
        self._bert = Bert.of(first.auto_model)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Their vectors f32 [n, d], as long as the model makes them."""
        features = [self._model.preprocess([text]) for text in texts]
        vectors: list[Tensor] = []
        for some in _in_groups(features):
            hidden = self._bert([one["input_ids"][0] for one in some])
            vectors += [self._pooled({**one, "token_embeddings": h[None]}) for one, h in zip(some, hidden, strict=True)]
        return torch.cat(vectors)

    def _pooled(self, features: dict[str, Any]) -> Tensor:
        for part in self._rest:
            features = part(features)
        vector: Tensor = features["sentence_embedding"]
        return vector

    def forget_modules(self) -> None:
        """Frees the layers as the library holds them: the model can only be used from here on."""
        first, *_ = self._model.children()
        first.auto_model.encoder = nn.Identity()


def _in_groups(texts: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """In their order, so many that their tokens are `TOGETHER` at most; a longer text alone."""
    group: list[dict[str, Any]] = []
    tokens = 0
    for text in texts:
        length = text["input_ids"].shape[1]
        if group and tokens + length > TOGETHER:
            yield group
            group, tokens = [], 0
        group.append(text)
        tokens += length
    yield group


def _norm(module: nn.LayerNorm) -> Norm:
    shape, weight, bias, eps = module.normalized_shape, module.weight.detach(), module.bias.detach(), module.eps
    return lambda rows: layer_norm(rows, shape, weight, bias, eps)
