"""Dense weights: every tensor that all tokens need gets its memory on the device and its bytes from the checkpoint.

Experts are not here: their parameters are gone from the model by now.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, WeightConverter

from engine.conversion import convert
from engine.layout import DTYPES, Renaming
from engine.reader import Reader
from engine.transfer import Extent
from engine.unpacking import unpack
from store.checkpoint import CheckpointMap
from store.errors import CheckpointError, UnsupportedFamily
from store.experts import ExpertMap
from store.quantised import Matrix, Quantised
from store.shard import TensorSpan


def load_dense(
    model: Any,
    renaming: Renaming,
    checkpoint: CheckpointMap,
    experts: ExpertMap,
    reader: Reader,
    device: torch.device,
) -> None:
    """Raises CheckpointError for a tensor that is missing or has another shape."""
    _compute_buffers(model, device)
    wanted = _materialise(model, device)
    found: dict[str, dict[int, TensorSpan]] = {}  # of each target, its pieces by their place
    for hub_name in experts.dense:
        span = checkpoint.tensors[hub_name]
        matrix = _matrix(hub_name, experts)
        target, converter, place = renaming.target(hub_name if matrix is None else matrix.name)
        if target not in wanted:
            continue  # left over from training, or of an auxiliary head: transformers ignores it too
        if converter is not None and not _joins_rows(converter):
            raise UnsupportedFamily(
                f"transformers rearranges {hub_name} when it loads it; moepager reads dense weights as they are, or "
                "as the rows of one, one after the other."
            )
        found.setdefault(target, {})[place] = span
    sources = {name: [pieces[place] for place in sorted(pieces)] for name, pieces in found.items()}
    _check_complete(wanted, sources, experts)
    _fill(sources, wanted, checkpoint, experts, reader)
    model.eval().requires_grad_(False)


def _joins_rows(converter: WeightConverter) -> bool:
    """Whether its sources are the rows of its target, one after the other."""
    operations = converter.operations
    return len(operations) == 1 and isinstance(operations[0], Concatenate) and operations[0].dim == 0


def _fill(
    sources: Mapping[str, Sequence[TensorSpan]], wanted: Mapping[str, Tensor], checkpoint: CheckpointMap,
    experts: ExpertMap, reader: Reader,
) -> None:  # fmt: skip
    """Straight into the tensors where dtype and device agree, all of those at once, as experts are read; the others by
    a host copy, one after the other."""
    last = {id(wanted[name]): name for name in sources}  # of names that share a tensor, one is read
    straight = []
    pieces = [piece for name in last.values() for piece in _pieces(sources[name], wanted[name], experts)]
    for span, target in pieces:
        if target.device.type == "cpu" and target.dtype == DTYPES[span.dtype]:
            straight.append(_extent(span, target))
        elif (matrix := _matrix(span.name, experts)) is None:
            convert(_on_host(span, reader), target)
        else:
            assert experts.quantised is not None, span.name
            _unpack(experts.quantised, span, checkpoint.tensors[matrix.scales], target, reader)
    reader.read(straight)


def _pieces(
    spans: Sequence[TensorSpan], target: Tensor, experts: ExpertMap
) -> Iterator[tuple[TensorSpan, Tensor]]:  # fmt: skip
    """What is stored with the rows of `target` that it becomes."""
    if len(spans) == 1:
        yield spans[0], target
        return
    rows = [_shape(span, experts)[0] for span in spans]
    yield from zip(spans, torch.split(target.detach(), rows), strict=True)


def _shape(span: TensorSpan, experts: ExpertMap) -> tuple[int, ...]:
    """What it has once it is plain."""
    matrix = _matrix(span.name, experts)
    return span.shape if matrix is None else matrix.shape


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Buffers that no checkpoint holds, such as rotary frequencies: transformers' own initialisation fills them."""
    for owner in sorted({name.rpartition(".")[0] for name, _ in model.named_non_persistent_buffers()}):
        module = model.get_submodule(owner)
        for name in module._non_persistent_buffers_set:
            if module._buffers.get(name) is not None:
                module._buffers[name] = torch.full_like(module._buffers[name], torch.nan, device=device)
        with torch.no_grad():
            model._init_weights(module)
        if unfilled := [name for name in module._non_persistent_buffers_set if _unfilled(module._buffers.get(name))]:
            raise UnsupportedFamily(
                f"transformers does not say how to compute {owner}.{unfilled[0]} without a checkpoint."
            )


