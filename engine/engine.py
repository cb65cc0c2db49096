"""The engine: a paged Mixture-of-Experts model on a device. Puts the room's parts together; owned by one thread.

B rows, S positions, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from engine import experts as dispatch
from engine.bank import Bank, Lease
from engine.card import ModelCard
from engine.channels import Channels
from engine.config import EngineConfig
from engine.dense import load_dense
from engine.device import open_device
from engine.experts import PagedExperts
from engine.generate import Batch
from engine.head import Head
from engine.kernels import Kernels
from engine.kvcache import KvCache, KvPool
from engine.layerwise import Reached, decoder_layers, only
from engine.layout import SlotLayout
from engine.lookahead import Lookahead
from engine.observer import Observer
from engine.plan import READER_THREADS, MemoryPlan, plan_memory, reader_bytes
from engine.reader import Reader
from engine.requests import Event, FailedEvent, GenerationRequest, Submission, SwapCost
from engine.residency import ABSENT
from engine.restriction import groups_of, restrict
from engine.routing import Routing, Switchboard
from engine.skeleton import Skeleton, build_skeleton
from engine.stand_ins import DeviceStandIns
from engine.text import Tokenizer
from store.checkpoint import CheckpointMap
from store.errors import BudgetError, InvalidInput, UnsupportedFamily
from store.experts import ExpertMap
from store.records import Selection

GUESSED_BYTES_PER_SECOND = 1e9


@dataclass(frozen=True, slots=True)
class ResidencySnapshot:
    """What is in the bank now, and what was paged in since open.

    Of what exact mode read ahead (`experts_guessed`), the rest of `guessed_right` was not wanted by the pass that
    guessed it: `bytes_wasted` were read for it, which `bytes_paged` leaves out and `bytes_read` counts.
    """

    slots: int
    resident: int
    leased: int
    slot_bytes: int
    resident_bytes: int
    experts_paged: int
    bytes_paged: int
    bytes_read: int
    paging_seconds: float
    experts_guessed: int
    guessed_right: int
    bytes_wasted: int
    per_layer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Occupancy:
    """`table[layer][expert]` is the slot or -1. Of the slots, some are leased by requests, some not read yet."""

    table: tuple[tuple[int, ...], ...]
    leased_slots: tuple[int, ...]
    unfilled_slots: tuple[int, ...]


class Engine:
    """Use `Engine.open`. Every method but `residency` belongs to the thread that owns the device."""

    def __init__(
        self, card: ModelCard, plan: MemoryPlan, tokenizer: Tokenizer, skeleton: Skeleton, bank: Bank, reader: Reader,
        device: torch.device, kernels: Kernels,
    ) -> None:  # fmt: skip
        self.card, self.plan, self.tokenizer, self.bank, self.device = card, plan, tokenizer, bank, device
        self._model, self._joints, self._reader = skeleton.model, skeleton.joints, reader
        self.kernel = kernels.name
        self._experts = [PagedExperts(at, joint.experts, bank, kernels) for at, joint in enumerate(skeleton.joints)]
        for joint, paged in zip(skeleton.joints, self._experts, strict=True):
            dispatch.bind(joint.experts, paged)
        routers = [joint.router for joint in skeleton.joints]
        stand_ins = DeviceStandIns(plan.stand_ins, device)
        self.board = Switchboard(routers, card.experts, card.top_k, remembered=plan.max_batch, stand_ins=stand_ins)
        for paged in self._experts:
            paged.added = self.board.added
        if bank.guesses.most:
            guesses = bank.guesses
            self.board.lookahead = Lookahead(self.board.routes, card.experts, guesses.expect, guesses.drop_all)
        with torch.inference_mode():
            self.board.check(card.hidden)
        self.head = Head(self._model, max(plan.max_batch, 64 if plan.budget is None else 1))
        _check_cache(skeleton, plan)
        self.kv = KvPool(skeleton.kv_shapes, plan.max_batch, plan.max_context, getattr(torch, plan.dtype), device)

    @classmethod
    def open(cls, config: EngineConfig) -> Engine:
        """Plan, then load. Raises CheckpointError, UnsupportedFamily or BudgetError before any weight is read."""
        checkpoint = CheckpointMap.open(config.model)
        experts = ExpertMap.build(checkpoint)
        card = ModelCard.describe(checkpoint, experts)
        plan = plan_memory(card, config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        device = open_device(config.device)
        tokenizer = Tokenizer(config.model)
        skeleton, renaming = build_skeleton(checkpoint, experts, plan.dtype)
        kernels = Kernels.choose(config.kernel, skeleton.layout.dtype, device)
        assert skeleton.layout.slot_bytes <= plan.slot_bytes, (skeleton.layout.slot_bytes, plan.slot_bytes)
        reader = Reader(reader_bytes(card), READER_THREADS)
        try:
            load_dense(skeleton.model, renaming, checkpoint, experts, reader, device)
            kernels.adopt(skeleton.model, skeleton.layout.dtype, device)
            ahead = _read_ahead(config, plan, skeleton.layout)
            bank = Bank(skeleton.layout, experts, plan.slots, device, reader, ahead)
            return cls(card, plan, tokenizer, skeleton, bank, reader, device, kernels)
        except BaseException:
            reader.close()
            raise

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files. The memory goes with the object."""
        self._reader.close()

    @property
    def resident_bytes(self) -> int:
        return self.bank.residency.resident * self.bank.slot_bytes

    def residency(self) -> ResidencySnapshot:
        """A snapshot; callable from any thread, exact only between tokens."""
        residency, paged, guessed = self.bank.residency, self.bank.paged, self.bank.guesses.totals
        return ResidencySnapshot(
            slots=residency.slots,
            resident=residency.resident,
            leased=residency.leased,
            slot_bytes=self.bank.slot_bytes,
            resident_bytes=self.resident_bytes,
            experts_paged=paged.experts,
            bytes_paged=paged.bytes_needed,
            bytes_read=paged.bytes_read,
            paging_seconds=paged.seconds,
            experts_guessed=guessed.experts,
            guessed_right=guessed.right,
            bytes_wasted=guessed.wasted_bytes,
            per_layer=tuple(sum(slot >= 0 for slot in row) for row in residency.table),
        )

    def occupancy(self) -> Occupancy:
        """Which slot every expert is in; callable from any thread, exact only between tokens."""
        residency = self.bank.residency
        leased = tuple(slot for slot in range(residency.slots) if residency.is_leased(slot))
        return Occupancy(tuple(map(tuple, residency.table)), leased, tuple(sorted(residency.unfilled)))

    def evict(self) -> int:
        """Forget every expert that no lease holds, so that the next lease reads all of its own. Gives their number."""
        return self.bank.residency.evict_idle()

    @contextmanager
    def lease(self, selection: Selection, *, ahead: bool = False) -> Iterator[Lease]:
        """Page in what is missing of `selection` and hold it until the block ends; `ahead`: see Bank.lease.

        What stands in for the other experts is held with it.
        """
        self._check_selection(selection)
        held = self.board.stand_ins.hold(selection.stand_in)
        with held, self.bank.lease(selection, ahead=ahead) as lease:
            yield lease

    @torch.inference_mode()
    def forward(
        self, ids: Tensor, mask: Tensor, selections: Sequence[Selection | None], observer: Observer | None = None
    ) -> Tensor:
        """`ids`, `mask` i64 [B, S] -> logits f32 [B, S, V], each row inside its own selection; None routes freely.

        Padding may be on either side; its logits mean nothing. One pass over T = B*S tokens, so at most
        `plan.chunk_tokens` of them. The logits are the caller's memory, on top of the plan.
        """
        return self.forward_metered(ids, mask, selections, observer)[0]

    @torch.inference_mode()
    def forward_metered(
        self, ids: Tensor, mask: Tensor, selections: Sequence[Selection | None], observer: Observer | None = None
    ) -> tuple[Tensor, list[float]]:
        """As `forward`, and beside the logits each row's coverage."""
        self._check_forward(ids, mask, selections)
        with ExitStack() as stack:
            for selection in dict.fromkeys(selections):
                if selection is not None:
                    stack.enter_context(self.lease(selection, ahead=True))
            self.require_free_slot(selections)
            routing = Routing(self.board, selections, self.device)
            if observer is not None:
                stack.enter_context(self._observed(observer, routing))
            return self._forward(ids.to(self.device), mask.to(self.device), routing), routing.coverage()

    @property
    def router_names(self) -> tuple[str, ...]:
        """What transformers calls the routers, a MoE layer each."""
        names = {module: name for name, module in self._model.named_modules()}
        return tuple(names[joint.router] for joint in self._joints)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The decoder layers that hold the MoE layers, in order."""
        return tuple(decoder_layers(self._model, [joint.experts for joint in self._joints])[1])

    @torch.inference_mode()
    def forward_layer(
        self, layer: int, ids: Tensor, mask: Tensor, hidden: Tensor | None, observer: Observer | None = None
    ) -> Tensor:
        """Decoder layer `layer` alone, routed freely: `hidden` [B, S, H], what the layer before gave, -> [B, S, H].

        `ids` and `mask` i64 [B, S] as for `forward`; `hidden` is None for layer 0.
        """
        assert (hidden is None) == (layer == 0), layer
        self._check_forward(ids, mask, [None] * len(ids))
        routing = Routing(self.board, [None] * len(ids), self.device)
        decoders = decoder_layers(self._model, [joint.experts for joint in self._joints])[0]
        with ExitStack() as stack:
            self.require_free_slot([None])
            if observer is not None:
                stack.enter_context(self._observed(observer, routing))
            stack.enter_context(only(decoders, layer, None if hidden is None else hidden.to(self.device)))
            try:
                self._forward(ids.to(self.device), mask.to(self.device), routing)
            except Reached as end:
                return end.hidden
        raise AssertionError("the pass went past its layer")

    @torch.inference_mode()
    def expert_outputs(self, layer: int, x: Tensor) -> Tensor:
        """What each expert of MoE layer `layer` makes of the router inputs `x` [n, H], unweighted: [n, E, H]."""
        if not self._joints[layer].same_states:
            raise UnsupportedFamily(
                f"The experts of {self.card.family} read other states than its router, so what they make of the "
                "router's inputs means nothing."
            )
        self.require_free_slot([None])
        return self._experts[layer].outputs(x.to(self.device))

    @property
    def grouped(self) -> bool:
        """Whether the router chooses groups of experts before it chooses experts."""
        return any(groups_of(joint.router) > 1 for joint in self._joints)

    @property
    def channels(self) -> Channels:
        """How the channels of an expert lie in its parameters."""
        return Channels.of(self._joints[0].experts, self.bank.layout)

    @torch.inference_mode()
    def expert_weights(self, layer: int) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Every expert of MoE layer `layer` once, in any order, with its parameters in the layout's order: views of
        the bank, good until the next pair is asked for.
        """
        self.require_free_slot([None])
        yield from self._experts[layer].weights()

    @torch.inference_mode()
    def route_within(self, layer: int, x: Tensor, logits: Tensor, experts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Weights and index [n, k] that the router of MoE layer `layer` gives `x` [n, H] when only `experts` are there.

        `logits` [n, E] are what the unrestricted router said.
        """
        return restrict(self._joints[layer].router, experts).route(x, logits)

    def _forward(self, ids: Tensor, mask: Tensor, routing: Routing) -> Tensor:
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # [B, S]
        routing.begin(ids.shape[1], mask.bool())
        try:
            out = self._model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        except BaseException:
            routing.abort()
            raise
        routing.finish()
        logits: Tensor = out.logits
        return logits.float()

    def _check_forward(self, ids: Tensor, mask: Tensor, selections: Sequence[Selection | None]) -> None:
        if ids.dim() != 2 or ids.shape != mask.shape or len(selections) != len(ids):
            raise InvalidInput(
                f"forward wants ids and mask of one shape [B, S] and B selections; got {list(ids.shape)}, "
                f"{list(mask.shape)} and {len(selections)}."
            )
        if ids.numel() > self.plan.chunk_tokens:
            raise InvalidInput(
                f"{ids.shape[0]} rows x {ids.shape[1]} positions are {ids.numel()} tokens in one pass; the plan's "
                "workspace is "
                f"for {self.plan.chunk_tokens}. Send fewer rows at once, or open the engine with a larger chunk_tokens."
            )

    def generate(self, requests: Sequence[GenerationRequest]) -> Generator[Event, None, None]:
        """One event after another, rows numbered as in `requests`.

        What does not fit beside those that run (rows, slots) joins as soon as it does.
        """
        for request in requests:
            self.check(request)
        return self._run(list(enumerate(requests)))

    def _run(self, waiting: list[tuple[int, GenerationRequest]]) -> Generator[Event, None, None]:
        submitted = time.perf_counter()
        predicted = [self.predict(request) for _, request in waiting]
        with Batch(self) as batch:
            while waiting or len(batch):
                for number, request in list(waiting):
                    if batch.fits(request.selection):
                        batch.admit(number, request, Submission(submitted, predicted[number]))
                        waiting.remove((number, request))
                for event in batch.step():
                    if isinstance(event, FailedEvent):
                        raise event.error
                    yield event

    def check(self, request: GenerationRequest) -> None:
        """Raises InvalidInput or BudgetError for a request that could not be served even alone."""
        length, budget = len(request.prompt), request.sampling.max_tokens
        if not length:
            raise InvalidInput("The prompt is empty. Send at least one token of text.", param="prompt")
        if length + budget > self.plan.max_context:
            raise InvalidInput(
                f"The prompt has {length} tokens and max_tokens is {budget}, together {length + budget}; the context "
                "holds "
                f"{self.plan.max_context}. Shorten the prompt, lower max_tokens, or serve with a larger max_context.",
                param="max_tokens" if length < self.plan.max_context else "prompt",
                code="context_length_exceeded",
            )
        if not all(0 <= token < self.card.vocab for token in request.prompt):
            raise InvalidInput(f"A prompt token is outside the vocabulary of {self.card.vocab}.", param="prompt")
        if request.selection is not None:
            self._check_selection(request.selection)

    def _check_selection(self, selection: Selection) -> None:
        self.board.check_selection(selection)
        self.plan.require(selection)
        if selection.stand_in is None:
            return
        wanted, got = (self.card.layers, self.card.experts, self.card.hidden), selection.stand_in.vectors.shape
        if got != wanted:
            raise InvalidInput(
                f"The stand-ins {selection.stand_in.id} are {list(got)}, this model has {list(wanted)} (layers, "
                "experts, width). They were made for another model: profile this one.",
                param="selection",
            )

    def has_room(self, selection: Selection | None, *, spare: bool) -> bool:
        """Whether slots are free, beside all leases, for what `selection` lacks, and `spare` one more to page
        through."""
        if selection is not None and not self.board.stand_ins.has_room(selection.stand_in):
            return False
        wanted = self.bank.residency.unpinned(selection or ())
        return wanted + (spare and not self.holds_all) <= self.bank.residency.available

    def missing_bytes(self, selection: Selection | None) -> int:
        """What would have to be read for the selection; None: for every expert there is."""
        table, sizes = self.bank.residency.table, self.bank.expert_bytes
        if selection is None:
            return sum(row.count(ABSENT) * size for row, size in zip(table, sizes, strict=True))
        return sum((table[key.layer][key.expert] == ABSENT) * sizes[key.layer] for key in selection)

    def predict(self, request: GenerationRequest) -> SwapCost | None:
        """What the request would wait for if it began now; None where its routing decides. Callable from any thread."""
        missing = self.missing_bytes(request.selection)
        if request.selection is None and missing:
            return None
        return SwapCost(missing, missing / self.bytes_per_second)

    @property
    def bytes_per_second(self) -> float:
        """Of experts that are read: measured, the model's other weights at open included. Callable from any thread."""
        return self._reader.meter.bytes_per_second or GUESSED_BYTES_PER_SECOND

    @property
    def holds_all(self) -> bool:
        """Whether there is a slot for every expert."""
        return self.plan.slots >= self.card.layers * self.card.experts

    @torch.inference_mode()
    def step(self, ids: Tensor, mask: Tensor, cache: KvCache, routing: Routing) -> Tensor:
        """Continue `cache` by `ids` [B, new] under `mask` [B, everything so far]. Logits of the last column, [B, V]."""
        new = ids.shape[1]
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]  # [B, new]
        routing.begin(new, mask[:, -new:].bool())
        try:
            out: Any = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        except BaseException:
            routing.abort()
            raise
        routing.finish()
        logits: Tensor = out.logits
        return logits[:, -1]

    def require_free_slot(self, selections: Sequence[Selection | None]) -> None:
        if any(selection is None for selection in selections) and not self.bank.reaches_all:
            raise BudgetError(
                f"Exact mode pages experts through free slots, and leases hold all {self.plan.slots}. "
                "Wait for one to end, or raise the memory budget."
            )

    @contextmanager
    def _observed(self, observer: Observer, routing: Routing) -> Iterator[None]:
        """Everything of one pass is shown to `observer`."""
        routing.observer = observer
        handles = []
        for layer, (joint, paged) in enumerate(zip(self._joints, self._experts, strict=True)):
            handles.append(joint.residual.register_forward_pre_hook(_residual_hook(observer, layer), with_kwargs=True))
            paged.observer = observer
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for paged in self._experts:
                paged.observer = None


