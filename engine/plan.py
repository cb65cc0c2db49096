"""What fits into the memory budget. Pure arithmetic on a ModelCard, done and shown before anything is loaded.

dense      every tensor that all tokens need, in the serving dtype
kv         max_batch rows x max_context tokens x the model's keys and values (sliding windows counted in full)
states     max_batch rows x the running states (linear attention, state spaces, convolutions), which do not grow,
           twice: a pass works on copies
staging    the reader's aligned buffers, and a ring of more (RingShape) where bytes need a cast or another device
stand-ins  one vector of H float32 for each expert, as many sets as the config allows at once
routers    sliced copies of the routers, for at most max_batch different selections at once
workspace  activations of chunk_tokens tokens, see `_workspace`, the states of a context's tokens between two layers,
           and one expert unpacked where slots hold quantised weights
kernels    what torch compiles in 16 bits for every shape of matrix; where our own products take many rows it compiles
           none, and this is what each thread of theirs keeps: one expert's inputs and inner columns, of 64 tokens
slots      the rest of the budget, at most one slot for each expert
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

from engine.card import ITEMSIZE, ModelCard
from engine.config import EngineConfig
from store.errors import BudgetError
from store.quantisation import FP8
from store.records import Selection
from store.sizes import show_bytes

DEFAULT_CONTEXT = 2048
SLOT_ALIGN = 64
READER_THREADS = 4  # one copies out of its buffer while three requests are with the disk
MIB = 2**20
BUFFER_BYTES = 2 * MIB  # of small experts of a layer that are staged together
RING_BYTES = 64 * MIB  # of staged experts on their way, unless two of them are more
BUFFERS = 5  # one is emptied while every thread fills another
PAGE = 4096
COMPILED = find_spec("engine._products") is not None
MULTIPLIED = frozenset({"float32", "bfloat16"})  # by our own products


class RingShape(NamedTuple):
    """The buffers between files and slots: each holds one expert as stored, or several small ones of a layer."""

    buffers: int
    nbytes: int

    @classmethod
    def of(cls, staged: int, experts: int) -> RingShape:
        """For `experts` experts a layer that take `staged` bytes each. Two at least: one is read, one is emptied."""
        size = -(-max(staged, min(BUFFER_BYTES, experts * staged)) // PAGE) * PAGE
        return cls(max(2, min(BUFFERS, RING_BYTES // size)), size)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on the device, and how many experts they hold. `budget` None: everything fits by definition."""

    budget: int | None
    dense_bytes: int
    kv_bytes: int
    state_bytes: int
    staging_bytes: int
    router_bytes: int
    stand_in_bytes: int
    kernel_bytes: int
    workspace_bytes: int
    slot_bytes: int
    slots: int
    layers: int
    experts: int
    top_k: int
    least: int  # experts of a layer, without which it does not serve
    max_context: int
    max_batch: int
    chunk_tokens: int
    dtype: str
    slots_in: str  # what experts' matrices are in their slots: the dtype, or the way in which they are quantised
    stand_ins: int
    carried_tokens: int = 0  # whose hidden states the workspace holds beside half a chunk: a whole context's at least

    @property
    def quantised(self) -> bool:
        """Whether experts lie in a slot as in the file, quantised."""
        return self.slots_in != self.dtype

    @property
    def fixed_bytes(self) -> int:
        """Everything but the slots."""
        held = self.dense_bytes + self.kv_bytes + self.state_bytes + self.staging_bytes + self.router_bytes
        return held + self.stand_in_bytes + self.kernel_bytes + self.workspace_bytes

    @property
    def total_bytes(self) -> int:
        return self.fixed_bytes + self.slots * self.slot_bytes

    @property
    def slots_per_layer(self) -> int:
        return self.slots // self.layers

    @property
    def keep(self) -> float:
        """The largest share of the experts that is resident at once."""
        return self.slots / (self.layers * self.experts)

    @property
    def floor_bytes(self) -> int:
        """The smallest budget that serves at all: one token's experts in every layer."""
        return self.fixed_bytes + self.layers * self.least * self.slot_bytes

    def fits(self, selection: Selection) -> bool:
        """Whether the whole selection is resident at once, every layer with enough experts for one token."""
        enough = len(selection) <= self.slots and min(map(len, selection.experts), default=0) >= self.least
        return enough and (selection.stand_in is None or self.stand_ins > 0)

    def bytes_of(self, selection: Selection) -> int:
        """Of its experts, and of what stands in for the others."""
        return len(selection) * self.slot_bytes + (selection.stand_in.nbytes if selection.stand_in else 0)

    def token_bytes(self, selection: Selection | None) -> int:
        """What a token reads of experts: as many as it calls, in all layers; of experts in strips, at most that."""
        if selection is None:
            return self.slot_bytes * self.layers * self.top_k
        calls = selection.calls or [min(self.top_k, len(ids)) for ids in selection.experts]
        return self.slot_bytes * sum(calls)

    def memory_for(self, keep: float) -> int:
        """The budget under which this share of every layer's experts is resident."""
        per_layer = max(self.least, round(keep * self.experts))
        return self.fixed_bytes + self.layers * per_layer * self.slot_bytes

    def require(self, selection: Selection) -> None:
        """Raises BudgetError with the numbers and the fix unless the selection fits."""
        if self.fits(selection):
            return
        if selection.stand_in is not None and not self.stand_ins:
            raise BudgetError(
                f"The selection has stand-ins of {show_bytes(selection.stand_in.nbytes)}, and the memory plan foresees "
                "none. Open the engine with stand_ins (MOEPAGER_STAND_INS) of 1 or more."
            )
        needed = self.fixed_bytes + self.bytes_of(selection)
        raise BudgetError(
            f"The selection has {len(selection)} experts, {show_bytes(self.bytes_of(selection))}; {self.slots} slots "
            "fit into "
            f"the budget of {show_bytes(self.budget or 0)}. Serve with --memory {_mib(needed)} or more, or keep at "
            "most "
            f"{self.slots_per_layer} of {self.experts} experts a layer ({self.slots_per_layer / self.experts:.0%})."
        )