def _unfilled(buffer: Tensor | None) -> bool:
    return buffer is not None and buffer.is_floating_point() and bool(buffer.isnan().any())


def _materialise(model: Any, device: torch.device) -> dict[str, Tensor]:
    """Memory for every tensor of the state dict, by name; tied names share one tensor."""
    wide = _kept_in_float32(model)
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the meta tensor is kept, so that no id is used twice
    named: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or name in module._non_persistent_buffers_set:
                    continue
                full = f"{prefix}.{name}" if prefix else name
                if id(tensor) not in made:
                    dtype = torch.float32 if wide.search(full) else tensor.dtype
                    made[id(tensor)] = tensor, _real(tensor, dtype, device)
                named[full] = tensors[name] = made[id(tensor)][1]
    return named


def _real(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    real = torch.empty(tensor.shape, dtype=dtype, device=device)
    real.fill_(0)  # touched: else the reader's threads fault it in, and the disk seems slow
    return torch.nn.Parameter(real, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else real


def _kept_in_float32(model: Any) -> re.Pattern[str]:
    """What transformers itself keeps in float32 whatever the serving dtype, such as correction biases."""
    names = list(model._get_dtype_plan(model.dtype))
    return re.compile("|".join(rf"(^|\.){name.replace('*', '.*')}($|\.)" for name in names) or r"(?!)")


def _check_complete(
    wanted: Mapping[str, Tensor], sources: Mapping[str, Sequence[TensorSpan]], experts: ExpertMap
) -> None:  # fmt: skip
    filled = {id(wanted[name]) for name in sources}
    if lacking := sorted(name for name, tensor in wanted.items() if id(tensor) not in filled):
        raise CheckpointError(
            f"The checkpoint has no tensor for {lacking[0]} ({len(lacking)} are missing). Download the weights again."
        )
    for name, spans in sources.items():
        span, shapes = spans[0], [_shape(each, experts) for each in spans]
        shape = shapes[0] if len(shapes) == 1 else (sum(each[0] for each in shapes), *shapes[0][1:])
        if tuple(wanted[name].shape) != shape or len({each[1:] for each in shapes}) > 1:
            more = f" (with {', '.join(each.name for each in spans[1:])})" if spans[1:] else ""
            raise CheckpointError(
                f"{span.name}{more} has shape {list(shape)}, config.json wants {list(wanted[name].shape)}. "
                "Config and weights belong to different models: download both again."
            )


def _matrix(name: str, experts: ExpertMap) -> Matrix | None:
    """The quantised one whose numbers a tensor holds."""
    return None if experts.quantised is None else experts.quantised.matrices.get(name)


def _unpack(quantised: Quantised, span: TensorSpan, scales: TensorSpan, target: Tensor, reader: Reader) -> None:
    on_host = torch.empty(target.shape, dtype=target.dtype)
    numbers = _on_host(span, reader).view(torch.uint8).flatten(1)
    unpack(quantised.coding, numbers, _on_host(scales, reader), on_host)
    target.copy_(on_host)


def _on_host(span: TensorSpan, reader: Reader) -> Tensor:
    host = torch.empty(span.shape, dtype=DTYPES[span.dtype])
    reader.read([_extent(span, host)])
    return host


def _extent(span: TensorSpan, tensor: Tensor) -> Extent:
    flat = tensor.detach().view(-1).view(torch.uint8)
    return Extent(span.file, span.offset, span.nbytes, np.asarray(flat.numpy()))
