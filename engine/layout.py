"""How one expert lies in a slot, and where each of its checkpoint parts lands. Derived from transformers' own
conversion mapping.

The mapping says how hub tensors become the experts module's parameters: an expert's part is a whole parameter
(MergeModulelist), or some of its rows (MergeModulelist, then Concatenate), or, already fused, a slice of the file's
own tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming
from transformers.core_model_loading import rename_source_key as rename

from engine.conversion import convert, convert_fp8
from engine.fp8 import Scratch
from store.block_scales import FP8, is_scale, scale_name
from store.checkpoint import CheckpointMap
from store.errors import UnsupportedFamily
from store.experts import ExpertMap, ExpertSpan, Part
from store.records import ExpertKey

ALIGN = 64  # a parameter starts on a cache line

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    FP8: torch.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of one expert: `shape` without the leading E, at byte `offset` of the slot."""

    name: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Landing:
    """Where a part goes: `length` entries from `start` along `dim` of parameter number `parameter`."""

    parameter: int
    dim: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """The same for every expert of the model.

    `direct` says that file bytes are slot bytes: no cast, no scattered rows.
    """

    dtype: torch.dtype
    parameters: tuple[Parameter, ...]
    landings: Mapping[str, Landing]  # by the part's projection
    slot_bytes: int
    direct: bool
    block: tuple[int, int] | None = None  # of FP8 parts: rows and columns that share a scale

    def views(self, slots: Tensor) -> list[tuple[Tensor, ...]]:
        """The parameters of every slot as tensors over u8 `slots` [S, slot_bytes]; no copy."""
        flat = slots.view(self.dtype)  # [S, slot_bytes / itemsize]
        columns = []
        for parameter in self.parameters:
            start = parameter.offset // self.dtype.itemsize
            length = _count(parameter.shape)
            columns.append(flat[:, start : start + length].view(-1, *parameter.shape).unbind(0))
        return list(zip(*columns, strict=True))

    def fill(self, views: Sequence[Tensor], span: ExpertSpan, stored: Tensor, scratch: Scratch | None = None) -> None:
        """One expert's slot from its parts as they lie in the files, at their places in the u8 tensor `stored`.

        FP8 parts are worked on in `scratch` where they need one, which is made anew where it is not given.
        """
        held = {
            part.projection: stored[start:end].view(DTYPES[part.dtype]).view(part.shape)
            for part, start, end in span.places()
        }
        for projection in self.landings:
            target = self.target(projection, views)
            if held[projection].dtype == DTYPES[FP8] and self.block is not None:
                convert_fp8(held[projection], held[scale_name(projection)], self.block, target, scratch)
            else:
                convert(held[projection], target)

    def target(self, projection: str, views: Sequence[Tensor]) -> Tensor:
        """The part's place inside one expert's parameters."""
        landing = self.landings[projection]
        return views[landing.parameter].narrow(landing.dim, landing.start, landing.length)

    def byte_range(self, projection: str) -> tuple[int, int]:
        """First and last byte + 1 of a part inside its slot. Only a `direct` layout has one."""
        landing = self.landings[projection]
        parameter = self.parameters[landing.parameter]
        row = _count(parameter.shape[1:]) * self.dtype.itemsize
        start = parameter.offset + landing.start * row
        return start, start + landing.length * row


class Renaming:
    """transformers' mapping of hub names to this model's parameters."""

    def __init__(self, model: Any, transforms: Sequence[Any]) -> None:
        self._renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self._converters = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        self._all = converters
        self._prefix = model.base_model_prefix
        self._known = model.state_dict()

    def target(self, hub_name: str) -> tuple[str, WeightConverter | None, int]:
        """The parameter that the tensor becomes (a part of), the converter that does it, its place among the
        sources.
        """
        name, pattern = rename(hub_name, self._renamings, self._all, self._prefix, self._known)
        if name not in self._known and hub_name in self._known:
            return hub_name, None, 0
        if pattern is None:
            return name, None, 0
        converter = self._converters[pattern]
        return name, converter, converter.source_patterns.index(pattern)


