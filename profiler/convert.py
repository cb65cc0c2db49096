"""A copy of a GPTQ checkpoint in the layout that is served: the same integers and scales, turned over.

GPTQ (Frantar et al., 2210.17323) as AutoGPTQ and GPTQModel write it packs eight integers of four bits along the input
axis: `qweight` i32 [K / 8, N], `scales` [K / group, N], `qzeros` i32 [K / group, N / 8] with the zero points, which
symmetric quantisation has at 8 everywhere, less one in the older format, and `g_idx` [K], the group of each column.
compressed-tensors' `pack-quantized` has the same integers as [N, K / 8] and zero points at 8 by definition. Nothing is
rounded; one matrix is in memory at a time, and a part of the copy. N rows, K columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.card import ModelCard
from profiler.pack_folder import CARD, SHARD_BYTES, Shards, refuse_existing, tensor_of, written_whole
from profiler.progress import Progress, Report
from store.checkpoint import CheckpointMap
from store.errors import CheckpointError, UnsupportedFamily
from store.experts import ExpertMap
from store.quantisation import GROUP, INT4, WHOLE_ROW, packed_in_integers, settings_of

QWEIGHT, SCALES, ZEROS, ORDER = "qweight", "scales", "qzeros", "g_idx"
BITS, PER_WORD = 4, 8
INSTEAD = "Use a symmetric version in order, or quantise the bfloat16 one (`moepager quantise`)."
ZERO = {"gptq": 7, "gptq_v2": 8}  # what a symmetric zero point is stored as, by `checkpoint_format`


def convert_model(source: Path, folder: Path, report: Report) -> dict[str, Any]:
    """Writes the copy and gives its card. Raises Conflict where `folder` exists, UnsupportedFamily for what is no GPTQ
    of four bits, symmetric and in order, CheckpointError for tensors that don't fit each other; nothing is left
    then."""
    refuse_existing(folder)
    checkpoint = CheckpointMap.open(source)
    settings = settings_of(checkpoint.config)
    group, zero = _group_of(source, settings), ZERO[_format(settings)]
    bases = [name.removesuffix(QWEIGHT) for name in checkpoint.tensors if name.endswith(f".{QWEIGHT}")]
    if not bases:
        raise CheckpointError(f"{source} says that it is GPTQ and has no tensor named ….{QWEIGHT}. Download it again.")
    plain = _plain_modules(checkpoint, bases)
    with written_whole(folder, checkpoint, packed_in_integers(checkpoint.config, group, plain)) as made:
        shards = Shards(made)
        for part in _in_parts(_tensors(checkpoint, bases, group, zero, report)):
            shards.add(part)
        shards.close()
        checkpoint.check()
        card = ModelCard.read(made)
        told = {
            "packed_from": checkpoint.fingerprint().whole,
            "family": card.family,
            "format": INT4,
            "relaid_from": "gptq",
            "matrices": len(bases),
            "dtype": card.geometry.dtype,
            "expert_bytes": ExpertMap.build(CheckpointMap.open(made)).total_bytes,
        }
        (made / CARD).write_text(json.dumps(told, indent=2) + "\n")
    return told


def is_gptq(settings: Mapping[str, Any]) -> bool:
    """Whether a quantization_config says so; AutoRound writes it as well."""
    method = settings.get("quant_method")
    return method == "gptq" or (method == "auto-round" and "gptq" in str(settings.get("packing_format")))


def _format(settings: Mapping[str, Any]) -> str:
    return "gptq_v2" if "v2" in str(settings.get("checkpoint_format") or settings.get("packing_format")) else "gptq"


def _group_of(source: Path, settings: Mapping[str, Any]) -> int:
    """Columns that share a scale, WHOLE_ROW for all of a row."""
    if not is_gptq(settings):
        raise UnsupportedFamily(
            f"{source} is no GPTQ checkpoint: its quant_method is {settings.get('quant_method')!r}. Other models are "
            "served as they are, or quantised by `moepager quantise`."
        )
    bits, symmetric, group = settings.get("bits"), settings.get("sym", True), settings.get("group_size", -1)
    others = sorted({rule.get("bits", bits) for rule in _overrides(settings)} - {bits})
    if bits != BITS or symmetric is not True or others:
        more = f" ({others} in some modules)" if others else ""
        raise UnsupportedFamily(
            f"{source} is GPTQ with {bits!r} bits{more}, symmetric {symmetric}; integers of {BITS}, symmetric, are "
            f"converted. {INSTEAD}"
        )
    if group == -1:
        return WHOLE_ROW
    if type(group) is not int or group <= 0 or group % GROUP:
        raise UnsupportedFamily(f"{source} has groups of {group!r} columns; multiples of {GROUP} are converted.")
    return group


def _overrides(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Settings of single modules; those that begin with "-" are not quantised at all."""
    rules = settings.get("dynamic")
    found = rules.items() if isinstance(rules, Mapping) else ()
    return [rule for name, rule in found if isinstance(rule, Mapping) and not str(name).startswith("-")]


