"""Items as tokens, and tokens as padded batches. Owns what counts as prompt and what as response.

B rows, S length of the longest row; rows are padded on the right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.engine import Engine
from profiler.corpus import Corpus, Item
from profiler.statistics import PROMPT, RESPONSE
from store.errors import InvalidInput, MismatchError

LOGITS_BYTES = 256 << 20  # a forward gives f32 [B, S, V]: a large vocabulary decides how many rows go together


@dataclass(frozen=True, slots=True)
class Encoded:
    """An item's tokens. `number` is its place in the corpus, whatever order it is run in."""

    item: Item
    number: int
    prompt: tuple[int, ...]
    response: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.response


@dataclass(frozen=True, slots=True)
class Batch:
    ids: Tensor  # i64 [B, S]
    mask: Tensor  # i64 [B, S]
    roles: Tensor  # i64 [B, S]
    halves: Tensor  # i64 [B]


def encode_corpus(engine: Engine, corpus: Corpus) -> list[Encoded]:
    """Every item's tokens, shortest first: batches waste little. Raises InvalidInput for one that is too long."""
    encoded = [_encode(engine, corpus, number, item) for number, item in enumerate(corpus.items)]
    return sorted(encoded, key=lambda one: (len(one.tokens), one.number))


def shards(encoded: Sequence[Encoded], rows: int, tokens: int) -> Iterator[list[Encoded]]:
    """At most `rows` items and `tokens` padded tokens each; a longer item goes alone."""
    shard: list[Encoded] = []
    width = 0
    for one in encoded:
        width = max(width, len(one.tokens))
        if shard and (len(shard) == rows or (len(shard) + 1) * width > tokens):
            yield shard
            shard, width = [], len(one.tokens)
        shard.append(one)
    if shard:
        yield shard


def cut(engine: Engine, text: Sequence[Encoded], rows: int) -> list[list[Encoded]]:
    """The text in shards that the engine can run; the same engine cuts alike every time."""
    return list(shards(text, min(rows, engine.plan.max_batch), token_limit(engine)))


def token_limit(engine: Engine) -> int:
    """How many tokens one forward may hold: what the memory plan foresees, and logits of a bearable size."""
    return max(1, min(engine.plan.chunk_tokens, LOGITS_BYTES // (4 * engine.card.vocab)))


def item_limit(engine: Engine) -> int:
    """How many tokens one item may have, prompt and response together: it goes through in one piece."""
    return min(engine.plan.max_context, engine.plan.chunk_tokens)


def pad(shard: Sequence[Encoded]) -> Batch:
    length = max(len(one.tokens) for one in shard)
    ids = torch.zeros(len(shard), length, dtype=torch.long)  # [B, S]
    mask = torch.zeros_like(ids)
    roles = torch.full_like(ids, PROMPT)
    for row, one in enumerate(shard):
        ids[row, : len(one.tokens)] = torch.tensor(one.tokens)
        mask[row, : len(one.tokens)] = 1
        roles[row, len(one.prompt) : len(one.tokens)] = RESPONSE
    return Batch(ids, mask, roles, torch.tensor([one.number % 2 for one in shard]))


def _encode(engine: Engine, corpus: Corpus, number: int, item: Item) -> Encoded:
    prompt = _encode_prompt(engine, item)
    response = engine.tokenizer.encode(item.response, special_tokens=False) if item.response is not None else ()
    _check_vocabulary(engine, (*prompt, *response))
    limit, known = item_limit(engine), engine.card.max_context
    if len(prompt) + len(response) > limit:
        more = ", or raise --max-context (an engine's max_context and chunk_tokens)" if limit < known else ""
        raise InvalidInput(
            f"{corpus.source}, line {item.line}: {len(prompt) + len(response)} tokens, the limit is {limit}"
            f"{'' if more else ', all that the model knows'}. Shorten the item{more}."
        )
    return Encoded(item, number, prompt, response)


def _check_vocabulary(engine: Engine, tokens: Sequence[int]) -> None:
    if max(tokens, default=0) >= engine.card.vocab:
        raise MismatchError(
            f"The tokenizer of {engine.card.folder} gives token {max(tokens)}, and the model knows {engine.card.vocab} "
            "tokens: the tokenizer belongs to another model. Put the tokenizer files there that came with the weights."
        )


def _encode_prompt(engine: Engine, item: Item) -> tuple[int, ...]:
    """As the service would: in the chat template, or, for a model without one, the plain texts one below the other."""
    if engine.tokenizer.has_chat_template:
        return engine.tokenizer.encode_chat([message._asdict() for message in item.messages])
    return engine.tokenizer.encode("\n".join(message.content for message in item.messages))
