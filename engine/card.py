"""What a model folder says about itself: sizes and shapes for planning.

Reads config.json and headers, no weights. torch is imported only for models with running states or indexers, whose
caches no formula here gives: their model is tried on shapes alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from store.checkpoint import CheckpointMap
from store.errors import CheckpointError, UnsupportedFamily
from store.experts import ExpertMap, Kind
from store.fingerprint import Fingerprint
from store.quantised import Quantised, scratch_bytes
from store.records import ExpertKey
from store.shard import TensorSpan

ITEMSIZE: Mapping[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
NAMES: Mapping[str, str] = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# How configs call the number of experts a token goes through.
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts", "top_k")
MAX_CONTEXT = ("max_position_embeddings", "model_max_length")
STRIPS = "expert_strips"  # how packs in strips call the number of strips that each expert was cut into
BLOCKS = "layers_block_type"  # how some configs list their decoder layers
STATE_SPACE, NO_ATTENTION = "mamba", frozenset({"moe", "mlp"})
FULL_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
OLDER: Mapping[str, str] = {"attention": "full_attention", "deepseek_sparse_attention": "indexed_attention"}
# Kinds whose caches are found by trying the model, and what tensors of theirs are called where no kind is named.
TRIED = frozenset({"linear_attention", STATE_SPACE, "conv", "indexed_attention", "hybrid", "hybrid_sliding"})
INDEXER = "indexer"
TRIED_TENSORS = ("conv", INDEXER, "A_log")


class States(NamedTuple):
    """A row's running states."""

    numbers: int = 0  # that are in the serving dtype
    nbytes: int = 0  # of those that are not
    working: tuple[int, int] = (0, 0)  # bytes that layers with them work in, for a token of a pass and for a row,
    working_own: tuple[int, int] = (0, 0)  # and by our own products, whose functions
    modules: int = 0  # so many call then


NO_STATES = States()


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shapes that a memory plan is made of; counts are elements, not bytes."""

    dtype: str  # the checkpoint's own
    stored: str  # of experts' plain parts, "mixed" where parts or layers differ, "" where all are quantised
    way: str  # in which the experts of any layer are quantised, "" for none
    alike: bool  # whether the experts of all layers are stored in the same way
    dense: int  # in tensors that every token needs
    expert: tuple[int, ...]  # of each plain part of one expert
    packed: tuple[int, ...]  # bytes of each part of its quantised matrices: of numbers, of scales
    unpacked: tuple[int, ...]  # numbers in each of these
    staged: int  # bytes that an expert takes in a buffer as it is stored
    scratch: int  # bytes that turning FP8 into the serving dtype needs besides, 0 where nothing is FP8
    expert_width: int  # columns of the widest activation inside an expert
    kv_per_token: int  # keys and values (and indexers' keys) of all layers, as transformers keeps them
    states: States
    decoder_layers: int
    attention_width: int  # heads x head dim, the widest of query, key and value
    scored_heads: int  # heads whose attention scores are written out, 0 where the kernel is fused
    dense_width: int  # the widest dense or shared feed-forward
    matrices: int  # different shapes among dense and expert matrices


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One model folder.

    `layers` counts MoE layers, `expert_bytes` is one expert's on the disk, `max_context` the model's own. Where experts
    are cut into `strips`, each is what the other numbers count as an expert.
    """

    folder: Path
    family: str
    layers: int
    experts: int
    top_k: int
    hidden: int
    vocab: int
    max_context: int
    expert_bytes: int
    hashes: Fingerprint
    geometry: Geometry
    strips: int = 1

    @property
    def least(self) -> int:
        """How few experts a layer can serve with: those that one token goes through, of each the smallest piece."""
        return self.top_k // self.strips

    @property
    def fingerprint(self) -> str:
        """What a profile is of: config, weights and tokenizer."""
        return self.hashes.whole

    @classmethod
    def read(cls, folder: Path | str) -> ModelCard:
        """Maps the checkpoint and describes it. Raises CheckpointError, or UnsupportedFamily with the reason."""
        checkpoint = CheckpointMap.open(folder)
        return cls.describe(checkpoint, ExpertMap.build(checkpoint))

    @classmethod
    def describe(cls, checkpoint: CheckpointMap, experts: ExpertMap) -> ModelCard:
        config = _text_config(checkpoint.config)
        _refuse_the_unservable(config)
        return cls(
            folder=Path(checkpoint.folder),
            family=str(checkpoint.config.get("model_type", "")),
            layers=len(experts.layers),
            experts=experts.experts,
            top_k=_number(config, *TOP_K),
            hidden=_number(config, "hidden_size"),
            vocab=_number(config, "vocab_size"),
            max_context=_number(config, *MAX_CONTEXT),
            expert_bytes=max(experts.expert_bytes),
            hashes=checkpoint.fingerprint(),
            geometry=_geometry(config, checkpoint, experts),
            strips=_strips(config, experts.experts),
        )


