"""A decoder layer's whole attention of single tokens in one call of engine.products, where a module does the usual.

Between its first product and its last a module of transformers makes some thirty small operations: in decoding they
cost as much as a fifth of the weights' reading. The usual is: q, k and v, norms of them or none, rotary positions in
some manner, the cache, softmax attention, the output. Whether a module does just that, and in which manner heads turn,
is found out by trying it against its own forward; any other keeps its own.
B rows, A heads, N heads of the cache, S columns, D the width of a head, R its rotary numbers, H hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from engine.addresses import DTYPES
from engine.attention import IMPLEMENTATION, SINKS, close_enough
from engine.block_shape import HALVES_ONCE, BlockShape, Turn
from engine.kvcache import KvCache, PooledLayer
from engine.products import Products, shows_columns

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = (("q_norm", "k_norm"), ("query_layernorm", "key_layernorm"))
TAKEN = {"self", "hidden_states", "position_embeddings", "attention_mask", "past_key_values", "kwargs"}
MOVING = {"position_ids", "cache_position"}  # a module that asks for these may do more with positions than turn heads
COLUMNS = 5  # of the cache, in a trial
LOUD = 100.0  # times the usual input: what clips its queries, keys or values shows it
BLOCK = "moepager_block"  # the attribute of an attention module that is served so: its BlockShape


def adopt_blocks(model: Any, own: Products, few: Callable[[torch.dtype, int], int]) -> int:
    """Attention modules of `model`, which has its weights, whose batches of single tokens now go to `own`, as many as
    `few` allows of their dtype and number of weights. The modules' number."""
    positions = positions_of(model)
    if positions is None or model.config._attn_implementation != IMPLEMENTATION:
        return 0
    modules = [module for module in model.modules() if "Attention" in type(module).__name__]
    usual = [(module, shape) for module in modules if (shape := usual_block(module, own, positions)) is not None]
    for module, shape in usual:
        _take_over(module, shape, own, few(shape.dtype, shape.weights))
    return len(usual)


def usual_block(module: Any, own: Products, positions: tuple[Tensor, Tensor]) -> BlockShape | None:
    """The shape in which `own` does what the module does; None where there is none. `positions` as of
    `positions_of`."""
    rotary, dtype = positions[0].shape[-1], positions[0].dtype
    turns = [Turn(rotary, dtype, turning, late) for turning in range(3) for late in (False, True)]
    for turn in (*turns, Turn(2 * rotary, dtype, HALVES_ONCE), Turn(0, dtype)):
        shape = block_shape(module, turn)
        if shape is not None and agrees(module, shape, own, positions):
            return shape
    return None


def block_shape(module: Any, turn: Turn) -> BlockShape | None:
    """None where the module has other parts than `BlockShape` knows."""
    parts = dict(module.named_children())
    linears = [parts.pop(name, None) for name in PROJECTIONS]
    names = next((pair for pair in NORMS if pair[0] in parts), NORMS[0])
    norms = [parts.pop(name, None) for name in names]
    sinks = getattr(module, SINKS, None)
    tensors = [name for name, _ in module.named_parameters(recurse=False)]
    known = tensors == ([] if sinks is None else ["sinks"])
    plain = not parts and known and all(type(one) is nn.Linear for one in linears)
    if not plain or not _asks_for_the_usual(type(module).forward):
        return None
    head = getattr(module, "head_dim", None)
    if not isinstance(head, int) or not isinstance(getattr(module, "layer_idx", None), int):
        return None
    scale = getattr(module, "scaling", None)
    return BlockShape.of(linears, norms, head, scale, turn, sinks) if isinstance(scale, float) else None


def _asks_for_the_usual(forward: Any) -> bool:
    code: CodeType | None = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None or set(inspect.signature(forward).parameters) != TAKEN:
        return False
    return not MOVING & {*code.co_names, *code.co_varnames, *code.co_consts}


