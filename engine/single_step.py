"""A pass of single tokens from the embeddings to the logits, without the model's own forward around its layers.

That forward makes a mask, looks settings up and wraps what it returns: nothing that a batch of single tokens needs, but
as long as the layers take of a small model. Where every decoder layer is two calls of engine.products, and the model
was tried and does nothing else around them, its parts are called one after the other here. B rows, S columns of the
cache, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from engine.kvcache import KvCache, PooledLayer
from engine.layer_block import LayerBlock, forward_of

PARTS = ["embed_tokens", "layers", "norm", "rotary_emb"]  # of a decoder that does the usual
ROWS = 2  # of a trial


class SingleStep:
    """The model's parts and its layers' blocks. Holds no weights of its own."""

    def __init__(self, model: Any, blocks: Sequence[LayerBlock]) -> None:
        self._decoder = model.get_decoder()
        self._embed, self._output = model.get_input_embeddings(), model.get_output_embeddings()
        self._norm, self._rotary = self._decoder.norm, self._decoder.rotary_emb
        self._blocks = blocks
        self._narrowest = min(blocks, key=lambda block: block.few)  # what it takes, all do

    @classmethod
    def of(cls, model: Any, blocks: Sequence[LayerBlock], context: int) -> SingleStep | None:
        """None where a layer is no block or the model does something else around them, up to `context` columns. Needs
        the weights, but for the experts'."""
        decoder = model.get_decoder()
        names = sorted(name for name, _ in decoder.named_children())
        if names != PARTS or [block.layer for block in blocks] != list(decoder.layers):
            return None
        step = cls(model, blocks)
        return step if step._agrees(model, context) else None

    def takes(self, ids: Tensor, cache: KvCache) -> bool:
        """Whether a pass of `ids` [B, new] may go this way; nobody may be watching the decoder."""
        if ids.shape[1] != 1 or self._decoder._forward_hooks:
            return False
        return self._narrowest.takes(ids.shape[0], cache)

    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: KvCache) -> Tensor:
        """`ids`, `positions` i64 [B, 1], `mask` i64 [B, S] -> logits [B, V]; `cache` grows by a column."""
        x = self._embed(ids)  # [B, 1, H]
        turned, shown = self._rotary(x, positions), _shown(mask)
        for block in self._blocks:
            x = block.single(x, past_key_values=cache, position_embeddings=turned, attention_mask=shown)
        return self._logits(x)[:, -1]

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self._output(self._norm(x))
        return logits

    def _agrees(self, model: Any, context: int) -> bool:
        """Whether the model hands its layers what we do, to the bit, and makes the same of what they return. The cache
        is as long as it may get, so that a window or a chunk of attention shows."""
        ids, positions = torch.tensor([[1], [2]]), torch.tensor([[5], [3]])
        mask = torch.ones(ROWS, context, dtype=torch.long)
        mask[1, : context // 2] = 0
        heard: list[tuple[Tensor, dict[str, Any]]] = []
        with torch.inference_mode(), _replaced(self._blocks, heard):
            try:
                theirs = model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=_long_cache(len(self._blocks), context - 1),
                    use_cache=True,
                    logits_to_keep=1,
                ).logits
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
                return False
            x = self._embed(ids)
            turned = self._rotary(x, positions)
            for given, named in heard:
                if not (given.equal(x) and _same(named, turned, _shown(mask))):
                    return False
                x = _stub(given)
            return len(heard) == len(self._blocks) and theirs.equal(self._logits(x))


def _shown(mask: Tensor) -> Tensor:
    """`mask` i64 [B, S] as attention takes it: bool [B, 1, 1, S]."""
    return mask.bool()[:, None, None]


def _same(named: dict[str, Any], turned: tuple[Tensor, Tensor], shown: Tensor) -> bool:
    positions, mask = named.get("position_embeddings"), named.get("attention_mask")
    if not isinstance(positions, tuple) or not isinstance(mask, Tensor):
        return False
    return mask.equal(shown) and all(ours.equal(one) for ours, one in zip(turned, positions, strict=True))


def _stub(x: Tensor) -> Tensor:
    """In place of a layer: something that shows the order of layers."""
    return x.roll(1, -1) * 2


@contextmanager
def _replaced(blocks: Sequence[LayerBlock], heard: list[tuple[Tensor, dict[str, Any]]]) -> Iterator[None]:
    """While this is open each layer is a stub that keeps what it was handed."""

    def stub(hidden_states: Tensor, *_: Any, **named: Any) -> Tensor:
        heard.append((hidden_states, named))
        return _stub(hidden_states)

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(forward_of(block.layer, stub))
        yield


def _long_cache(layers: int, columns: int) -> KvCache:
    """One that says it is `columns` long, without their memory: nobody reads it."""
    nothing = torch.zeros(1).expand(ROWS, 1, columns + 1, 1)
    cache = KvCache([PooledLayer(nothing, nothing, 0, ROWS) for _ in range(layers)])
    cache.rewind(columns)
    return cache
