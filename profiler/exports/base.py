"""What a form of export is given, and what it must be able to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.card import ModelCard
from store.checkpoint import CheckpointMap
from store.errors import InvalidInput
from store.experts import ExpertMap
from store.records import Evaluation, StoredSelection

Experts = tuple[tuple[int, ...], ...]  # of each MoE layer, in order, the ids that stay


@dataclass(frozen=True, slots=True)
class Shape:
    """The model: `layers` are the decoder layers that hold its MoE layers, of `depth` in all."""

    folder: Path
    family: str
    fingerprint: str
    layers: tuple[int, ...]
    depth: int
    experts: int
    top_k: int
    config: Mapping[str, Any]  # config.json; of a model of several modalities, its text part

    @classmethod
    def read(cls, folder: Path) -> Shape:
        """From headers and config.json alone."""
        checkpoint = CheckpointMap.open(folder)
        experts = ExpertMap.build(checkpoint)
        card = ModelCard.describe(checkpoint, experts)
        config: Mapping[str, Any] = checkpoint.config.get("text_config") or checkpoint.config
        return cls(
            card.folder, card.family, card.fingerprint, experts.layers, card.geometry.decoder_layers, card.experts,
            card.top_k, config,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Subject:
    """What is exported: a task's selection, and the evidence that the store has for it."""

    shape: Shape
    task: str
    stored: StoredSelection
    evidence: Evaluation | None

    @property
    def experts(self) -> Experts:
        return self.stored.selection.experts


class Form(Protocol):
    """How one engine writes down which experts matter. Its module names where that is documented."""

    name: str
    serves: str  # which engine reads it, and what it makes of it

    def write(self, subject: Subject) -> bytes:
        """The file. Raises InvalidInput for what that engine could not read, or would read as something else."""

    def read(self, content: bytes, subject: Subject) -> Experts:
        """What that engine makes of a file when it is started by the subject's options on the subject's model. Raises
        InvalidInput for what it would refuse."""

    def options(self, subject: Subject, file: Path) -> str:
        """With which options that engine is started on the file."""


def refused(form: Form, reason: str) -> InvalidInput:
    return InvalidInput(f"{form.name}: {reason}", param="form")
