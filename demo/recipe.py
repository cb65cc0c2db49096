"""Everything that decides the training's outcome besides the code and the machine's rounding."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    seed: int = 7
    rows: int = 40  # per batch, each of one task
    row_tokens: int = 128
    learning_rate: float = 3e-3
    final_share: float = 0.05  # of the learning rate, at the end
    warmup: int = 100
    steps: int = 3800
    weight_decay: float = 0.05
    prompt_weight: float = 0.1  # of a prompt token's loss beside a response token's
    row_entropy: float = 0.2  # few experts a row
    batch_entropy: float = 0.26  # all experts over the batch
    router_z: float = 1e-4
