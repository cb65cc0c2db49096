"""A pass from the embeddings to the logits without the model's own forward around its layers.

That forward makes a mask, looks settings up and wraps what it returns: nothing that a batch of single tokens or a short
prompt needs, but as long as the layers take of a small model. Where every decoder layer is two calls of
engine.products, and the model was tried and does nothing else around them, its parts are called one after the other
here. B rows, S new tokens of each, C columns of the cache, H hidden, V vocabulary.
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
NEW = 3  # tokens of each, in the trial of many


class Step:
    """The model's parts and its layers' blocks. Holds no weights of its own."""

    def __init__(self, model: Any, blocks: Sequence[LayerBlock]) -> None:
        self._decoder = model.get_decoder()
        self._embed, self._output = model.get_input_embeddings(), model.get_output_embeddings()
        self._norm, self._rotary = self._decoder.norm, self._decoder.rotary_emb
        self._blocks = blocks
        self._narrowest = min(blocks, key=lambda block: block.few)  # what single tokens it takes, all do
        self._many = all(block.wide is not None for block in blocks)  # and many of a row

    @classmethod
    def of(cls, model: Any, blocks: Sequence[LayerBlock], context: int) -> Step | None:
        """None where a layer is no block or the model does something else around them, up to `context` columns. Needs
        the weights, but for the experts'."""
        decoder = model.get_decoder()
        names = sorted(name for name, _ in decoder.named_children())
        if names != PARTS or [block.layer for block in blocks] != list(decoder.layers):
            return None
        step = cls(model, blocks)
        step._many = step._many and context > NEW and step._agrees(model, context, NEW)
        return step if step._agrees(model, context, 1) else None

    def takes(self, ids: Tensor, mask: Tensor, cache: KvCache) -> bool:
        """Whether a pass of `ids` [B, S] behind what `mask` i64 [B, C] says may go this way; nobody may be watching the
        decoder."""
        if self._decoder._forward_hooks:
            return False
        rows, new = ids.shape
        if new == 1:
            return rows <= self._narrowest.few and self._narrowest.takes(cache)
        return self._many and self._narrowest.takes_many(mask, cache)

    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: KvCache) -> Tensor:
        """`ids`, `positions` i64 [B, S], `mask` i64 [B, C] -> logits [B, V]; `cache` grows by S columns."""
        x = self._embed(ids)  # [B, S, H]
        new = ids.shape[1]
        turned, shown = self._rotary(x, positions), _shown(mask, new)
        for block in self._blocks:
            layer = block.single if new == 1 else block.many
            x = layer(x, past_key_values=cache, position_embeddings=turned, attention_mask=shown)
        return self._logits(x)[:, -1]

    def _logits(self, x: Tensor) -> Tensor:
        """Of the last column: `x` [B, S, H] -> [B, 1, V]"""
        logits: Tensor = self._output(self._norm(x)[:, -1:])
        return logits

    def _agrees(self, model: Any, context: int, new: int) -> bool:
        """Whether the model hands its layers what we do, to the bit, and makes the same of what they return, for `new`
        tokens a row. The cache is as long as it may get, so that a window or a chunk of attention shows."""
        ids = torch.arange(1, 1 + ROWS * new).view(ROWS, new)
        positions = torch.tensor([[5], [3]]) + torch.arange(new)
        mask = torch.ones(ROWS, context, dtype=torch.long)
        mask[1, : context // 2] = 0
        heard: list[tuple[Tensor, dict[str, Any]]] = []
        with torch.inference_mode(), _replaced(self._blocks, heard):
            try:
                theirs = model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=_long_cache(len(self._blocks), context - new, new),
                    use_cache=True,
                    logits_to_keep=1,
                ).logits
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
                return False
            x = self._embed(ids)
            turned = self._rotary(x, positions)
            for given, named in heard:
                if not (given.equal(x) and _same(named, turned, _shown(mask, new))):
                    return False
                x = _stub(given)
            return len(heard) == len(self._blocks) and theirs.equal(self._logits(x))


def _shown(mask: Tensor, new: int) -> Tensor:
    """`mask` i64 [B, C] as attention takes it: bool [B, 1, S, C], of which a token sees what comes before it."""
    shown = mask.bool()[:, None, None]  # [B, 1, 1, C]
    if new == 1:
        return shown
    columns = mask.shape[1]
    return shown & torch.ones(new, columns, dtype=torch.bool, device=mask.device).tril(columns - new)


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


def _long_cache(layers: int, columns: int, new: int) -> KvCache:
    """One that says it is `columns` long, without their memory: nobody reads it."""
    nothing = torch.zeros(1).expand(ROWS, 1, columns + new, 1)
    cache = KvCache([PooledLayer(nothing, nothing, 0, ROWS) for _ in range(layers)])
    cache.rewind(columns)
    return cache
