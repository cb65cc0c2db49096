"""Our own form: JSON that says all there is to say, for scripts and engines to come. docs/methods.md lists its keys.

`experts` has the decoder layer as the checkpoint numbers it, and the ids that stay. `model.fingerprint` covers config,
weights and tokenizer: a reader refuses another model.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from profiler.exports.base import Experts, Subject, refused
from store.errors import MismatchError

FORMAT, VERSION = "moepager-selection", 1


class Plain:
    name = "json"
    serves = "whoever reads JSON: layer -> ids of the experts that stay"

    def write(self, subject: Subject) -> bytes:
        shape, stored = subject.shape, subject.stored
        evidence = None if subject.evidence is None else asdict(subject.evidence)
        for internal in ("selection", "levels"):
            (evidence or {}).pop(internal, None)
        found = {
            "format": FORMAT,
            "version": VERSION,
            "model": {
                "fingerprint": shape.fingerprint,
                "family": shape.family,
                "moe_layers": list(shape.layers),
                "experts": shape.experts,
                "top_k": shape.top_k,
            },
            "task": subject.task,
            "profile": stored.profile,
            "selection": stored.id,
            "scorer": stored.scorer,
            "allocator": stored.allocator,
            "keep": stored.keep,
            "stand_in": stored.stand_in,
            "calls": stored.selection.calls,
            "digest": stored.selection.digest,
            "evidence": evidence,
            "experts": {str(layer): list(ids) for layer, ids in zip(shape.layers, subject.experts, strict=True)},
        }
        return json.dumps(found, indent=1).encode() + b"\n"

    def read(self, content: bytes, subject: Subject) -> Experts:
        """Raises MismatchError for a selection of another model."""
        shape = subject.shape
        found: Any = json.loads(content)
        if (found.get("format"), found.get("version")) != (FORMAT, VERSION):
            raise refused(self, f"wanted format {FORMAT!r} version {VERSION}, got {found.get('format')!r}.")
        if found["model"]["fingerprint"] != shape.fingerprint:
            raise MismatchError(
                f"The selection was made for the model {found['model']['fingerprint'][:16]}, this one is "
                f"{shape.fingerprint[:16]}. Open the model that it was made for, or profile this one."
            )
        if list(found["experts"]) != [str(layer) for layer in shape.layers]:
            raise refused(self, f"wanted the layers {list(shape.layers)}, got {list(found['experts'])}.")
        return tuple(tuple(ids) for ids in found["experts"].values())

    def options(self, subject: Subject, file: Path) -> str:  # noqa: ARG002 - no engine is started
        return "docs/methods.md says what its keys mean"
