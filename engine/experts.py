"""The routed experts' forward over the bank's slots, which engine.dispatch has transformers call.

Few tokens, as in decoding, and many tokens of small experts go to engine.products in one call a layer where it knows
the family's arithmetic. Otherwise one product per expert that was hit, over views of its slot: weights are never
gathered, and each family's own activation, biases and orientation come from its module. T tokens, k experts a token,
H hidden, E experts, n tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.bank import Bank
from engine.expert_shape import ExpertShape
from engine.kernels import Kernels, product
from engine.layer_shape import Room
from engine.layout import SlotLayout
from engine.observer import ChannelObserver, Observer
from engine.products import Products
from engine.residency import NOBODY
from engine.shared_expert import SharedExpert
from engine.wide import PromptRoom
from store.errors import UnsupportedFamily

CONTRACT = ("has_gate", "has_bias", "is_transposed", "num_experts")
FEW = 16  # tokens for which weights are read as decoding reads them; with more, an expert has several

FeedForward = Callable[[Tensor, Sequence[Tensor]], Tensor]


@dataclass(frozen=True, slots=True)
class Stages:
    """One expert's arithmetic in its three steps: the same as its feed-forward, for those who look inside."""

    into: FeedForward  # [n, H] -> [n, 2F], [n, F] without a gate
    gate: Callable[[Tensor], Tensor]  # -> [n, F]
    out: FeedForward  # -> [n, H]

    def __call__(self, x: Tensor, views: Sequence[Tensor]) -> Tensor:
        return self.out(self.gate(self.into(x, views)), views)