def agrees(module: Any, shape: BlockShape, own: Products, positions: tuple[Tensor, Tensor]) -> bool:
    """Whether one new token of two rows comes out as from the module's own forward, and leaves the same in the cache.

    The second row is `LOUD`: there only keys and values are compared, for its softmax is one of rounding errors.
    """
    trial = Trial.of(shape, (1.0, LOUD))
    mine, theirs = (trial.cache(module) for _ in range(2))
    with torch.inference_mode():
        try:
            wanted = module(trial.x, position_embeddings=positions, attention_mask=trial.mask, past_key_values=theirs)[
                0
            ]
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return False
        found = own.block(shape, trial.x, positions, trial.mask, mine.extend(module.layer_idx, 1))
    return close_enough(found[:1], wanted[:1]) and all(
        close_enough(one[row], other[row])
        for one, other in zip(trial.last(mine), trial.last(theirs), strict=True)
        for row in range(2)
    )


@dataclass(frozen=True, slots=True)
class Trial:
    """One new token of two rows, `x` [2, 1, H], behind a few columns, of which the second row does not see all."""

    x: Tensor
    mask: Tensor  # bool [2, 1, 1, S]
    kept: tuple[Tensor, Tensor]  # keys and values [2, N, S, D]

    @classmethod
    def of(cls, shape: BlockShape, sizes: tuple[float, float]) -> Trial:
        """`sizes` of the two rows."""
        made = torch.Generator().manual_seed(3)
        x = torch.randn(2, 1, shape.hidden, generator=made) * torch.tensor(sizes).view(2, 1, 1)
        mask = torch.ones(2, 1, 1, COLUMNS + 1, dtype=torch.bool)
        mask[1, ..., :2] = False
        keys, values = (torch.randn(2, shape.kv_heads, COLUMNS + 1, shape.head, generator=made) for _ in range(2))
        return cls(x.to(shape.dtype), mask, (keys.to(shape.dtype), values.to(shape.dtype)))

    def cache(self, module: Any) -> KvCache:
        """For the layer of the attention `module`."""
        layer = PooledLayer(self.kept[0].clone(), self.kept[1].clone(), 0, 2)
        layer.length = COLUMNS
        return KvCache([layer] * (module.layer_idx + 1))

    def last(self, cache: KvCache) -> tuple[Tensor, Tensor]:
        """The newest column's keys and values, [2, N, D] each."""
        keys, values = cache.extend(len(cache.layers) - 1, 0)
        return keys[:, :, -1], values[:, :, -1]


def _take_over(module: Any, shape: BlockShape, own: Products, few: int) -> None:
    theirs, layer = module.forward, module.layer_idx
    setattr(module, BLOCK, shape)

    def forward(
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **named: Any,
    ) -> tuple[Tensor, Tensor | None]:
        few_enough = hidden_states.shape[1] == 1 and hidden_states.shape[0] <= few
        if few_enough and takes(shape, hidden_states, position_embeddings, attention_mask, past_key_values, layer):
            cache = past_key_values.extend(layer, 1)
            return own.block(shape, hidden_states, position_embeddings, attention_mask, cache), None
        found: tuple[Tensor, Tensor | None] = theirs(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **named,
        )
        return found

    module.forward = forward


def takes(shape: BlockShape, x: Tensor, positions: Any, mask: Tensor | None, cache: Any, layer: int) -> bool:
    """`x` [B, new, H]; of more than one new token the mask is for who attends to look at."""
    if not isinstance(cache, KvCache) or x.dtype != shape.dtype or positions[0].dtype != shape.positions:
        return False
    new = x.shape[1]
    return new > 1 or mask is None or shows_columns(mask, len(x), cache.layers[layer].length + 1)


def positions_of(model: Any) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines [2, 1, R] of two positions, in the model's dtype or float32, if it has one kind of rotary
    positions alone."""
    kinds = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    dtype = next((one.dtype for one in model.parameters() if one.dtype in DTYPES), None)
    if len(kinds) != 1 or dtype is None or next(model.parameters()).device.type != "cpu":
        return None
    try:
        cos, sin = kinds[0](torch.zeros(2, 1, 1, dtype=dtype), torch.tensor([[3], [70]]))
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None
    plain = isinstance(cos, Tensor) and cos.shape == sin.shape and cos.dim() == 3
    return (cos, sin) if plain and cos.dtype in (dtype, torch.float32) else None
