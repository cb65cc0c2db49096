"""A decoder layer of single tokens in two calls of engine.products, where its module does the usual.

The usual: a norm, attention, a sum, a norm, a feed-forward, a sum. The first call goes from the layer's input to the
second norm and, where the feed-forward is a router, experts and at most one that every token goes to, to the router's
choice; the second runs those experts onto the residual stream. Between the two the bank says in which slots the chosen
are. A router that chooses in another way is a module of its own there. Whether a module does just that is found out by
trying it against its own forward; any other keeps its own, and one whose feed-forward is something else (no experts at
all, more than their sum) keeps that.
B rows, S columns of the cache, H hidden, k experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.attention import close_enough
from engine.attention_block import BLOCK, Trial, positions_of, takes
from engine.block_shape import BlockShape
from engine.choice import Choice
from engine.experts import PagedExperts
from engine.kvcache import KvCache
from engine.layer_shape import FREE, LayerShape, Room
from engine.norms import computes_the_usual
from engine.products import Products
from engine.shared_expert import SharedExpert
from engine.skeleton import Joint
from engine.switchboard import Switchboard
from engine.wide import PromptRoom

BEFORE, AFTER = "input_layernorm", "post_attention_layernorm"
SIZES = (0.1, 1.0, 100.0)  # of the inputs of a trial: what clips the inside of a shared expert shows it


def adopt_layers(
    model: Any, joints: Sequence[Joint], experts: Sequence[PagedExperts], board: Switchboard, own: Products,
    few: Callable[[torch.dtype, int], int],
) -> list[LayerBlock]:  # fmt: skip
    """Decoder layers of `model`, which has its weights, whose batches of single tokens now go to `own`, as many as
    `few` allows of the dtype and the number of weights of a layer. In the model's order.
    """
    positions = positions_of(model)
    if positions is None:
        return []
    moe = list(zip(joints, experts, strict=True))
    usual = []
    for parts in filter(None, [_Parts.of(module, own) for module in model.modules()]):
        inside = {id(module) for module in parts.feed_forward.modules()}
        joint, paged = next((pair for pair in moe if id(pair[0].experts) in inside), (None, None))
        if parts.agrees(own, positions, joint):
            ours = joint if paged is not None and paged.compiled is not None else None
            usual.append((parts, ours, paged, _layer_shape(parts, ours, board, own)))
    blocks = [
        LayerBlock(
            parts,
            shape,
            None if joint is None else joint.router,
            paged,
            board,
            own,
            few(parts.block.dtype, shape.weights),
        )
        for parts, joint, paged, shape in usual
    ]
    for block in blocks:
        block.take_over()
    return blocks


class LayerBlock:
    """One decoder layer that does the usual. Its module's own forward stays for many tokens and for whoever watches."""

    def __init__(
        self, parts: _Parts, shape: LayerShape, router: Any, paged: PagedExperts | None, board: Switchboard,
        own: Products, few: int,
    ) -> None:  # fmt: skip
        self.layer, self._feed_forward, self._shape, self._router = parts.layer, parts.feed_forward, shape, router
        self._theirs = parts.layer.forward
        self._at = int(parts.attention.layer_idx)
        self._paged, self._board, self._own, self.few = paged, board, own, few
        # For many tokens a row; None where torch does those.
        self.wide = own.wide if shape.even and shape.block.dtype == torch.bfloat16 else None
        self._rooms: dict[int, Room] = {}  # by rows

    def take_over(self) -> None:
        self.layer.forward = self.forward

    def forward(self, hidden_states: Tensor, *rest: Any, **named: Any) -> Any:
        if not rest and self._fits(hidden_states, named):
            rows, new, _ = hidden_states.shape
            if new == 1 and rows <= self.few and self._steps():
                return self.single(hidden_states, **named)
            if new > 1 and self._takes_many(hidden_states, named["attention_mask"], named["past_key_values"]):
                return self.many(hidden_states, **named)
        return self._theirs(hidden_states, *rest, **named)

    def takes(self, cache: KvCache) -> bool:
        """Whether a pass of `few` single tokens may go to `single` without the module's forward."""
        routing = self._board.routing
        return routing is not None and routing.steps and isinstance(cache, KvCache)

    def _fits(self, x: Tensor, named: dict[str, Any]) -> bool:
        """Whether what the layer is handed is what our calls take, of however many tokens."""
        positions, cache = named.get("position_embeddings"), named.get("past_key_values")
        if self._board.routing is None or not x.is_contiguous():
            return False
        if not isinstance(positions, tuple) or not all(one.is_contiguous() for one in positions):
            return False
        return takes(self._shape.block, x, positions, named.setdefault("attention_mask", None), cache, self._at)

    def _steps(self) -> bool:
        routing = self._board.routing
        assert routing is not None
        return routing.single if self._shape.choice is None else routing.steps

    def takes_many(self, mask: Tensor, cache: KvCache) -> bool:
        """Whether a pass behind what `mask` i64 [B, C] says may go to `many` without the module's forward."""
        if not self._unwatched() or self.wide is None or not isinstance(cache, KvCache):
            return False
        return self.wide.sees(mask.bool()[:, None, None], len(mask), 1, mask.shape[1])

    def _takes_many(self, x: Tensor, mask: Tensor | None, cache: KvCache) -> bool:
        if not self._unwatched() or self.wide is None:
            return False
        rows, new, _ = x.shape
        columns = cache.layers[self._at].length + new
        return columns == new if mask is None else self.wide.sees(mask, rows, new, columns)

    def _unwatched(self) -> bool:
        routing = self._board.routing
        return routing is not None and routing.unwatched

    def single(
        self,
        x: Tensor,
        past_key_values: Any,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """`x` [B, 1, H] -> [B, 1, H]"""
        shape, choice, routing = self._shape, self._shape.choice, self._board.routing
        room = self._rooms.get(len(x))
        if room is None:
            room = self._rooms[len(x)] = Room.of(shape, len(x))
        limits = FREE
        if choice is not None and self._paged is not None and routing is not None:
            limits = routing.limits(self._paged.layer, choice)
        cache = past_key_values.layers[self._at]
        chosen = self._own.layer(shape, x, room, attention_mask, position_embeddings, cache, limits)
        if self._paged is None or not shape.summed or (routing is not None and routing.replaces):
            return room.middle + _output(self._feed_forward(room.normed))
        if chosen is None:
            _, weights, index = self._router(room.normed[:, 0])
            room, chosen = room.weighing(weights), index.flatten().tolist()
        elif self._board.strips.count > 1 and routing is not None:
            room = room.weighing(self._board.strips.weights(room.weights))
            chosen = routing.strips_of(self._paged.layer, chosen)
        return self._paged.onto(room, chosen, shape.shared)

    def many(
        self,
        x: Tensor,
        past_key_values: Any,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """The same for many tokens: `x` [B, S, H] -> [B, S, H]"""
        shape, routing, wide = self._shape, self._board.routing, self.wide
        assert wide is not None, self._own.instruction_set
        assert routing is not None
        room, limits = PromptRoom.of(shape, x.shape[0] * x.shape[1]), None
        if shape.choice is not None and self._paged is not None and routing.chooses:
            limits = routing.limits(self._paged.layer, shape.choice)
        cache = past_key_values.layers[self._at]
        wide.prompt(shape, x, room, attention_mask, position_embeddings, cache, limits, routing.valid)
        if self._paged is None or self._paged.compiled is None or not shape.summed or routing.replaces:
            return room.middle.view_as(x) + _output(self._feed_forward(room.normed.view_as(x)))
        weights, index = room.weights, room.index
        if limits is None:
            _, weights, index = self._router(room.normed)
        return self._paged.ending(room, weights, index, shape.shared).view_as(x)


@dataclass(frozen=True, slots=True)
class _Parts:
    """Of a decoder layer whose parts have the usual names."""

    layer: Any
    before: Any
    attention: Any
    after: Any
    feed_forward: Any
    block: BlockShape

    @classmethod
    def of(cls, layer: Any, own: Products) -> _Parts | None:
        parts = dict(layer.named_children())
        attention = next((name for name, part in parts.items() if BLOCK in vars(part)), None)
        if attention is None or len(parts) != 4 or BEFORE not in parts or AFTER not in parts:
            return None
        block: BlockShape = getattr(parts[attention], BLOCK)
        norms = [parts[BEFORE], parts[AFTER]]
        [rest] = [part for name, part in parts.items() if name not in (BEFORE, AFTER, attention)]
        plain = not list(layer.parameters(recurse=False)) and not list(layer.buffers(recurse=False))
        fitting = [computes_the_usual(norm, own) and norm.weight.dtype == block.dtype for norm in norms]
        sized = all(norm.weight.shape == (block.hidden,) for norm in norms if all(fitting))
        if not (plain and all(fitting) and sized):
            return None
        return cls(layer, norms[0], parts[attention], norms[1], rest, block)

    def agrees(self, own: Products, positions: tuple[Tensor, Tensor], joint: Joint | None) -> bool:
        """Whether one new token of two rows comes out as from the layer's own forward, and leaves the same in the
        cache. `joint` is where it has experts.
        """
        trial = Trial.of(self.block, (1.0, 30.0))
        mine, theirs = (trial.cache(self.attention) for _ in range(2))
        with torch.inference_mode(), _stubbed(joint, _stub):
            try:
                wanted = self.layer(
                    trial.x,
                    attention_mask=trial.mask,
                    position_ids=torch.zeros(2, 1, dtype=torch.long),
                    past_key_values=theirs,
                    use_cache=True,
                    position_embeddings=positions,
                )
            except (RuntimeError, TypeError, ValueError, AttributeError):
                return False
            if not isinstance(wanted, Tensor):
                return False
            shape = LayerShape.of(self.block, self.before, self.after)
            room = Room.of(shape, 2)
            own.layer(shape, trial.x, room, trial.mask, positions, mine.layers[-1], FREE)
            found = room.middle + _output(self.feed_forward(room.normed))
        grown = mine.length == theirs.length
        return grown and close_enough(found, wanted) and all(map(close_enough, trial.last(mine), trial.last(theirs)))


def _output(found: Any) -> Tensor:
    """Of a feed-forward, some of which return what their router said, too."""
    output: Tensor = found[0] if isinstance(found, tuple) else found
    return output


def _stubbed(joint: Joint | None, stub: Callable[[Tensor, Tensor, Tensor], Tensor]) -> AbstractContextManager[None]:
    """While this is open `stub` is in place of a layer's experts, whose weights are not there yet."""
    return nullcontext() if joint is None else forward_of(joint.experts, stub)


@contextmanager
def forward_of(module: Any, stub: Callable[..., Tensor]) -> Iterator[None]:
    """While this is open `stub` is the forward of `module`."""
    own = vars(module).get("forward")
    module.forward = stub
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _stub(hidden: Tensor, _: Tensor, weights: Tensor) -> Tensor:
    """Something that depends on all that experts take."""
    return (hidden * (1 + weights.float().sum(-1, keepdim=True))).to(hidden.dtype)


def nothing(hidden: Tensor, _: Tensor, __: Tensor) -> Tensor:
    """Experts that give none."""
    return torch.zeros_like(hidden)


def _layer_shape(parts: _Parts, joint: Joint | None, board: Switchboard, own: Products) -> LayerShape:
    """With the shared expert and the router's choice, if the feed-forward is known to be nothing but a sum of that and
    the experts of `joint`, and the choice to be a softmax's best."""
    alone = LayerShape.of(parts.block, parts.before, parts.after)
    if joint is None:
        return alone
    router, block = joint.router, parts.block
    others = [part for part in parts.feed_forward.children() if part not in (router, joint.experts)]
    shared = SharedExpert.of(others, block.dtype, block.hidden)
    if (others and shared is None) or not _adds_up(parts, joint, board, shared, own):
        return alone
    weight, choice = next(router.parameters()), Choice.of(router, router.forward.inner, block.hidden)
    choice = choice if weight.dtype == block.dtype else None
    return replace(LayerShape.of(block, parts.before, parts.after, weight, choice), summed=True, shared=shared)


def _adds_up(
    parts: _Parts, joint: Joint, board: Switchboard, shared: SharedExpert | None, own: Products
) -> bool:  # fmt: skip
    """Whether the feed-forward is the sum of its experts and the shared one, each as it is. Where either is small
    beside the other its size would not show: so the shared one is tried alone too, and with inputs of several sizes.
    Of an input and its opposite one at least has a share that counts.
    """
    made = torch.Generator().manual_seed(7)
    one = torch.randn(parts.block.hidden, generator=made)  # [H]
    flat = torch.stack([one * size for each in SIZES for size in (each, -each)]).to(parts.block.dtype)  # [B, H]
    x = flat.unsqueeze(1)
    with torch.inference_mode():
        _, weights, index = board.strips.of_all(joint.router.forward.inner(flat))
        every = torch.zeros_like(flat) if shared is None else own.shared(shared, flat)  # [B, H]
        for stub in (_stub, nothing):
            with _stubbed(joint, stub):
                found = _output(parts.feed_forward(x))
            wanted = (stub(flat, index, weights) + every).unsqueeze(1)  # [B, 1, H]
            if not isinstance(found, Tensor) or not all(map(close_enough, found, wanted)):
                return False
    return True
