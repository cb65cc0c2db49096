"""How one expert lies in a slot, and where each of its checkpoint parts lands. Derived from transformers' own
conversion mapping.

The mapping says how hub tensors become the experts module's parameters: an expert's part is a whole parameter
(MergeModulelist), or some of its rows (MergeModulelist, then Concatenate), or, already fused, a slice of the file's
own tensor. A parameter lies in a slot as one field, or, where the checkpoint has it quantised, as two: the numbers of
its matrix [N, K] and their scales, as they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming
from transformers.core_model_loading import rename_source_key as rename

from engine.conversion import convert, convert_fp8
from engine.fp8 import Scratch
from engine.unpacking import Unpacked, unpack
from store.checkpoint import CheckpointMap
from store.errors import UnsupportedFamily
from store.experts import ExpertMap, ExpertSpan, Kind, Part
from store.quantisation import FP8, Coding
from store.quantised import BYTES, EIGHT_BITS
from store.records import ExpertKey

ALIGN = 64  # a parameter starts on a cache line

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    EIGHT_BITS: torch.float8_e4m3fn,
    **dict.fromkeys(BYTES, torch.uint8),  # of MXFP4
    "I32": torch.int32,  # eight integers of four bits
}
SERVED = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Packed:
    """Of a quantised parameter: its scales' first byte in the slot and their dtype, how many rows were quantised by
    themselves, and, `turned`, that the module has the transpose."""

    coding: Coding
    scales: int
    scales_dtype: torch.dtype
    part: int
    turned: bool


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of one expert: `shape` without the leading E, at byte `offset` of the slot."""

    name: str
    shape: tuple[int, ...]
    offset: int
    packed: Packed | None = None


@dataclass(frozen=True, slots=True)
class Field:
    """What lies in one piece in a slot: a parameter, or the numbers of a quantised one, u8 [N, bytes of a row], or
    their scales."""

    shape: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Landing:
    """Where a part goes: `length` entries from `start` along `dim` of field number `field`."""

    field: int
    dim: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """The same for every expert of the model. Its fields are those of the parameters, in their order.

    `direct` says that file bytes are slot bytes: no cast, no scattered rows.
    """

    dtype: torch.dtype
    parameters: tuple[Parameter, ...]
    fields: tuple[Field, ...]
    landings: Mapping[str, Landing]  # by the part's projection
    slot_bytes: int
    direct: bool
    block: tuple[int, int] | None = None  # of FP8 parts that become the dtype: rows and columns that share a scale

    @property
    def packed(self) -> bool:
        """Whether any parameter lies quantised in a slot."""
        return len(self.fields) > len(self.parameters)

    def views(self, slots: Tensor) -> list[tuple[Tensor, ...]]:
        """The fields of every slot as tensors over u8 `slots` [S, slot_bytes]; no copy."""
        columns = []
        for field in self.fields:
            held = slots[:, field.offset : field.offset + field.nbytes].view(field.dtype)  # [S, entries]
            columns.append(held.view(-1, *field.shape).unbind(0))
        return list(zip(*columns, strict=True))

    def weights(self, views: Sequence[Tensor], into: Unpacked) -> tuple[Tensor, ...]:
        """The parameters of a slot whose fields are `views`: as they lie there, or unpacked `into` memory that the next
        slot's take."""
        fields = iter(views)
        found = []
        for number, parameter in enumerate(self.parameters):
            field = next(fields)
            if parameter.packed is not None:
                packed = parameter.packed
                shape = parameter.shape[::-1] if packed.turned else parameter.shape
                matrix = into.matrix(number, shape, self.dtype, field.device)  # [N, K]
                unpack(packed.coding, field, next(fields), matrix, packed.part)
                field = matrix.T if packed.turned else matrix
            found.append(field)
        return tuple(found)

    def fill(self, views: Sequence[Tensor], span: ExpertSpan, stored: Tensor, scratch: Scratch | None = None) -> None:
        """One expert's slot from its parts as they lie in the files, at their places in the u8 tensor `stored`.

        FP8 parts are worked on in `scratch` where they need one, which is made anew where it is not given.
        """
        held = {
            part.projection: (part, stored[start:end].view(DTYPES[part.dtype]).view(part.shape))
            for part, start, end in span.places()
        }
        scales = {part.matrix[0]: tensor for part, tensor in held.values() if part.kind is Kind.SCALES}
        for projection in self.landings:
            part, tensor = held[projection]
            target = self.target(projection, views)
            if part.kind is Kind.PLAIN:
                convert(tensor, target)
            elif self.block is None:
                target.copy_(tensor.view(target.dtype).view(target.shape))
            else:
                block = self.block[0], self.block[1] or tensor.shape[-1]
                convert_fp8(tensor, scales[part.matrix[0]], block, target, scratch)

    def target(self, projection: str, views: Sequence[Tensor]) -> Tensor:
        """The part's place inside one expert's fields."""
        landing = self.landings[projection]
        return views[landing.field].narrow(landing.dim, landing.start, landing.length)

    def byte_range(self, projection: str) -> tuple[int, int]:
        """First and last byte + 1 of a part inside its slot. Only a `direct` layout has one."""
        landing = self.landings[projection]
        field = self.fields[landing.field]
        row = prod(field.shape[1:]) * field.dtype.itemsize
        start = field.offset + landing.start * row
        return start, start + landing.length * row