def derive_layout(
    renaming: Renaming,
    checkpoint: CheckpointMap,
    experts: ExpertMap,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> tuple[SlotLayout, tuple[str, ...]]:
    """The layout, and the full name of each MoE layer's experts module.

    `shapes` are the model's parameters by full name.
    """
    sources = [_sources(renaming, checkpoint, experts, layer) for layer in range(len(experts.layers))]
    owners = tuple(_owner(each) for each in sources)
    names = sorted({target.rsplit(".", 1)[1] for target, *_ in sources[0].values()}, key=_parameter_order)
    wanted = [_slices(owner, shapes, experts.experts) for owner in owners]
    for owner, found in zip(owners, wanted, strict=True):
        if found != wanted[0]:
            raise UnsupportedFamily(
                f"{owner} has parameters {found}, {owners[0]} has {wanted[0]}; all layers must agree."
            )
    if lacking := sorted(wanted[0].keys() - set(names)):
        raise UnsupportedFamily(
            f"No tensor of the checkpoint fills {owners[0]}.{lacking[0]}, so its experts can't be paged."
        )
    parameters, slot_bytes = _place(names, wanted[0], dtype)
    landings = _landings(sources[0], parameters)
    stored = {DTYPES.get(part.dtype) for layer in sources for *_, part in layer.values()}
    rows = all(landing.dim == 0 for landing in landings.values())
    block = None if experts.scales is None else experts.scales.block
    return SlotLayout(dtype, parameters, landings, slot_bytes, rows and stored == {dtype}, block), owners


_Source = tuple[str, "WeightConverter | None", int, Part]


def _sources(renaming: Renaming, checkpoint: CheckpointMap, experts: ExpertMap, layer: int) -> dict[str, _Source]:
    """For expert 0 of a layer, by projection: the parameter it becomes, by which converter, at which place."""
    found: dict[str, _Source] = {}
    for part in experts.span(ExpertKey(layer, 0)).parts:
        if is_scale(part.projection):
            continue  # it comes with its weight
        if part.dtype not in DTYPES:
            raise UnsupportedFamily(
                f"{experts.modules[layer]} stores {part.projection} as {part.dtype}; experts in "
                f"{', '.join(sorted(DTYPES))} can be served."
            )
        single = f"{experts.modules[layer]}.0.{part.projection}"
        name = single if single in checkpoint.tensors else f"{experts.modules[layer]}.{part.projection}"
        found[part.projection] = (*renaming.target(name), part)
    return found


def _owner(sources: Mapping[str, _Source]) -> str:
    owners = sorted({target.rsplit(".", 1)[0] for target, *_ in sources.values()})
    if len(owners) != 1:
        raise UnsupportedFamily(f"The parts of one expert belong to several modules: {', '.join(owners)}.")
    return owners[0]


def _slices(owner: str, shapes: Mapping[str, tuple[int, ...]], experts: int) -> dict[str, tuple[int, ...]]:
    """The shapes of one expert's parameters in the module `owner`, without the leading dimension."""
    own = {name.rsplit(".", 1)[1]: shape for name, shape in shapes.items() if name.rsplit(".", 1)[0] == owner}
    if not own or any(shape[:1] != (experts,) for shape in own.values()):
        raise UnsupportedFamily(
            f"{owner} does not keep its {experts} experts in parameters with a leading dimension of {experts}: it has "
            f"{own}. "
            "moepager needs transformers' common experts contract."
        )
    return {name: shape[1:] for name, shape in own.items()}


def _parameter_order(name: str) -> tuple[bool, bool, str]:
    """Up before down, weights before biases."""
    return ("down" in name, name.endswith("bias"), name)


def _place(
    names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> tuple[tuple[Parameter, ...], int]:
    parameters, offset = [], 0
    for name in names:
        parameters.append(Parameter(name, shapes[name], offset))
        offset += -(-_count(shapes[name]) * dtype.itemsize // ALIGN) * ALIGN
    return tuple(parameters), offset


def _landings(sources: Mapping[str, _Source], parameters: Sequence[Parameter]) -> dict[str, Landing]:
    landings: dict[str, Landing] = {}
    for number, parameter in enumerate(parameters):
        own = [(place, projection, converter, part) for projection, (target, converter, place, part) in sources.items()
               if target.rsplit(".", 1)[1] == parameter.name]  # fmt: skip
        start = 0
        for _, projection, converter, part in sorted(own, key=lambda entry: entry[0]):
            dim = _concatenated_along(converter, parameter.name)
            landings[projection] = Landing(number, dim, start, part.shape[dim])
            start += part.shape[dim]
        _check_filled(parameter, [part for *_, part in own], dim, start)
    return landings


def _concatenated_along(converter: WeightConverter | None, name: str) -> int:
    """The dimension of one expert's parameter along which its parts are joined; 0 where there is one part."""
    operations = [] if converter is None else list(converter.operations)
    match operations:
        case [] | [MergeModulelist(dim=0)]:
            return 0
        case [MergeModulelist(dim=0), Concatenate(dim=dim)] if dim >= 1:
            return int(dim) - 1
    kinds = ", ".join(type(operation).__name__ for operation in operations)
    raise UnsupportedFamily(
        f"transformers builds {name} by {kinds}; reading one expert of it from the disk is not supported."
    )


def _check_filled(parameter: Parameter, parts: Sequence[Part], dim: int, length: int) -> None:
    rest = parameter.shape[:dim] + parameter.shape[dim + 1 :]
    fits = all(part.shape[:dim] + part.shape[dim + 1 :] == rest for part in parts)
    if not fits or length != parameter.shape[dim]:
        raise UnsupportedFamily(
            f"The checkpoint's parts of {parameter.name} are {[list(part.shape) for part in parts]}, the model wants "
            f"{list(parameter.shape)}. config.json and weights belong to different models."
        )


def _count(shape: Sequence[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
