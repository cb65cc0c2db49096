"""vllm-ascend's ordered experts: JSONL, one line `{"decoder layer": [ids]}` a layer, those that stay first.

Source: vllm-ascend pull request #12525 (open): Qwen3-MoE alone; `int(experts * (1 - expert_prune_ratio))` of each list
are kept in every layer, and the router's rows with them. So the same number must stay in every layer, and the file is
right with the ratio that goes with it and no other: what comes after those that stay is in no order of merit.
"""

from __future__ import annotations

import json
from pathlib import Path

from profiler.exports.base import Experts, Subject, refused

FAMILY = "qwen3_moe"


class VllmAscend:
    name = "vllm-ascend"
    serves = "vllm-ascend with pull request #12525, Qwen3-MoE: the others are not loaded"

    def write(self, subject: Subject) -> bytes:
        shape = subject.shape
        if shape.family != FAMILY:
            raise refused(self, f"only {FAMILY} is read, this model is {shape.family}. Use another form.")
        if len({len(ids) for ids in subject.experts}) > 1:
            raise refused(
                self,
                f"every layer must keep the same number, this selection keeps {sorted(map(len, subject.experts))}. "
                "Export one of the allocator `uniform`.",
            )
        lines = []
        for layer, ids in zip(shape.layers, subject.experts, strict=True):
            others = [expert for expert in range(shape.experts) if expert not in ids]
            lines.append(json.dumps({str(layer): [*ids, *others]}) + "\n")
        return "".join(lines).encode()

    def read(self, content: bytes, subject: Subject) -> Experts:
        shape = subject.shape
        stay = int(shape.experts * (1.0 - ratio(subject)))
        found: dict[int, tuple[int, ...]] = {}
        for line in content.decode().splitlines():
            [(layer, ids)] = json.loads(line).items()
            if int(layer) in found or sorted(ids) != list(range(shape.experts)):
                raise refused(self, f"layer {layer} is there twice, or is no order of {shape.experts} experts.")
            found[int(layer)] = tuple(ids)
        if tuple(found) != shape.layers:
            raise refused(self, f"wanted the layers {list(shape.layers)}, got {list(found)}.")
        return tuple(tuple(sorted(ids[:stay])) for ids in found.values())

    def options(self, subject: Subject, file: Path) -> str:
        settings = {"expert_list_file": str(file), "expert_prune_ratio": ratio(subject)}
        return f"vllm serve MODEL --additional-config '{json.dumps(settings)}'"


def ratio(subject: Subject) -> float:
    """Half an expert more than stay, so that no rounding of the reader's product loses one."""
    kept, experts = len(subject.experts[0]), subject.shape.experts
    return 0.0 if kept == experts else round(1 - (kept + 0.5) / experts, 9)