class PagedExperts:
    """One layer's experts: asks the bank for those that were hit and runs them."""

    def __init__(self, layer: int, module: Any, bank: Bank, kernels: Kernels) -> None:
        self.layer = layer
        self._observer: Observer | None = None
        self._inside: ChannelObserver | None = None  # the same one, if it looks inside experts
        self.added: dict[int, Tensor] = {}  # by layer, [T, H]: what routing adds in place of experts that are left out
        self._bank = bank
        self._experts = int(module.num_experts)
        self.stages = stages(module, bank.layout, kernels)
        self._feed_forward: FeedForward = self.stages
        compiled = compiled_experts(module, bank.layout, kernels)
        self.compiled = compiled if isinstance(compiled, Compiled) else None

    @property
    def observer(self) -> Observer | None:
        return self._observer

    @observer.setter
    def observer(self, watching: Observer | None) -> None:
        """Asks here what kind it is: to ask a protocol takes longer than a small expert's products."""
        self._observer = watching
        self._inside = watching if isinstance(watching, ChannelObserver) else None

    def __call__(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """`hidden` [T, H], `index` and `weights` [T, k] -> [T, H]. No expert sees what has an index of E: padding, and
        choices that something else stands in for."""
        compiled = self.compiled if hidden.dtype == self._bank.layout.dtype else None
        if self.observer is None:
            if compiled is not None and len(hidden) <= FEW:
                return self._few(compiled, hidden.contiguous(), index, weights)
            if len(hidden) == 1:
                return self._one(hidden, index, weights)
        if compiled is not None and compiled.takes_many and self._inside is None:
            combined = self._together(compiled, hidden.contiguous(), index, weights)  # [T, H]
        else:
            combined = self._many(hidden, index, weights)  # [T, H]
        if self.observer is not None:
            self.observer.combined(self.layer, combined)
        return combined

    def outputs(self, hidden: Tensor) -> Tensor:
        """Every expert's unweighted output of all of `hidden` [T, H], whoever was routed to it: [T, E, H]."""
        found: dict[int, Tensor] = {}
        with closing(self._bank.visit(self.layer, range(self._experts))) as visit:
            for expert, slot in visit:
                found[expert] = self._feed_forward(hidden, self._bank.weights(slot))  # [T, H]
        return torch.stack([found[expert] for expert in range(self._experts)], dim=1)

    def weights(self) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Each expert and its parameters in the layout's order, as they lie in the bank: good until the next pair."""
        with closing(self._bank.visit(self.layer, range(self._experts))) as visit:
            for expert, slot in visit:
                yield expert, self._bank.weights(slot)

    def onto(self, room: Room, chosen: list[int], shared: SharedExpert | None) -> Tensor:
        """The residual stream with the experts `chosen` for it, B*k of them, and the shared one, which see
        `room.normed`: [B, 1, H]."""
        assert self.compiled is not None, self.layer
        slots = self._bank.at_hand(self.layer, chosen)
        if slots is not None:
            return self.compiled.own.onto(self.compiled.shape, self._bank.memory, room, slots, shared)
        index, normed = torch.tensor(chosen).view(room.weights.shape), room.normed[:, 0]  # [B, k], [B, H]
        added = self._few(self.compiled, normed, index, room.weights)  # [B, H]
        if shared is not None:
            added += self.compiled.own.shared(shared, normed)
        return room.middle + added.unsqueeze(1)

    def _few(self, compiled: Compiled, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """All experts in one call where all are at hand, else each as it comes: the sums are the same bit for bit."""
        chosen: list[int] = index.flatten().tolist()
        outputs = hidden.new_empty(len(chosen), hidden.shape[1], dtype=torch.float32)  # [T*k, H]
        slots = self._bank.at_hand(self.layer, chosen)
        if slots is None:
            slots = [NOBODY if expert == self._experts else expert for expert in chosen]
            with closing(self._bank.visit(self.layer, sorted({*chosen} - {self._experts}))) as visit:
                for expert, slot in visit:
                    mine = [slot if each == expert else NOBODY for each in chosen]
                    compiled.own.experts(compiled.shape, self._bank.memory, hidden, mine, outputs)
        else:
            compiled.own.experts(compiled.shape, self._bank.memory, hidden, slots, outputs)
        return compiled.own.combine(outputs, slots, weights, hidden.dtype)  # [T, H]

    def _one(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """A single token, as in decoding one row: nothing to sort, gather or scatter."""
        chosen: list[int] = index[0].tolist()
        called = [place for place, expert in enumerate(chosen) if expert != self._experts]
        if not called:
            return torch.zeros_like(hidden)
        outputs: dict[int, Tensor] = {}
        with closing(self._bank.visit(self.layer, [chosen[place] for place in called])) as visit:
            for expert, slot in visit:
                outputs[expert] = self._feed_forward(hidden, self._bank.weights(slot))  # [1, H]
        stacked = torch.cat([outputs[chosen[place]] for place in called])  # [n, H]
        scale = weights[0] if len(called) == len(chosen) else weights[0, called]  # [n]
        return (stacked * scale.view(-1, 1)).sum(0, keepdim=True).to(hidden.dtype)  # [1, H]

    def _together(self, compiled: Compiled, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """As `_few` for more tokens: an expert's sums are the same whoever is computed beside it."""
        outputs = self._outputs(compiled, hidden, index)  # [T*k, H]
        if self.observer is not None:
            self._show(self.observer, index, weights, outputs)
        wide = compiled.own.wide if hidden.dtype == torch.bfloat16 else None
        if wide is not None:
            return wide.ending(outputs, index, self._experts, weights, hidden)
        outputs = outputs.view(*index.shape, -1)  # [T, k, H]
        return outputs.mul_(weights.unsqueeze(-1)).sum(1).to(hidden.dtype)  # [T, H]

    def ending(self, room: PromptRoom, weights: Tensor, index: Tensor, shared: SharedExpert | None) -> Tensor:
        """As `onto` for many tokens, `weights` and `index` [T, k]: [T, H]."""
        assert self.compiled is not None, self.layer
        assert self.compiled.own.wide is not None, self.compiled.own.instruction_set
        if self.compiled.takes_many:
            outputs = self._outputs(self.compiled, room.normed, index)  # [T*k, H]
        else:  # summed already: each token's only choice, as it is
            outputs = self._many(room.normed, index, weights).float()  # [T, H]
            index, weights = torch.zeros(len(outputs), 1, dtype=torch.long), torch.ones(len(outputs), 1)  # [T, 1]
        ending = self.compiled.own.wide.ending
        return ending(outputs, index, self._experts, weights, room.normed, shared, room.middle)

    def _outputs(self, compiled: Compiled, hidden: Tensor, index: Tensor) -> Tensor:
        """What each choice's expert makes of its token, f32 [T*k, H]: 0 where it is nobody's, or anything with the wide
        products, which leave such a choice out."""
        outputs = compiled.own.scratch.outputs(index.numel(), hidden.shape[1])  # [T*k, H]
        if compiled.own.wide is None or hidden.dtype != torch.bfloat16:
            outputs.zero_()
        for slots in self._slots(index):
            compiled.own.many(compiled.shape, self._bank.memory, hidden, slots, outputs)
        return outputs

    def _slots(self, index: Tensor) -> Iterator[Tensor]:
        """The slots of the choices `index` [T, k], all at once where they are at hand, else expert by expert."""
        hit = torch.bincount(index.flatten(), minlength=self._experts)[: self._experts].nonzero().flatten()
        table = index.new_full((self._experts + 1,), NOBODY, dtype=torch.long)  # [E + 1]
        experts: list[int] = hit.tolist()
        slots = self._bank.at_hand(self.layer, experts)
        if slots is not None:
            table[hit] = torch.tensor(slots, dtype=torch.long)  # of none too, where all choices have stand-ins
            yield table[index]
            return
        with closing(self._bank.visit(self.layer, experts)) as visit:
            for expert, slot in visit:
                table.fill_(NOBODY)[expert] = slot
                yield table[index]

    def _show(self, watching: Observer, index: Tensor, weights: Tensor, outputs: Tensor) -> None:
        """What each choice's expert gave, `outputs` [T*k, H], without the choices that no expert gets."""
        flat = index.flatten()  # [T*k]
        tokens = torch.arange(len(index), device=index.device).repeat_interleave(index.shape[1])  # [T*k]
        routed = flat != self._experts  # [T*k]
        pairs = [flat, tokens, weights.flatten(), outputs]
        if not bool(routed.all()):
            pairs = [each[routed] for each in pairs]
        watching.experts(self.layer, *pairs)

    def _many(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Tokens sorted by expert, each expert's in one piece; the sum over k is in the router's order, so which
        experts were resident never changes an answer."""
        flat = index.reshape(-1)  # [T*k]
        order = flat.argsort(stable=True)  # [T*k]
        counts = torch.bincount(flat, minlength=self._experts).tolist()[: self._experts]
        hit = [expert for expert, count in enumerate(counts) if count]
        sizes = [counts[expert] for expert in hit]
        routed = order[: sum(sizes)]  # [n_all] padding sorts last
        tokens = routed // index.shape[1]  # [n_all]
        scale = weights.reshape(-1)[routed]  # [n_all]
        inputs = hidden[tokens]  # [n_all, H]
        outputs = inputs.new_empty(inputs.shape, dtype=torch.promote_types(inputs.dtype, scale.dtype))  # [n_all, H]
        pieces = zip(*(torch.split(each, sizes) for each in (tokens, inputs, scale, outputs)), strict=True)
        self._run(dict(zip(hit, pieces, strict=True)))
        if self.observer is not None:
            self.observer.experts(self.layer, flat[routed], tokens, scale, outputs)
        outputs *= scale.unsqueeze(1)
        places = outputs.new_zeros(len(flat), outputs.shape[1]).index_copy_(0, routed, outputs)  # [T*k, H]
        return places.view(*index.shape, -1).sum(1).to(hidden.dtype)  # [T, H]

    def _run(self, pieces: Mapping[int, tuple[Tensor, ...]]) -> None:
        """For each expert: its tokens [n], inputs [n, H] and weights [n] -> unweighted outputs [n, H], in place."""
        # Closed at once if an expert fails: the slots of a visit must not stay pinned until the traceback is gone.
        with closing(self._bank.visit(self.layer, list(pieces))) as visit:
            for expert, slot in visit:
                tokens, x, w, out = pieces[expert]
                out.copy_(self._run_one(expert, tokens, x, w, self._bank.weights(slot)))

    def _run_one(self, expert: int, tokens: Tensor, x: Tensor, w: Tensor, views: Sequence[Tensor]) -> Tensor:
        """`x` [n, H] -> [n, H], unweighted; its inside is shown to an observer that wants to see it."""
        if self._inside is None:
            return self._feed_forward(x, views)
        inputs = self.stages.into(x, views)  # [n, 2F]
        h = self.stages.gate(inputs)  # [n, F]
        self._inside.channels(self.layer, expert, tokens, w, inputs, h)
        return self.stages.out(h, views)  # [n, H]


@dataclass(frozen=True, slots=True)
class Compiled:
    """engine.products, where it knows the experts' arithmetic."""

    own: Products
    shape: ExpertShape
    takes_many: bool  # tokens, too


def compiled_experts(module: Any, layout: SlotLayout, kernels: Kernels) -> Compiled | str:
    """A string says why there is none."""
    if kernels.own is None:
        return kernels.name
    shape = ExpertShape.of(module, layout)
    return shape if isinstance(shape, str) else Compiled(kernels.own, shape, kernels.takes_many(shape))


def stages(module: Any, layout: SlotLayout, kernels: Kernels) -> Stages:
    """The module's own arithmetic for one expert. Raises UnsupportedFamily without transformers' experts contract."""
    kind = type(module).__name__
    if lacking := [name for name in CONTRACT if not hasattr(module, name)]:
        raise UnsupportedFamily(f"{kind} lacks {', '.join(lacking)} of transformers' experts contract.")
    names = [parameter.name for parameter in layout.parameters]
    wanted = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    wanted = [name + end for name in wanted for end in (("", "_bias") if module.has_bias else ("",))]
    if names != wanted:
        raise UnsupportedFamily(f"{kind} keeps an expert as {', '.join(names)}; the contract is {', '.join(wanted)}.")
    gate = module._apply_gate if module.has_gate else module.act_fn
    after = module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None
    step, biased = (product if module.is_transposed else kernels.linear), bool(module.has_bias)
    out = _product(step, 2 if biased else 1, biased)
    return Stages(_product(step, 0, biased), gate, out if after is None else lambda h, views: after(out(h, views)))


def _product(step: Callable[..., Tensor], at: int, biased: bool) -> FeedForward:
    """The product with parameter number `at`, and the bias that follows it."""
    if not biased:
        return lambda x, views: step(x, views[at])
    if step is product:
        return lambda x, views: product(x, views[at]) + views[at + 1]
    return lambda x, views: step(x, views[at], views[at + 1])