def _read_ahead(config: EngineConfig, plan: MemoryPlan, layout: SlotLayout) -> int:
    """How many experts exact mode may read on a guess at a time. Raises InvalidInput where it was asked for in vain."""
    direct = layout.direct and config.device == "cpu"
    if config.read_ahead and not direct:
        raise InvalidInput(
            f"read_ahead ({config.read_ahead}) needs experts that go from the file straight into their slots; here "
            f"their bytes change on the way (dtype {plan.dtype}, device {config.device}). Leave it out, or serve in "
            "the checkpoint's own dtype on the CPU.",
            param="read_ahead",
        )
    return 0 if plan.slots >= plan.layers * plan.experts else config.read_ahead  # then nothing is ever paged twice


def _check_cache(skeleton: Skeleton, plan: MemoryPlan) -> None:
    """The plan's formula against what the model really keeps for a token, before the cache is allocated."""
    per_token = sum(heads * width for layer in skeleton.kv_shapes for heads, width in layer)
    needed = per_token * plan.max_batch * plan.max_context * skeleton.layout.dtype.itemsize
    if needed > plan.kv_bytes:
        raise UnsupportedFamily(
            f"{type(skeleton.model).__name__} keeps {needed} bytes of keys and values, planned were {plan.kv_bytes}: "
            "its "
            "attention is of a kind that the memory plan does not know."
        )


def _residual_hook(observer: Observer, layer: int) -> Any:
    def hook(_: object, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        states = (*args, *named.values())[0]  # [B, S, H] or [T, H]
        observer.residual(layer, states.reshape(-1, states.shape[-1]))

    return hook