def _refuse_the_unservable(config: Mapping[str, Any]) -> None:
    if other := sorted(_layer_kinds(config) - FULL_ATTENTION - TRIED):
        raise UnsupportedFamily(
            f"Layers of kind {', '.join(other)} keep a state that moepager's cache does not hold. "
            f"Supported are {', '.join(sorted(FULL_ATTENTION | TRIED))}."
        )


def _strips(config: Mapping[str, Any], experts: int) -> int:
    strips = config.get(STRIPS, 1)
    if type(strips) is not int or strips < 1 or experts % strips or _number(config, *TOP_K) % strips:
        raise CheckpointError(
            f"config.json says {STRIPS} {strips!r}, a number that divides {experts} experts and the "
            f"{_number(config, *TOP_K)} of a token. Pack the model again."
        )
    return strips


def _layer_kinds(config: Mapping[str, Any]) -> set[str]:
    """The kinds of attention that the config names. Older hybrids name none, but the sizes of their state spaces."""
    named = set(config.get("layer_types") or ()) | set(config.get(BLOCKS) or ())
    kinds = {OLDER.get(kind, kind) for kind in named}
    return kinds - NO_ATTENTION | {STATE_SPACE for name in config if name.startswith(STATE_SPACE)}


def _geometry(config: Mapping[str, Any], checkpoint: CheckpointMap, experts: ExpertMap) -> Geometry:
    every = experts.span(ExpertKey(0, 0)).parts
    plain = [part for part in every if part.kind is Kind.PLAIN]
    packed = [part for part in every if part.kind is Kind.NUMBERS]
    shapes = [part.matrix[1] for part in (*plain, *packed)]
    itemsize = {name: ITEMSIZE[dtype] for name, dtype in NAMES.items()}
    dense = [_as_plain(checkpoint.tensors[name], experts.quantised) for name in experts.dense]
    if strange := sorted({span.dtype for span in dense} - itemsize.keys()):
        raise UnsupportedFamily(
            f"Dense weights are stored as {', '.join(strange)}; use a bfloat16 or float32 checkpoint."
        )
    heads = _number(config, "num_attention_heads")
    layers = len(config.get(BLOCKS) or ()) or _number(config, "num_hidden_layers")
    cached, width = _attention_shape(config, heads, layers, dense)
    states, numbers = NO_STATES, sum(span.nbytes // itemsize[span.dtype] for span in dense)
    if _layer_kinds(config) & TRIED or any(sign in span.name for span in dense for sign in TRIED_TENSORS):
        cached, states, loaded = _tried(Path(checkpoint.folder))
        numbers = min(numbers, loaded)
    return Geometry(
        dtype=_dtype(config, "" if packed else every[0].dtype),
        stored=_stored(experts),
        way=experts.way,
        alike=experts.alike,
        dense=numbers,
        expert=tuple(prod(part.shape) for part in plain),
        packed=tuple(part.nbytes for part in every if part.kind is not Kind.PLAIN),
        unpacked=tuple(prod(part.matrix[1]) for part in packed),
        staged=experts.staged_bytes,
        scratch=_scratch(experts),
        expert_width=max(length for shape in shapes for length in shape),
        kv_per_token=cached,
        states=states,
        decoder_layers=layers,
        attention_width=width,
        scored_heads=_scored_heads(config, heads, experts.dense),
        matrices=len({shape for shape in shapes if len(shape) == 2}),
        dense_width=max(
            int(config.get(name) or 0) for name in ("intermediate_size", "shared_expert_intermediate_size")
        ),
    )


def _tried(folder: Path) -> tuple[int, States, int]:
    """What all layers cache for one token, in numbers, the running states of a row, and how many numbers are loaded
    besides experts."""
    import torch  # noqa: PLC0415 - seconds to import, which other models need not wait for

    from engine.tried import try_layers  # noqa: PLC0415

    tried = try_layers(folder, "bfloat16")
    held = [state for cache in tried.caches for state in cache.states]
    numbers = sum(prod(state.shape) for state in held if state.dtype == torch.bfloat16)
    nbytes = sum(state.nbytes for state in held if state.dtype != torch.bfloat16)
    states = States(numbers, nbytes, tried.theirs, tried.ours, tried.modules)
    return sum(cache.numbers for cache in tried.caches), states, tried.dense


def _stored(experts: ExpertMap) -> str:
    """How every expert's values lie in the files; "mixed" where they differ, "" where the engine can't use them."""
    parts = [part for layer in experts.spans for part in layer[0].parts]
    kinds = {part.dtype for part in parts if part.kind is Kind.PLAIN}
    return "mixed" if len(kinds) > 1 or not experts.alike else NAMES.get(kinds.pop(), "") if kinds else ""


def _as_plain(span: TensorSpan, quantised: Quantised | None) -> TensorSpan:
    """A dense tensor of quantised numbers as a header would have its matrix in bfloat16; any other as it is."""
    if quantised is None or span.name not in quantised.matrices:
        return span
    matrix = quantised.matrices[span.name]
    return replace(span, name=matrix.name, dtype="BF16", shape=matrix.shape, nbytes=2 * prod(matrix.shape))


def _scratch(experts: ExpertMap) -> int:
    """What turning one FP8 part of an expert into the serving dtype needs besides both."""
    if experts.quantised is None:
        return 0
    parts = [part for layer in experts.spans for part in layer[0].parts if part.kind is Kind.NUMBERS]
    return scratch_bytes([part.shape for part in parts], experts.quantised.coding) if parts else 0


def _attention_shape(
    config: Mapping[str, Any], heads: int, layers: int, dense: Sequence[TensorSpan]
) -> tuple[int, int]:
    """What all layers cache for one token, and the widest of query, key and value over all heads, in elements.

    Latent attention is cached compressed, as transformers does it since version 5.
    """
    if config.get("kv_lora_rank"):
        rope, value = _number(config, "qk_rope_head_dim"), _number(config, "v_head_dim")
        key = _number(config, "qk_nope_head_dim") + rope
        return layers * (_number(config, "kv_lora_rank") + rope), heads * max(key, value)
    head = int(config.get("head_dim") or _number(config, "hidden_size") // heads)
    keys, values, width = (_rows(dense, f".{which}_proj.weight") for which in "kvq")
    if len(keys) == layers and values.keys() <= keys.keys():  # layers may differ; one without values caches its keys
        return sum(rows + values.get(at, rows) for at, rows in keys.items()), max(heads * head, *width.values())
    return layers * 2 * head * int(config.get("num_key_value_heads") or heads), heads * head


def _scored_heads(config: Mapping[str, Any], heads: int, dense: Sequence[str]) -> int:
    """Of attention with sinks, which some families have written out, and of indexers, of as many heads at least."""
    sinks = heads if any(name.endswith(".sinks") for name in dense) else 0
    if not any(INDEXER in name for name in dense):
        return sinks
    return sinks + max(heads, *(int(config.get(name) or 0) for name in ("index_n_heads", "indexer_n_heads")))


def _rows(dense: Sequence[TensorSpan], ending: str) -> dict[str, int]:
    """The projections whose names end so, by the rest of the name: how many rows each has."""
    return {span.name.removesuffix(ending): span.shape[0] for span in dense if span.name.endswith(ending)}


def _dtype(config: Mapping[str, Any], stored: str) -> str:
    named = str(config.get("dtype") or config.get("torch_dtype") or NAMES.get(stored, "")).removeprefix("torch.")
    if not named and not stored:  # quantised
        return "bfloat16"
    if named not in ITEMSIZE:
        raise UnsupportedFamily(f"Weights of type {stored} can't be served; use a bfloat16 or float32 checkpoint.")
    return named


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Models with several modalities keep the language model's settings in text_config."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _number(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if type(config.get(name)) is int:
            return int(config[name])
    raise CheckpointError(f"config.json has no whole number {names[0]}, which planning needs. Download the file again.")
