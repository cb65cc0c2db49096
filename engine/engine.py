"""The engine: a paged Mixture-of-Experts model on a device. Puts the room's parts together; owned by one thread.

B rows, S positions, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType

import torch
from torch import Tensor

from engine import dispatch
from engine.admission import Admission
from engine.bank import Bank, Lease
from engine.cache_shape import row_bytes
from engine.card import ModelCard
from engine.config import EngineConfig
from engine.continuation import goes_on
from engine.dense import load_dense
from engine.device import open_device
from engine.experts import PagedExperts
from engine.generate import Batch
from engine.head import Head
from engine.kernels import Kernels
from engine.kvcache import KvPool
from engine.layer_block import adopt_layers
from engine.layers import Layers
from engine.lookahead import Lookahead
from engine.observer import Observer
from engine.occupancy import Occupancy, ResidencySnapshot
from engine.passes import Passes
from engine.plan import READER_THREADS, MemoryPlan, multiplies_itself, plan_memory, reader_bytes
from engine.reader import Access, Reader
from engine.requests import Event, FailedEvent, GenerationRequest, Submission
from engine.restriction import adopt_linear
from engine.routing import Routing
from engine.skeleton import Skeleton, build_skeleton
from engine.stand_ins import DeviceStandIns
from engine.step import Step
from engine.strips import Strips, fold_routers
from engine.switchboard import Switchboard
from engine.text import Tokenizer
from store.checkpoint import CheckpointMap
from store.errors import UnsupportedFamily
from store.experts import ExpertMap
from store.records import Selection


class Engine:
    """Use `Engine.open`. Every method but `residency` belongs to the thread that owns the device."""

    def __init__(
        self, checkpoint: CheckpointMap, card: ModelCard, plan: MemoryPlan, tokenizer: Tokenizer, skeleton: Skeleton,
        bank: Bank, reader: Reader, device: torch.device, kernels: Kernels, strips: Strips,
    ) -> None:  # fmt: skip
        self.checkpoint, self.card, self.plan = checkpoint, card, plan
        self.tokenizer, self.bank, self.device = tokenizer, bank, device
        self._reader = reader
        experts = [PagedExperts(at, joint.experts, bank, kernels) for at, joint in enumerate(skeleton.joints)]
        for joint, paged in zip(skeleton.joints, experts, strict=True):
            dispatch.bind(joint.experts, paged)
        routers = [joint.router for joint in skeleton.joints]
        stand_ins = DeviceStandIns(plan.stand_ins, device)
        top_k = card.top_k // strips.count
        self.board = Switchboard(routers, strips, top_k, remembered=plan.max_batch, stand_ins=stand_ins)
        for paged in experts:
            paged.added = self.board.added
        if bank.guesses.most:
            guesses = bank.guesses
            self.board.lookahead = Lookahead(self.board.routes, card.experts, guesses.expect, guesses.drop_all)
        with torch.inference_mode():
            self.board.check(card.hidden)
            self.kernel, step = _adopt_layers(skeleton, experts, self.board, kernels, plan.max_context)
        self.admission = Admission(card, plan, self.board, bank, reader.meter)
        self.passes = Passes(skeleton, experts, step)
        self.layers = Layers(self, skeleton, experts)
        self.head = Head(skeleton.model, max(plan.max_batch, 64 if plan.budget is None else 1))
        _check_cache(skeleton, plan)
        self.kv = KvPool(skeleton.caches, plan.max_batch, plan.max_context, getattr(torch, plan.dtype), device)
        if any(shape.states for shape in skeleton.caches):
            self.passes.goes_on = goes_on(skeleton.model, skeleton.joints, self.kv)

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
        skeleton, renaming = build_skeleton(checkpoint, experts, plan.dtype, plan.quantised)
        checkpoint.papers.check()  # tokenizer and config were read by their paths, after the fingerprint's were
        kernels = Kernels.choose(config.kernel, skeleton.layout.dtype, device)
        assert skeleton.layout.slot_bytes <= plan.slot_bytes, (skeleton.layout.slot_bytes, plan.slot_bytes)
        reader = Reader(reader_bytes(card), READER_THREADS)
        try:
            reader.hold(checkpoint.identities)
            load_dense(skeleton.model, renaming, checkpoint, experts, reader, device)
            routers = [joint.router for joint in skeleton.joints]
            strips = fold_routers(routers, card.strips, card.top_k, card.hidden)
            kernels.adopt(skeleton.model, skeleton.layout.dtype, device)
            _check_functions(card, config, kernels)
            if kernels.own is not None:
                for router in routers:
                    adopt_linear(router, kernels.linear)
            pages = plan.slots < plan.layers * plan.experts  # else nothing is ever read twice
            ahead = config.read_ahead if pages else 0
            bank = Bank(skeleton.layout, experts, plan.slots, device, reader, ahead)
            return cls(checkpoint, card, plan, tokenizer, skeleton, bank, reader, device, kernels, strips)
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

    def residency(self) -> ResidencySnapshot:
        """A snapshot; callable from any thread, exact only between tokens."""
        return ResidencySnapshot.of(self.bank)

    def occupancy(self) -> Occupancy:
        """Which slot every expert is in; callable from any thread, exact only between tokens."""
        return Occupancy.of(self.bank)

    @property
    def access(self) -> Access:
        """How the checkpoint's files are read; callable from any thread."""
        return self._reader.access

    def evict(self) -> int:
        """Forget every expert that no lease holds, so that the next lease reads all of its own. Gives their number."""
        return self.bank.residency.evict_idle()

    @contextmanager
    def lease(self, selection: Selection, *, ahead: bool = False) -> Iterator[Lease]:
        """Page in what is missing of `selection` and hold it until the block ends; `ahead`: see Bank.lease.

        What stands in for the other experts is held with it.
        """
        self.admission.check_selection(selection)
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
        self.admission.check_pass(ids, mask, selections)
        with ExitStack() as stack:
            for selection in dict.fromkeys(selections):
                if selection is not None:
                    stack.enter_context(self.lease(selection, ahead=True))
            self.admission.require_free_slot(selections)
            routing = Routing(self.board, selections, self.device)
            if observer is not None:
                stack.enter_context(self.passes.observed(observer, routing))
            return self.passes.whole(ids.to(self.device), mask.to(self.device), routing), routing.coverage()

    def generate(self, requests: Sequence[GenerationRequest]) -> Generator[Event, None, None]:
        """One event after another, rows numbered as in `requests`.

        What does not fit beside those that run (rows, slots) joins as soon as it does.
        """
        for request in requests:
            self.admission.check(request)
        return self._run(list(enumerate(requests)))

    def _run(self, waiting: list[tuple[int, GenerationRequest]]) -> Generator[Event, None, None]:
        submitted = time.perf_counter()
        predicted = [self.admission.predict(request) for _, request in waiting]
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