class Renaming:
    """transformers' mapping of hub names to this model's parameters."""

    def __init__(self, model: Any, transforms: Sequence[Any]) -> None:
        self._model = model
        self._renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self._converters = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        self._all = converters
        self._prefix = model.base_model_prefix
        self._known = model.state_dict()

    def is_transposed(self, owner: str) -> bool:
        """Whether an experts module keeps its matrices so, as `x @ weight` takes them."""
        return bool(self._model.get_submodule(owner).is_transposed)

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
    *,
    quantised: bool,
) -> tuple[SlotLayout, tuple[str, ...]]:
    """The layout, and the full name of each MoE layer's experts module.

    `shapes` are the model's parameters by full name; `quantised`, slots hold quantised experts as they are stored.
    Raises UnsupportedFamily where layers differ in that.
    """
    quantised = quantised and bool(experts.way)
    if quantised and not experts.alike:
        raise UnsupportedFamily(
            "Some layers' experts are quantised otherwise than others', or not at all; of all layers they share slots, "
            "so they must be alike. Of FP8 alone layers may differ."
        )
    sources = [
        _sources(renaming, checkpoint, experts, layer, quantised=quantised) for layer in range(len(experts.layers))
    ]
    owners = tuple(_owner(each) for each in sources)
    names = sorted({_parameter(target) for target, *_ in sources[0].values()}, key=_parameter_order)
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
    coded = _coded(sources[0], experts) if quantised else {}
    turned = any(coding.way != FP8 for coding in coded.values()) and renaming.is_transposed(owners[0])
    parameters, fields, slot_bytes = _place(names, wanted[0], dtype, coded, sources[0], turned=turned)
    landings = _landings(sources[0], parameters, turned=turned)
    plain = {DTYPES.get(part.dtype) for layer in sources for *_, part in layer.values() if part.kind is Kind.PLAIN}
    rows = all(landing.dim == 0 for landing in landings.values())
    block = None if experts.quantised is None or not experts.way or quantised else experts.quantised.coding.block
    direct = rows and plain <= {dtype} and block is None
    return SlotLayout(dtype, parameters, fields, landings, slot_bytes, direct, block), owners


_Source = tuple[str, "WeightConverter | None", int, Part]


def _sources(
    renaming: Renaming, checkpoint: CheckpointMap, experts: ExpertMap, layer: int, *, quantised: bool
) -> dict[str, _Source]:  # fmt: skip
    """For expert 0 of a layer, by projection: the parameter it becomes, by which converter, at which place."""
    found: dict[str, _Source] = {}
    for part in experts.span(ExpertKey(layer, 0)).parts:
        if part.kind is Kind.SCALES and not quantised:
            continue  # it comes with its weight
        if part.kind is Kind.PLAIN and part.dtype not in SERVED:
            raise UnsupportedFamily(
                f"{experts.modules[layer]} stores {part.projection} as {part.dtype}; experts in "
                f"{', '.join(sorted(SERVED))}, FP8, INT4 and MXFP4 can be served."
            )
        single = f"{experts.modules[layer]}.0.{part.projection}"
        end = part.projection.removeprefix(part.matrix[0])
        name = single if single in checkpoint.tensors else f"{experts.modules[layer]}.{part.projection}"
        found[part.projection] = (*renaming.target(name.removesuffix(end)), part)
    return found


