"""vLLM's pruned experts (RIY): JSON, a pair `[decoder layer, expert]` for each that goes.

Source: vLLM pull request #37824 (open) and its docs/features/riy.md, profile version 1: pruned experts get -inf before
top-k, so tokens are re-routed as in our mode mask; their weights are not loaded. It refuses pairs that are out of range
or twice there, and layers that keep fewer than top-k.
"""

from __future__ import annotations

import json
from pathlib import Path

from profiler.exports.base import Experts, Subject, refused


class VllmRiy:
    name = "vllm-riy"
    serves = "vLLM with pull request #37824: the others are masked before top-k and not loaded"

    def write(self, subject: Subject) -> bytes:
        shape = subject.shape
        pruned = [
            [layer, expert]
            for layer, ids in zip(shape.layers, subject.experts, strict=True)
            for expert in range(shape.experts)
            if expert not in ids
        ]
        found = {"version": 1, "model": shape.folder.name, "workload": subject.task, "pruned_experts": pruned}
        return json.dumps(found).encode() + b"\n"

    def read(self, content: bytes, subject: Subject) -> Experts:
        shape = subject.shape
        found = json.loads(content)
        if found["version"] != 1:
            raise refused(self, f"profile version 1 was wanted, got {found['version']}.")
        pruned = [(layer, expert) for layer, expert in found["pruned_experts"]]
        strangers = [pair for pair in pruned if pair[0] not in shape.layers or not 0 <= pair[1] < shape.experts]
        if strangers or len(set(pruned)) < len(pruned):
            raise refused(self, f"{(strangers or pruned)[0]} is no expert of this model, or there twice.")
        kept = [
            tuple(expert for expert in range(shape.experts) if (layer, expert) not in pruned) for layer in shape.layers
        ]
        if poor := [layer for layer, ids in zip(shape.layers, kept, strict=True) if len(ids) < shape.top_k]:
            raise refused(self, f"layer {poor[0]} keeps fewer experts than the {shape.top_k} a token goes to.")
        return tuple(kept)

    def options(self, subject: Subject, file: Path) -> str:  # noqa: ARG002 - the file says all
        return f"vllm serve MODEL --riy-expert-profile {file}"
