"""A copy of a model whose experts lie in MXFP4: four bits a weight and a power of two for 32, rounded to the nearest.

No text is needed, and nothing but the experts changes. gpt-oss gets the layout that it is published in, every other
family that of compressed-tensors (mxfp4-pack-quantized). One expert is in memory at a time, and what one layer
has become. E experts, N rows, K columns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.card import ModelCard
from engine.mxfp4 import as_stored, quantise, unpack
from engine.skeleton import build_skeleton
from profiler.pack_folder import CARD, Shards, dense_tensors, refuse_existing, slices_of, tensor_of, written_whole
from profiler.progress import Progress, Report
from store.checkpoint import CheckpointMap
from store.errors import CheckpointError, UnsupportedFamily
from store.experts import ExpertMap
from store.quantisation import MXFP4, PUBLISHED, in_mxfp4, way_of
from store.records import ExpertKey

Finish = Callable[[Path], dict[str, Any]]  # the finished folder, still unnamed -> what its card says besides


@dataclass(slots=True)
class Loss:
    """Sums of squares over weights: of what rounding changed, and of what was there."""

    error: float = 0.0
    weight: float = 0.0

    @property
    def relative(self) -> float:
        """The root mean square of the error, as a share of that of the weights."""
        return sqrt(self.error / self.weight) if self.weight else 0.0


def quantise_model(source: Path, folder: Path, finish: Finish, report: Report) -> dict[str, Any]:
    """Writes the copy and gives its card. Raises Conflict where `folder` exists, UnsupportedFamily for a model that is
    quantised already, InvalidInput for rows that are no whole groups, CheckpointError for NaN; nothing is left then."""
    refuse_existing(folder)
    checkpoint = CheckpointMap.open(source)
    if way_of(checkpoint.config) is not None:
        raise UnsupportedFamily(f"{source} is quantised already. Quantise the model's own bfloat16 or float32 version.")
    experts = ExpertMap.build(checkpoint)
    card = ModelCard.describe(checkpoint, experts)
    skeleton, _ = build_skeleton(checkpoint, experts, card.geometry.dtype)
    transposed = bool(skeleton.joints[0].experts.is_transposed)
    writer = _Writer(checkpoint, experts, published=card.family == PUBLISHED, transposed=transposed)
    with written_whole(folder, checkpoint, in_mxfp4(checkpoint.config)) as made:
        losses = writer.write(made, report)
        checkpoint.check()
        after = ExpertMap.build(CheckpointMap.open(made))
        told = {
            "packed_from": card.fingerprint,
            "family": card.family,
            "format": MXFP4,
            "expert_bytes": [experts.total_bytes, after.total_bytes],
            "relative_error": [round(loss.relative, 5) for loss in losses],
            **finish(made),
        }
        (made / CARD).write_text(json.dumps(told, indent=2) + "\n")
    return told


class _Writer:
    """One checkpoint's tensors, layer by layer."""

    def __init__(self, source: CheckpointMap, experts: ExpertMap, *, published: bool, transposed: bool) -> None:
        """`published`: with gpt-oss's names and shapes. `transposed`: tensors of all experts are [E, K, N]."""
        self._source, self._experts = source, experts
        self._published, self._transposed = published, transposed

    def write(self, folder: Path, report: Report) -> list[Loss]:
        """Each layer's loss."""
        shards, losses = Shards(folder), []
        for layer in range(len(self._experts.layers)):
            report(Progress("experts", "quantise", layer, len(self._experts.layers)))
            loss = Loss()
            held: dict[str, Tensor] = {}
            for name in self._names(layer):
                held |= self._quantised(name, loss)
            shards.add(held)
            losses.append(loss)
        for part in dense_tensors(self._source, self._experts):
            shards.add(part)
        shards.close()
        report(Progress("experts", "quantise", len(losses), len(losses)))
        return losses

    def _names(self, layer: int) -> Iterator[str]:
        """Of all tensors that hold a layer's experts."""
        module = self._experts.modules[layer]
        for part in self._experts.span(ExpertKey(layer, 0)).parts:
            single = f"{module}.0.{part.projection}"
            if single in self._source.tensors:
                yield from (f"{module}.{expert}.{part.projection}" for expert in range(self._experts.experts))
            else:
                yield f"{module}.{part.projection}"

    def _quantised(self, name: str, loss: Loss) -> dict[str, Tensor]:
        """A tensor of experts under its new names; a bias under its own."""
        shape = self._source.tensors[name].shape
        if name.endswith("bias") or len(shape) < 2:
            return {name: tensor_of(self._source, name)}
        if len(shape) == 2:
            blocks, scales = self._one(name, tensor_of(self._source, name), loss)
        else:
            each = (matrix.T if self._transposed else matrix for matrix in slices_of(self._source, name))
            made = zip(*(self._one(name, matrix, loss) for matrix in each), strict=True)
            blocks, scales = (torch.stack(parts) for parts in made)  # [E, N, K / 2], [E, N, K / 32]
        return as_stored(name, blocks, scales, published=self._published)

    def _one(self, name: str, matrix: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        wide = matrix.float().contiguous()
        if not bool(torch.isfinite(wide).all()):
            raise CheckpointError(f"{name} has NaN or infinity. Download the checkpoint again.")
        blocks, scales = quantise(wide)
        found = torch.empty_like(wide)
        unpack(blocks, scales, found)
        loss.error += float((found - wide).square().sum(dtype=torch.float64))
        loss.weight += float(wide.square().sum(dtype=torch.float64))
        return blocks, scales
