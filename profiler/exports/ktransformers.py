"""KTransformers' placement: which experts the GPU holds; the others are computed on the CPU, so answers stay exact.

Source: ktransformers, doc/en/kt-kernel/experts-sched-Tutorial.md, and sglang-kt's kt_ep_wrapper.py: a torch file with
`logical_count` [passes, decoder layers, experts]; the strategy `frequency` puts the most often used of all layers on
the GPU, as many as the ratio of all routed experts says. Here a count is 1 for what the selection keeps and 0 for the
others, and the ratio is that of the selection, so that just these are chosen. SGLang's `--init-expert-location` takes
the same file as counts for expert parallelism.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch

from profiler.exports.base import Experts, Shape, Subject, refused

KEY = "logical_count"


class KTransformers:
    name = "ktransformers"
    serves = "KTransformers with SGLang: these on the GPU, the others on the CPU, none left out"

    def write(self, subject: Subject) -> bytes:
        shape = subject.shape
        if (counted := counted_layers(shape)) != shape.layers:
            raise refused(
                self,
                f"by config.json it takes the layers {list(counted)} for those with experts, but they are "
                f"{list(shape.layers)}: it would place others. Use another form.",
            )
        counts = torch.zeros(1, shape.depth, shape.experts, dtype=torch.int64)
        for layer, ids in zip(shape.layers, subject.experts, strict=True):
            counts[0, layer, list(ids)] = 1
        buffer = io.BytesIO()
        torch.save({KEY: counts}, buffer)
        return buffer.getvalue()

    def read(self, content: bytes, subject: Subject) -> Experts:
        shape = subject.shape
        counts = torch.load(io.BytesIO(content), weights_only=True)[KEY]
        if counts.dim() != 3 or tuple(counts.shape[1:]) != (shape.depth, shape.experts):
            raise refused(self, f"wanted counts [n, {shape.depth}, {shape.experts}], got {list(counts.shape)}.")
        most = int(len(shape.layers) * shape.experts * share(subject))
        used = torch.zeros(shape.depth * shape.experts, dtype=torch.bool)
        used[counts.sum(0).flatten().topk(most).indices] = True
        placed = used.view(shape.depth, shape.experts)
        return tuple(tuple(placed[layer].nonzero().flatten().tolist()) for layer in shape.layers)

    def options(self, subject: Subject, file: Path) -> str:
        return (
            "python -m sglang.launch_server --model MODEL --kt-expert-placement-strategy frequency "
            f"--init-expert-location {file} --kt-gpu-experts-ratio {share(subject)}"
        )


def share(subject: Subject) -> float:
    """Of all routed experts; half a one more than there are, so that no rounding of the reader's product loses one."""
    kept, whole = len(subject.stored.selection), len(subject.experts) * subject.shape.experts
    return 1.0 if kept == whole else round((kept + 0.5) / whole, 9)


def counted_layers(shape: Shape) -> tuple[int, ...]:
    """Which decoder layers that engine takes for MoE layers."""
    first, every = shape.config.get("first_k_dense_replace") or 0, shape.config.get("moe_layer_freq", 1)
    if isinstance(every, list):
        first, every = max(first, next((at for at, is_moe in enumerate(every) if is_moe), 0)), 1
    return tuple(layer for layer in range(shape.depth) if layer >= first and layer % every == 0)