def _plain_modules(checkpoint: CheckpointMap, bases: list[str]) -> list[str]:
    """Linear layers, as far as names and shapes tell, that are not quantised: other readers want to be told."""
    whole = [name for name, span in checkpoint.tensors.items() if name.endswith(".weight") and len(span.shape) == 2]
    quantised = set(bases)
    names = [name.removesuffix(".weight") for name in whole if name.removesuffix("weight") not in quantised]
    return sorted(name for name in names if "embed" not in name)


def _tensors(
    checkpoint: CheckpointMap, bases: list[str], group: int, zero: int, report: Report
) -> Iterator[dict[str, Tensor]]:  # fmt: skip
    """All of the copy's, those of one matrix at a time."""
    used: set[str] = set()
    for number, base in enumerate(bases):
        report(Progress("matrices", "convert", number, len(bases)))
        names = {part: f"{base}{part}" for part in (QWEIGHT, SCALES, ZEROS, ORDER)}
        used |= set(names.values())
        held = {part: tensor_of(checkpoint, name) for part, name in names.items() if name in checkpoint.tensors}
        yield {f"{base}{name}": tensor for name, tensor in turned_over(base, held, group, zero).items()}
    report(Progress("matrices", "convert", len(bases), len(bases)))
    for name in checkpoint.tensors:
        if name not in used:
            yield {name: tensor_of(checkpoint, name)}


def turned_over(base: str, held: Mapping[str, Tensor], group: int, zero: int) -> dict[str, Tensor]:
    """Of one matrix the tensors of `pack-quantized`. Raises CheckpointError, or UnsupportedFamily for zero points that
    are not `zero` and columns out of order."""
    if lacking := sorted({QWEIGHT, SCALES, ZEROS} - held.keys()):
        raise CheckpointError(f"{base}{QWEIGHT} has no {lacking[0]} beside it. Download the checkpoint again.")
    words, scales = held[QWEIGHT], held[SCALES]
    columns, rows = words.shape[0] * PER_WORD, words.shape[1]
    _check_shapes(base, held, columns, rows, group)
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointError(f"{base}{SCALES} has NaN or infinity. Download the checkpoint again.")
    if not bool((_integers(held[ZEROS])[:, :rows] == zero).all()):
        raise UnsupportedFamily(
            f"{base}{ZEROS} has zero points that are not symmetric's ({zero} in this format). {INSTEAD}"
        )
    if ORDER in held and not bool((held[ORDER] == torch.arange(columns) // (group or columns)).all()):
        raise UnsupportedFamily(f"{base}{ORDER} gives groups columns out of order (desc_act). {INSTEAD}")
    return {
        "weight_packed": words.T.contiguous(),
        "weight_scale": scales.T.contiguous(),
        "weight_shape": torch.tensor([rows, columns]),
    }


def _check_shapes(base: str, held: Mapping[str, Tensor], columns: int, rows: int, group: int) -> None:
    groups = 1 if group == WHOLE_ROW else -(-columns // group)
    wanted = {SCALES: (groups, rows), ZEROS: (groups, -(-rows // PER_WORD)), ORDER: (columns,)}
    for part, shape in wanted.items():
        if part in held and tuple(held[part].shape) != shape:
            raise CheckpointError(
                f"{base}{QWEIGHT} has {rows} rows of {columns} columns, {group or columns} of which share a scale, so "
                f"its {part} should be {list(shape)}; they are {list(held[part].shape)}. Download the checkpoint again."
            )


def _integers(words: Tensor) -> Tensor:
    """i32 [R, C] -> the eight integers of each word, the lowest bits first, [R, 8 C]."""
    shifts = torch.arange(0, 32, BITS, dtype=torch.int32)
    return (words.unsqueeze(-1) >> shifts & 15).flatten(1)


def _in_parts(tensors: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Files of bearable size."""
    part: dict[str, Tensor] = {}
    size = 0
    for held in tensors:
        nbytes = sum(tensor.nbytes for tensor in held.values())
        if part and size + nbytes > SHARD_BYTES:
            yield part
            part, size = {}, 0
        part |= held
        size += nbytes
    if part:
        yield part