def _adopt_layers(
    skeleton: Skeleton, experts: Sequence[PagedExperts], board: Switchboard, kernels: Kernels, context: int
) -> tuple[str, Step | None]:
    """The kernel's name, with how many decoder layers of single tokens are its own, of how many layers the running
    states, whether those of prompts are, and whole steps where all are."""
    if kernels.own is None:
        return kernels.name, None
    blocks = adopt_layers(skeleton.model, skeleton.joints, experts, board, kernels.own, kernels.few)
    step = Step.of(skeleton.model, blocks, context)
    around = "" if step is None else ", nothing around them"
    prompts = ", prompts too" if any(block.wide is not None for block in blocks) else ""
    split = f", experts in {board.strips.count} strips" if board.strips.count > 1 else ""
    running = f", running states of {kernels.running}" if kernels.running else ""
    layers = f"{len(blocks)} of {len(skeleton.caches)} decoder layers in two calls"
    return f"{kernels.name}, {layers}{around}{running}{prompts}{split}", step


def _check_functions(card: ModelCard, config: EngineConfig, kernels: Kernels) -> None:
    """The plan counts on our own functions of running states, which take less memory than transformers'."""
    wanted = card.geometry.states.modules
    if multiplies_itself(card, config) and kernels.running != wanted:
        raise UnsupportedFamily(
            f"{card.family} has functions beside {wanted} modules with running states, and those of {kernels.running} "
            "do what our own products do: another version of transformers may have changed them. Serve with kernel "
            "torch."
        )


def _check_cache(skeleton: Skeleton, plan: MemoryPlan) -> None:
    """The plan's formulas against what the model really keeps, before the cache is allocated."""
    columns = plan.max_batch * plan.max_context * sum(shape.numbers for shape in skeleton.caches)
    needed = columns * skeleton.layout.dtype.itemsize
    states = plan.max_batch * row_bytes(skeleton.caches)
    if needed > plan.kv_bytes or states > plan.state_bytes:
        raise UnsupportedFamily(
            f"{type(skeleton.model).__name__} keeps {needed} bytes of columns and {states} of running states, planned "
            f"were {plan.kv_bytes} and {plan.state_bytes}: its attention is of a kind that the memory plan does not "
            "know."
        )
