"""Which tensors of a checkpoint are routed experts', judged by names and shapes, never by a list of families.

Three layouts are known:
  …layers.3.mlp.experts.5.gate_proj.weight            a tensor for each expert
  …layers.3.mlp.experts.gate_up_proj                  a tensor for all, its leading dimension the expert
  …layers.3.block_sparse_moe.input_linear.weight      the same without the word, known by the router beside it
Shared experts (`shared_expert.`, `shared_experts.`) run for every token: they are dense.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from store.shard import TensorSpan

EXPERTS = "experts"
ROUTERS = frozenset({"gate", "router"})


@dataclass(frozen=True, slots=True)
class Place:
    """What a tensor's name says: `stack`.`layer`.`module`, then the expert's id, or None where one tensor holds all."""

    stack: str
    layer: int
    module: str
    expert: int | None
    projection: str

    @property
    def owner(self) -> str:
        return f"{self.stack}.{self.layer}.{self.module}"


def find_routers(tensors: Iterable[TensorSpan]) -> dict[str, int]:
    """The modules that have a router, each with the number of experts that it scores: its matrix is `[E, H]`."""
    found: dict[str, int] = {}
    for span in tensors:
        words = span.name.split(".")
        at = next((i for i, word in enumerate(words) if word in ROUTERS), None)
        if at is not None and len(span.shape) == 2:
            found[".".join(words[:at])] = span.shape[0]
    return found


def place(span: TensorSpan, routers: Mapping[str, int]) -> Place | None:
    """Where `span` belongs if it is a routed expert's, else None."""
    words = span.name.split(".")
    if EXPERTS in words:
        return _under_experts(span, words, words.index(EXPERTS))
    if len(span.shape) == 3:
        for end in range(len(words) - 1, 0, -1):
            if routers.get(".".join(words[:end])) == span.shape[0]:
                return _placed(words, end, None, end)
    return None


def _under_experts(span: TensorSpan, words: list[str], at: int) -> Place | None:
    rest = words[at + 1 :]
    if rest and rest[0].isdecimal():
        return _placed(words, at + 1, int(rest[0]), at + 2)
    if len(span.shape) < 2 or ROUTERS & set(rest):  # a correction bias [E] or a router kept here is the router's
        return None
    return _placed(words, at + 1, None, at + 1)


def _placed(words: list[str], module_end: int, expert: int | None, projection_start: int) -> Place | None:
    """The layer is the last number before the module's own name."""
    at = next((i for i in range(module_end - 1, 0, -1) if words[i].isdecimal()), None)
    if at is None or projection_start >= len(words):
        return None
    module, projection = ".".join(words[at + 1 : module_end]), ".".join(words[projection_start:])
    return Place(".".join(words[:at]), int(words[at]), module, expert, projection)
