"""The most memory that a pass of a model holds at once, counted on shapes alone: no weights, no values, no time.

For layers whose working memory no formula of the plan knows, such as linear attention, which lays a prompt out in
chunks. Counted is what operations return; what one of them takes inside is not.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

LONG, SHORT = 512, 2  # tokens of the passes that are counted


class Working(NamedTuple):
    """Bytes for each token of a pass, and what a row takes however short it is: layers pad each to chunks of theirs."""

    token: int = 0
    row: int = 0


NOTHING = Working()


class Watermark(TorchDispatchMode):
    """While it is entered, `peak` is the most bytes that tensors made since then held at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._held = 0
        self._tensors: Counter[int] = Counter()  # of each memory, how many look into it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_memory(each) for each in tree_leaves((args, kwargs or {})) if isinstance(each, Tensor)}
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and (self._tensors[_memory(tensor)] or _memory(tensor) not in given):
                self._watch(tensor)
        return found

    def _watch(self, tensor: Tensor) -> None:
        memory, nbytes = _memory(tensor), tensor.untyped_storage().nbytes()
        if not self._tensors[memory]:
            self._held += nbytes
            self.peak = max(self.peak, self._held)
        self._tensors[memory] += 1
        weakref.finalize(tensor, self._gone, memory, nbytes)

    def _gone(self, memory: int, nbytes: int) -> None:
        self._tensors[memory] -= 1
        if not self._tensors[memory]:
            self._held -= nbytes


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def working_bytes(model: Any, kept: int) -> Working:
    """Of passes of `model`, which is on the meta device, besides `kept` bytes of a row's running states, which the plan
    counts by themselves."""
    long, short = (max(0, _peak(model, tokens) - kept) for tokens in (LONG, SHORT))
    return Working(long // LONG, short)


def _peak(model: Any, tokens: int) -> int:
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with torch.inference_mode(), Watermark() as watermark:
        cache = DynamicCache(config=model.config)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return int(watermark.peak)