def plan_memory(card: ModelCard, config: EngineConfig) -> MemoryPlan:
    """The plan, or BudgetError with every number and the smallest --memory that works."""
    dtype = card.geometry.dtype if config.dtype == "auto" else config.dtype
    size = ITEMSIZE[dtype]
    context = min(card.max_context, config.max_context or DEFAULT_CONTEXT)
    chunk = config.chunk_tokens or (4096 if config.memory is None else 512)
    kept = keeps_quantised(card, config)
    counts = card.geometry.expert if kept else (*card.geometry.expert, *card.geometry.unpacked)
    parts = [*(count * size for count in counts), *(card.geometry.packed if kept else ())]
    slot = sum(-(-part // SLOT_ALIGN) * SLOT_ALIGN for part in parts)
    unpacked = sum(card.geometry.unpacked) if kept else 0
    states = 2 * config.max_batch * (card.geometry.states.numbers * size + card.geometry.states.nbytes)
    plan = MemoryPlan(
        budget=config.memory,
        dense_bytes=card.geometry.dense * size,
        kv_bytes=config.max_batch * context * card.geometry.kv_per_token * size,
        state_bytes=states,
        staging_bytes=_staging(card, config, dtype),
        router_bytes=config.max_batch * card.layers * card.experts * (card.hidden + 2) * size,
        stand_in_bytes=config.stand_ins * card.layers * card.experts * card.hidden * 4,
        kernel_bytes=_kernels(card, chunk) if config.device == "cpu" and size == 2 else 0,
        workspace_bytes=_workspace(card, chunk, context, config.max_batch, size)
        + (_carried(card, chunk, context) + unpacked) * size
        + _beside_states(card, config, chunk),
        slot_bytes=slot,
        slots=card.layers * card.experts,
        layers=card.layers,
        experts=card.experts,
        top_k=card.top_k,
        least=card.least,
        max_context=context,
        max_batch=config.max_batch,
        chunk_tokens=chunk,
        dtype=dtype,
        slots_in=card.geometry.way if kept else dtype,
        stand_ins=config.stand_ins,
        carried_tokens=max(context, _carried_free(card, chunk)),
    )
    return plan if config.memory is None else _within(plan, config.memory)


def reader_bytes(card: ModelCard) -> int:
    """One reader thread's buffer: a whole expert where that is reasonable, so that it is one request."""
    return min(8 * MIB, max(256 * 1024, -(-card.expert_bytes // 4096) * 4096 + 8192))


def needs_staging(card: ModelCard, config: EngineConfig, dtype: str) -> bool:
    """Whether an expert's bytes change on their way: another dtype than the file's, or another device than the host."""
    geometry = card.geometry
    converted = bool(geometry.way) and not keeps_quantised(card, config)
    changes = dtype != geometry.stored and bool(geometry.expert)
    return converted or changes or config.device != "cpu"


def keeps_quantised(card: ModelCard, config: EngineConfig) -> bool:
    """Whether experts lie in a slot as in the file, quantised. Four bits always do.

    FP8 becomes the serving dtype on its way in where layers differ, which share slots, and where every use would pass
    through torch: on other devices, and without our own products.
    """
    if card.geometry.way != FP8:
        return bool(card.geometry.way)
    return multiplies_itself(card, config) and card.geometry.alike


def multiplies_itself(card: ModelCard, config: EngineConfig) -> bool:
    """Whether our own products are used."""
    dtype = card.geometry.dtype if config.dtype == "auto" else config.dtype
    return config.device == "cpu" and config.kernel != "torch" and COMPILED and dtype in MULTIPLIED


def _staging(card: ModelCard, config: EngineConfig, dtype: str) -> int:
    """The reader's buffers; the ring's, as many bytes as one of them on a device of its own, and scratch for FP8: a few
    rows, which only torch's conversion takes. Which one it will be is not known without torch."""
    reader = READER_THREADS * reader_bytes(card)
    if not needs_staging(card, config, dtype):
        return reader
    ring = RingShape.of(card.geometry.staged, card.experts)
    return reader + (ring.buffers + (config.device != "cpu")) * ring.nbytes + card.geometry.scratch


def _kernels(card: ModelCard, chunk: int) -> int:
    """For every matrix shape (a sliced router is one more) and every power of two up to `chunk` rows: as measured, at
    most three quarters of a megabyte up to 128 rows and one and a half above."""
    sizes = [0.75 if power <= 7 else 1.5 for power in range((chunk - 1).bit_length() + 1)]
    return int((card.geometry.matrices + 1) * sum(sizes) * MIB)


def _workspace(card: ModelCard, chunk: int, context: int, batch: int, size: int) -> int:
    """An upper estimate of activations alive at once, for `chunk` tokens in one pass.

    Of one layer: residual stream and norms (8 H), query, key, value and context (6 widths), the routed experts' inputs
    and outputs (2 k H) with the busiest expert's inner columns (3 widths), a dense or shared feed-forward (3 widths);
    router logits and probabilities in f32 (6 E); the attention mask, and all heads' scores where the kernel is not
    fused; its cached keys and values spread to all heads. Kept for the coverage of all layers: weights and indices of
    k experts (12 L k). Logits of one position a row, three times in f32 (sampling sorts them).
    """
    geometry = card.geometry
    routing = 6 * card.experts * 4 + 12 * card.layers * card.top_k
    attention = context * (5 + 8 * geometry.scored_heads)
    expanded = batch * context * 2 * geometry.attention_width * size
    return chunk * (_columns(card) * size + routing + attention) + expanded + 3 * batch * card.vocab * 4


def _beside_states(card: ModelCard, config: EngineConfig, chunk: int) -> int:
    """What layers with running states work in, as counted on shapes alone, and a quarter more: kernels take memory of
    their own. Most lay each row out in chunks of theirs, so a row counts however short it is."""
    token, row = card.geometry.states.working_own if multiplies_itself(card, config) else card.geometry.states.working
    return 5 * (chunk * token + config.max_batch * row) // 4


def _columns(card: ModelCard) -> int:
    """Numbers in the serving dtype that a token of a pass needs in one layer, see `_workspace`."""
    geometry = card.geometry
    columns = 8 * card.hidden + 6 * geometry.attention_width + 2 * card.top_k * card.hidden
    return columns + 3 * geometry.expert_width + 3 * geometry.dense_width


def _carried_free(card: ModelCard, chunk: int) -> int:
    """Tokens whose hidden states, one each, take the place of half a chunk's numbers: a prompt that goes through layer
    by layer takes but half as many tokens a pass."""
    return (chunk - chunk // 2) * _columns(card) // card.hidden


def _carried(card: ModelCard, chunk: int, context: int) -> int:
    """Numbers of the hidden states for which that is not enough, where a prompt is as long as it may be."""
    return max(0, context - _carried_free(card, chunk)) * card.hidden


def _within(plan: MemoryPlan, budget: int) -> MemoryPlan:
    slots = min(plan.slots, (budget - plan.fixed_bytes) // plan.slot_bytes)
    if slots < plan.layers * plan.least:
        raise BudgetError(
            f"A budget of {show_bytes(budget)} can't serve this model. It needs {show_bytes(plan.dense_bytes)} of "
            "dense weights, "
            f"{show_bytes(plan.kv_bytes)} of KV cache ({plan.max_batch} rows x {plan.max_context} tokens), "
            f"{_states(plan)}"
            f"{show_bytes(plan.staging_bytes + plan.router_bytes)} of staging and router copies, "
            f"{show_bytes(plan.kernel_bytes)} of compiled kernels, "
            f"{show_bytes(plan.workspace_bytes)} of workspace ({plan.chunk_tokens} tokens at once) and at least "
            f"{plan.layers} x {plan.least} slots of {show_bytes(plan.slot_bytes)}. Give --memory "
            f"{_mib(plan.floor_bytes)} or more: "
            f"that keeps {plan.least / plan.experts:.1%} of the experts resident, {_mib(plan.memory_for(0.5))} keeps "
            "half. "
            "A smaller max_context, max_batch or chunk_tokens lowers the floor; so does dtype float32 for a small "
            "model."
        )
    return MemoryPlan(**{name: getattr(plan, name) for name in plan.__slots__} | {"budget": budget, "slots": slots})


def _states(plan: MemoryPlan) -> str:
    return f"{show_bytes(plan.state_bytes)} of running states, " if plan.state_bytes else ""


def _mib(size: int) -> str:
    return f"{-(-size // MIB)}MiB"