def _coded(sources: Mapping[str, _Source], experts: ExpertMap) -> dict[str, Coding]:
    """Of each parameter that is quantised, how."""
    assert experts.quantised is not None, experts.layers
    coding = experts.quantised.coding
    return {_parameter(target): coding for target, *_, part in sources.values() if part.kind is Kind.NUMBERS}


def _parameter(target: str) -> str:
    """Of a full name, what the experts module calls it."""
    return target.rsplit(".", 1)[1]


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
    names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, coded: Mapping[str, Coding],
    sources: Mapping[str, _Source], *, turned: bool,
) -> tuple[tuple[Parameter, ...], tuple[Field, ...], int]:  # fmt: skip
    parameters, fields, offset = [], list[Field](), 0
    for name in names:
        packed = None
        if name in coded:
            parts = [part for target, *_, part in sources.values() if _parameter(target) == name]
            numbers, scales, rows = _packed_fields(parts, offset)
            packed = Packed(coded[name], scales.offset, scales.dtype, rows, turned)
            fields += [numbers, scales]
        else:
            fields.append(Field(shapes[name], offset, dtype))
        parameters.append(Parameter(name, shapes[name], offset, packed))
        offset = _aligned(fields[-1].offset + fields[-1].nbytes)
    return tuple(parameters), tuple(fields), offset


def _packed_fields(parts: Sequence[Part], offset: int) -> tuple[Field, Field, int]:
    """The numbers of a parameter's parts below one another, their scales, and the rows of each part."""
    numbers, scales = ([part for part in parts if part.kind is kind] for kind in (Kind.NUMBERS, Kind.SCALES))
    rows = {part.matrix[1][0] for part in numbers}
    shaped = {(part.dtype, part.shape[1:]) for part in scales}
    if len(rows) != 1 or len(shaped) != 1 or len({part.matrix[1] for part in numbers}) != 1:
        raise UnsupportedFamily(
            f"The parts of one parameter are quantised in unlike pieces: {[list(part.matrix[1]) for part in numbers]}."
        )
    every, (dtype, columns) = rows.pop() * len(numbers), shaped.pop()
    first = Field((every, sum(part.nbytes for part in numbers) // every), offset, torch.uint8)
    wide = (sum(part.shape[0] for part in scales), *columns)
    return first, Field(wide, _aligned(offset + first.nbytes), DTYPES[dtype]), every // len(numbers)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN


def _landings(
    sources: Mapping[str, _Source], parameters: Sequence[Parameter], *, turned: bool
) -> dict[str, Landing]:  # fmt: skip
    landings: dict[str, Landing] = {}
    field = 0
    for parameter in parameters:
        own = [(place, projection, converter, part) for projection, (target, converter, place, part) in sources.items()
               if _parameter(target) == parameter.name]  # fmt: skip
        own.sort(key=lambda entry: entry[0])
        kinds = [own] if parameter.packed is None else [_of(Kind.NUMBERS, own), _of(Kind.SCALES, own)]
        for kind in kinds:
            start = 0
            for _, projection, converter, part in kind:
                dim = _concatenated_along(converter, parameter.name)
                if dim and parameter.packed:
                    raise UnsupportedFamily(f"{parameter.name} is put together of quantised columns; rows are read.")
                landings[projection] = Landing(field, dim, start, part.shape[dim])
                start += part.shape[dim]
            field += 1
        shape = parameter.shape[::-1] if turned and parameter.packed else parameter.shape
        shapes = [part.matrix[1] for *_, part in kinds[0]]
        _check_filled(parameter.name, shape, shapes, dim)
    return landings


_Named = tuple[int, str, "WeightConverter | None", Part]


def _of(kind: Kind, own: Sequence[_Named]) -> list[_Named]:
    return [entry for entry in own if entry[3].kind is kind]


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


def _check_filled(name: str, wanted: tuple[int, ...], parts: Sequence[tuple[int, ...]], dim: int) -> None:
    rest = wanted[:dim] + wanted[dim + 1 :]
    fits = all(shape[:dim] + shape[dim + 1 :] == rest for shape in parts)
    if not fits or sum(shape[dim] for shape in parts) != wanted[dim]:
        raise UnsupportedFamily(
            f"The checkpoint's parts of {name} are {[list(shape) for shape in parts]}, the model wants {list(wanted)}. "
            "config.json and weights belong to different models."
        )
