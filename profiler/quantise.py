"""A copy of a model whose experts lie in FP8, INT4 or MXFP4, rounded to the nearest.

No text is needed, and nothing but the experts changes. Layouts are those that such models are published in: gpt-oss's
for it in MXFP4, DeepSeek-V3's for FP8, compressed-tensors' for all else. One expert is in memory at a time, and what
one layer has become. E experts, N rows, K columns.
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
from engine.rounding import as_stored, rounded
from engine.skeleton import build_skeleton
from engine.unpacking import unpack
from profiler.pack_folder import CARD, Shards, dense_tensors, refuse_existing, slices_of, tensor_of, written_whole
from profiler.progress import Progress, Report
from store.checkpoint import CheckpointMap
from store.errors import CheckpointError, UnsupportedFamily
from store.experts import ExpertMap
from store.quantisation import FP8, PUBLISHED, coding_of, with_experts_in
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


def quantise_model(source: Path, folder: Path, way: str, finish: Finish, report: Report) -> dict[str, Any]:
    """Writes the copy and gives its card. Raises Conflict where `folder` exists, UnsupportedFamily for a model that is
    quantised already or whose experts lie transposed (FP8), InvalidInput for rows that are no whole groups,
    CheckpointError for NaN; nothing is left then."""
    refuse_existing(folder)
    checkpoint = CheckpointMap.open(source)
    if coding_of(checkpoint.config) is not None:
        raise UnsupportedFamily(f"{source} is quantised already. Quantise the model's own bfloat16 or float32 version.")
    experts = ExpertMap.build(checkpoint)
    card = ModelCard.describe(checkpoint, experts)
    skeleton, _ = build_skeleton(checkpoint, experts, card.geometry.dtype)
    transposed = bool(skeleton.joints[0].experts.is_transposed)
    if transposed and way == FP8:
        raise UnsupportedFamily(
            f"{card.family} keeps its experts' matrices transposed, and of FP8 those can't be multiplied as they lie. "
            "Quantise it to INT4 or MXFP4."
        )
    writer = _Writer(checkpoint, experts, way, published=card.family == PUBLISHED, transposed=transposed)
    with written_whole(folder, checkpoint, with_experts_in(way, checkpoint.config)) as made:
        losses = writer.write(made, report)
        checkpoint.check()
        after = ExpertMap.build(CheckpointMap.open(made))
        told = {
            "packed_from": card.fingerprint,
            "family": card.family,
            "format": way,
            "expert_bytes": [experts.total_bytes, after.total_bytes],
            "relative_error": [round(loss.relative, 5) for loss in losses],
            **finish(made),
        }
        (made / CARD).write_text(json.dumps(told, indent=2) + "\n")
    return told


class _Writer:
    """One checkpoint's tensors, layer by layer."""

    def __init__(
        self, source: CheckpointMap, experts: ExpertMap, way: str, *, published: bool, transposed: bool
    ) -> None:  # fmt: skip
        """`published`: with gpt-oss's names and shapes. `transposed`: tensors of all experts are [E, K, N]."""
        self._source, self._experts = source, experts
        self._way, self._coding = way, coding_of(with_experts_in(way, source.config))
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
            numbers, scales = self._one(name, tensor_of(self._source, name), loss)
        else:
            each = (matrix.T if self._transposed else matrix for matrix in slices_of(self._source, name))
            made = zip(*(self._one(name, matrix, loss) for matrix in each), strict=True)
            numbers, scales = (torch.stack(parts) for parts in made)  # [E, N, ...] each
        return as_stored(self._way, name, numbers, scales, published=self._published)

    def _one(self, name: str, matrix: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        wide = matrix.float().contiguous()
        if not bool(torch.isfinite(wide).all()):
            raise CheckpointError(f"{name} has NaN or infinity. Download the checkpoint again.")
        numbers, scales = rounded(self._way, wide)
        found = torch.empty_like(wide)
        assert self._coding is not None, self._way
        unpack(self._coding, numbers.view(torch.uint8), scales, found)
        loss.error += float((found - wide).square().sum(dtype=torch.float64))
        loss.weight += float(wide.square().sum(dtype=torch.float64))
        return numbers, scales
