"""Where each expert's bytes lie in the unmodified checkpoint. Arithmetic on headers; it knows no model families."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from store.checkpoint import CheckpointMap
from store.errors import CheckpointError, MismatchError, UnsupportedFamily
from store.expert_names import Place, find_routers, place
from store.quantised import Matrix, Quantised, read_quantised
from store.records import ExpertKey, Selection
from store.shard import TensorSpan

# How configs call the number of routed experts a layer.
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
IDENTITIES = ("zero_expert_num",)
PREDICTION_HEAD = "mtp"  # multi-token prediction: layers for training or drafting

ALIGN = 64  # of parts in a buffer, so that any type can be read there
FIX = "Download the checkpoint again."

Placed = tuple[Place, TensorSpan]


class Kind(Enum):
    PLAIN = "plain"
    NUMBERS = "numbers"  # of a quantised matrix
    SCALES = "scales"


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of one expert. `projection` is the hub's name after the expert: w1.weight, gate_up_proj.

    `matrix` is the name and the shape of what it is, or of the quantised matrix that it is a part of.
    """

    projection: str
    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    kind: Kind
    matrix: tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ExpertSpan:
    """All bytes of one expert: its parts sorted by projection, so in the same order for every expert of the model."""

    key: ExpertKey
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def places(self) -> Iterator[tuple[Part, int, int]]:
        """Where each part lies in a buffer that holds the expert as stored: first byte, aligned, and last + 1."""
        start = 0
        for part in self.parts:
            yield part, start, start + part.nbytes
            start += -(-part.nbytes // ALIGN) * ALIGN


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """Of MoE layer i, `layers[i]` is the decoder layer, `modules[i]` the module, `expert_bytes[i]` an expert's size.

    `dense` names the tensors that every token needs, `surplus` those of prediction heads, which the served model lacks.
    """

    layers: tuple[int, ...]
    modules: tuple[str, ...]
    experts: int
    expert_bytes: tuple[int, ...]
    dense: tuple[str, ...]
    surplus: tuple[str, ...]
    spans: tuple[tuple[ExpertSpan, ...], ...]  # [L][E]
    quantised: Quantised | None = None  # an expert's scales are parts of it, a dense weight's are not in `dense`

    @classmethod
    def build(cls, checkpoint: CheckpointMap) -> ExpertMap:
        """Raises CheckpointError for holes and unlike experts, UnsupportedFamily where none can be told apart."""
        _refuse_experts_without_weights(checkpoint.config)
        quantised = read_quantised(checkpoint.config, checkpoint.tensors)
        told = frozenset() if quantised is None else quantised.surplus
        tensors = {name: span for name, span in checkpoint.tensors.items() if name not in told}
        placed = _place_all(tensors.values())
        if not placed:
            raise UnsupportedFamily(
                f"{checkpoint.folder} has no routed experts: no tensor is named like `layers.3.mlp.experts.5.…`. "
                "moepager serves Mixture-of-Experts models; run a dense model with plain transformers."
            )
        surplus = _surplus(tensors, _only_stack(placed), _setting(checkpoint.config, ("num_hidden_layers",)))
        kept = [span for name, span in tensors.items() if name not in surplus]
        count = _setting(checkpoint.config, COUNTS)
        members = _by_layer([(where, span) for where, span in placed if span.name not in surplus])
        matrices = {} if quantised is None else quantised.matrices
        layers = [_Layer.gather(group, count, matrices) for group in members]
        _check_alike(layers)
        _check_routers(layers, kept)
        taken = {span.name for layer in layers for _, span in layer.members}
        taken |= set() if quantised is None else quantised.scales
        return cls(
            layers=tuple(layer.number for layer in layers),
            modules=tuple(layer.owner for layer in layers),
            experts=layers[0].experts,
            expert_bytes=tuple(sum(part.nbytes for part in layer.parts[0].values()) for layer in layers),
            dense=tuple(span.name for span in kept if span.name not in taken),
            surplus=tuple(sorted(surplus)),
            spans=tuple(layer.spans(ordinal) for ordinal, layer in enumerate(layers)),
            quantised=quantised,
        )

    @property
    def alike(self) -> bool:
        """Whether the experts of all layers are stored in the same way."""
        stored = {tuple((part.projection, part.dtype, part.shape) for part in layer[0].parts) for layer in self.spans}
        return len(stored) == 1

    @property
    def way(self) -> str:
        """In which the experts of any layer are quantised, "" where they are all plain, whatever dense weights are."""
        parts = (part for layer in self.spans for part in layer[0].parts)
        held = self.quantised is not None and any(part.kind is Kind.NUMBERS for part in parts)
        return self.quantised.coding.way if self.quantised is not None and held else ""

    def span(self, key: ExpertKey) -> ExpertSpan:
        """Raises MismatchError for an expert that the model does not have."""
        layer, expert = key
        if not (0 <= layer < len(self.layers) and 0 <= expert < self.experts):
            raise MismatchError(f"There is no expert {expert} in MoE layer {layer}: {self._extent}. {_OTHER_MODEL}")
        return self.spans[layer][expert]

    def check(self, selection: Selection) -> None:
        """Raises MismatchError unless every expert of `selection` exists and it has one row for each MoE layer."""
        if len(selection.experts) != len(self.layers):
            raise MismatchError(f"The selection has {len(selection.experts)} layers: {self._extent}. {_OTHER_MODEL}")
        for layer, ids in enumerate(selection.experts):
            if ids:
                self.span(ExpertKey(layer, ids[-1]))

    def selection_bytes(self, selection: Selection) -> int:
        """What paging in exactly this selection reads."""
        self.check(selection)
        return sum(len(ids) * size for ids, size in zip(selection.experts, self.expert_bytes, strict=True))

    @property
    def staged_bytes(self) -> int:
        """A buffer that holds any one expert as stored."""
        return max(end for layer in self.spans for _, _, end in layer[0].places())

    @property
    def total_bytes(self) -> int:
        """The bytes of all experts."""
        return self.experts * sum(self.expert_bytes)

    @property
    def _extent(self) -> str:
        return f"the model has {len(self.layers)} MoE layers of {self.experts} experts"


_OTHER_MODEL = "The selection was made for another model: profile this one."


@dataclass(frozen=True, slots=True)
class _Layer:
    """One MoE layer under construction: `parts[expert][projection]`."""

    owner: str
    number: int
    members: list[Placed]
    experts: int
    parts: list[dict[str, Part]]

    @classmethod
    def gather(cls, members: list[Placed], count: int | None, matrices: Mapping[str, Matrix]) -> _Layer:
        first = members[0][0]
        owners = sorted({where.owner for where, _ in members})
        if len(owners) > 1:
            raise UnsupportedFamily(f"One layer has experts in {' and '.join(owners)}; one such module is supported.")
        experts = _count(first.owner, members, count)
        parts: list[dict[str, Part]] = [{} for _ in range(experts)]
        for where, span in members:
            for expert, part in _cut(where, span, experts, matrices.get(span.name)):
                parts[expert][where.projection] = part
        return cls(first.owner, first.layer, members, experts, parts)

    def projections(self) -> set[str]:
        return {projection for parts in self.parts for projection in parts}

    def matrices(self) -> set[str]:
        """What the experts' parts make up, by name."""
        return {part.matrix[0] for parts in self.parts for part in parts.values()}

    def spans(self, ordinal: int) -> tuple[ExpertSpan, ...]:
        return tuple(
            ExpertSpan(ExpertKey(ordinal, expert), tuple(parts[name] for name in sorted(parts)))
            for expert, parts in enumerate(self.parts)
        )


def _surplus(tensors: Iterable[str], stack: str, depth: int | None) -> frozenset[str]:
    """Tensors of prediction heads: named so, or layers of `stack` past the last one that the config counts."""
    return frozenset(name for name in tensors if _is_prediction_head(name) or _is_beyond(name, stack, depth))


def _is_prediction_head(name: str) -> bool:
    return PREDICTION_HEAD in name.split(".")


def _is_beyond(name: str, stack: str, depth: int | None) -> bool:
    number = name.removeprefix(f"{stack}.").split(".")[0]
    return depth is not None and name.startswith(f"{stack}.") and number.isdecimal() and int(number) >= depth


def _setting(config: Mapping[str, Any], keys: Iterable[str]) -> int | None:
    """The first whole number under one of `keys`; models with several modalities keep theirs in text_config."""
    for scope in (config, config.get("text_config")):
        for key in keys:
            if isinstance(scope, Mapping) and type(scope.get(key)) is int:
                return int(scope[key])
    return None


def _refuse_experts_without_weights(config: Mapping[str, Any]) -> None:
    if identities := _setting(config, IDENTITIES):
        raise UnsupportedFamily(
            f"The router also chooses among {identities} experts that have no weights and pass tokens through "
            f"(config.json: {', '.join(IDENTITIES)}); there is nothing of them to page or to leave out."
        )


def _place_all(tensors: Iterable[TensorSpan]) -> list[Placed]:
    tensors = [span for span in tensors if not _is_prediction_head(span.name)]
    routers = find_routers(tensors)
    return [(where, span) for span in tensors if (where := place(span, routers)) is not None]


def _only_stack(placed: list[Placed]) -> str:
    stacks = sorted({where.stack for where, _ in placed})
    if len(stacks) > 1:
        raise UnsupportedFamily(
            f"Experts lie in {len(stacks)} stacks of layers: {', '.join(stacks)}; one is supported."
        )
    return stacks[0]


def _by_layer(placed: list[Placed]) -> list[list[Placed]]:
    layers: dict[int, list[Placed]] = defaultdict(list)
    for where, span in placed:
        layers[where.layer].append((where, span))
    return [layers[number] for number in sorted(layers)]


def _count(owner: str, members: list[Placed], wanted: int | None) -> int:
    """How many experts a layer has: by ids, or by the leading dimension of its 3-D tensors; the config must agree."""
    singles = {where.expert + 1 for where, _ in members if where.expert is not None}
    stacked = {span.shape[0] for where, span in members if where.expert is None and len(span.shape) >= 3}
    if len(stacked) > 1:
        raise CheckpointError(f"The tensors of {owner} disagree on its number of experts: {sorted(stacked)}. {FIX}")
    if not singles and not stacked:
        raise UnsupportedFamily(f"{owner} has no tensor with a slice for each expert, so they can't be paged.")
    found = max(singles | stacked)
    if wanted is not None and found != wanted:
        raise CheckpointError(f"{owner} has {found} experts, config.json says {wanted}. {FIX}")
    return found


def _cut(where: Place, span: TensorSpan, experts: int, matrix: Matrix | None) -> Iterable[tuple[int, Part]]:
    """The part of each expert that `span` holds: itself, or contiguous slices of the leading dimension."""
    kind, name = Kind.PLAIN, where.projection
    shape = span.shape if matrix is None else matrix.shape
    if matrix is not None:
        kind = Kind.NUMBERS if span.name == matrix.numbers else Kind.SCALES
        name = name.removesuffix(span.name.removeprefix(matrix.name))
    if where.expert is not None:
        yield (
            where.expert,
            Part(where.projection, span.file, span.offset, span.nbytes, span.dtype, span.shape, kind, (name, shape)),
        )
        return
    if span.shape[0] != experts or span.nbytes % experts:
        raise UnsupportedFamily(
            f"{span.name} {list(span.shape)} can't be cut into {experts} experts along its first axis."
        )
    size = span.nbytes // experts
    for expert in range(experts):
        offset = span.offset + expert * size
        own = name, shape[1:]
        yield expert, Part(where.projection, span.file, offset, size, span.dtype, span.shape[1:], kind, own)


def _check_alike(layers: list[_Layer]) -> None:
    """Every layer has as many experts, every expert every projection, and within a layer in the same shape."""
    weights = {name for layer in layers for name in layer.matrices()}
    for layer in layers:
        if layer.experts != layers[0].experts:
            raise CheckpointError(
                f"{layer.owner} has {layer.experts} experts, {layers[0].owner} has {layers[0].experts}. "
                f"Every layer must have as many. {FIX}"
            )
        wanted = layer.projections()  # one layer may be quantised and the next not
        for expert, parts in enumerate(layer.parts):
            missing = weights - {part.matrix[0] for part in parts.values()}
            if lacking := sorted((wanted - parts.keys()) or missing):
                raise CheckpointError(f"Expert {expert} of {layer.owner} lacks {', '.join(lacking)}. {FIX}")
            _check_shapes(layer, expert, parts)


def _check_shapes(layer: _Layer, expert: int, parts: dict[str, Part]) -> None:
    for name, part in parts.items():
        first = layer.parts[0][name]
        if (part.dtype, part.shape) != (first.dtype, first.shape):
            raise CheckpointError(
                f"Expert {expert} of {layer.owner} has {name} as {part.dtype} {list(part.shape)}, expert 0 as "
                f"{first.dtype} {list(first.shape)}. The experts of a layer must be alike. {FIX}"
            )


def _check_routers(layers: list[_Layer], kept: list[TensorSpan]) -> None:
    """A layer that has a router like the others' must have their experts too."""
    served = {layer.owner.removesuffix(".experts") for layer in layers}
    names = {owner.rsplit(".", 1)[1] for owner in served}
    for owner, scored in find_routers(kept).items():
        if scored == layers[0].experts and owner not in served and owner.split(".")[-1] in names:
            raise CheckpointError(f"{owner} has a router for {scored} experts, but none of their tensors. {FIX}")
