"""How an expert is computed, as products.c takes it: where its weights lie in a slot, and what its gate does.

n tokens, F an expert's inner width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.addresses import DTYPES
from engine.products import coding_fields

if TYPE_CHECKING:
    from engine.layout import SlotLayout

ACTIVATIONS: Mapping[str, int] = {  # by the name of the module's class in torch or transformers
    "SiLU": 0,
    "SiLUActivation": 0,
    "GELUActivation": 1,
    "NewGELUActivation": 2,
    "GELUTanh": 2,
    "ReLU": 3,
}
CLAMPED = 4
SIZES = (0.1, 1.0, 30.0)  # of the inputs of a trial: what is clamped shows itself
WIDEST = 1 << 16  # bytes of a row, as products_coded.h has it
TRIALS = 64  # numbers of each size


@dataclass(frozen=True, slots=True)
class Gate:
    """What becomes of an expert's first product. Gate and up are its halves or, `interleaved`, every other number."""

    activation: int
    interleaved: bool = False
    alpha: float = 1.0  # of CLAMPED, as is the limit
    limit: float = inf

    @classmethod
    def of(cls, module: Any) -> Gate | str:
        """Found out by trying the module's own, in float32; a string says why there is none that products.c knows."""
        name = type(getattr(module, "act_fn", None)).__name__
        if not module.has_gate:
            return cls(ACTIVATIONS[name]) if name in ACTIVATIONS else f"an activation that is {name}"
        made = torch.Generator().manual_seed(11)
        sizes = [*SIZES, *(4 * limit for limit in _numbers(module, "limit"))]
        x = torch.cat([torch.randn(1, 2 * TRIALS, generator=made) * size for size in sizes])  # [n, 2F]
        try:
            wanted = module._apply_gate(x)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return "a gate of its own"
        return next((gate for gate in _candidates(module, name) if gate.gives(x, wanted)), "a gate of its own")

    def gives(self, x: Tensor, wanted: Any) -> bool:
        """Whether `x` f32 [n, 2F] becomes `wanted` [n, F]."""
        found = self(x)
        if not isinstance(wanted, Tensor) or wanted.shape != found.shape:
            return False
        return torch.allclose(found, wanted.float(), rtol=1e-4, atol=1e-6)

    def __call__(self, x: Tensor) -> Tensor:
        """[n, 2F] -> [n, F]: the slow truth of it."""
        gate, up = (x[..., ::2], x[..., 1::2]) if self.interleaved else x.chunk(2, -1)
        if self.activation == CLAMPED:  # gpt-oss's, MiniMax-M3's
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
            return gate * torch.sigmoid(gate * self.alpha) * (up + 1)
        return (F.silu, F.gelu, _gelu_tanh, F.relu)[self.activation](gate) * up


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _candidates(module: Any, name: str) -> Iterator[Gate]:
    if name in ACTIVATIONS:
        yield Gate(ACTIVATIONS[name])
    for alpha in _numbers(module, "alpha"):
        for limit in _numbers(module, "limit"):
            for interleaved in (True, False):
                yield Gate(CLAMPED, interleaved, alpha, limit)


def _numbers(module: Any, end: str) -> list[float]:
    """Different values of the module's attributes whose name ends so."""
    found = {
        float(value) for key, value in vars(module).items() if key.endswith(end) and isinstance(value, int | float)
    }
    return sorted(found)


@dataclass(frozen=True, slots=True)
class Scales:
    """Where those of both quantised matrices begin in a slot, how products.c reads them (its `struct coding`), and how
    many rows of the first were quantised by themselves. -1 for matrices that are as they are served."""

    up: int = -1
    down: int = -1
    coding: tuple[int, int, int, int] = (0, 0, 1, 0)
    part: int = 1


PLAIN = Scales()


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """How products.c finds its way in a slot: `places` are the first fields of its `struct layout`; `across`, both
    matrices are transposed, [H, 2F] and [F, H]."""

    places: tuple[int, int, int, int, int, int, int, int, int]
    dtype: torch.dtype
    gate: Gate
    across: bool = False
    scales: Scales = PLAIN
    fields: tuple[int | float, ...] = field(init=False)

    def __post_init__(self) -> None:
        gate = self.gate
        scales = (self.scales.up, self.scales.down, *self.scales.coding, self.scales.part)
        rest = (int(self.across), int(gate.interleaved), gate.alpha, gate.limit, *scales)
        object.__setattr__(self, "fields", (self.places[0], gate.activation, *self.places[1:], *rest))

    @property
    def packed(self) -> bool:
        """Whether its matrices lie quantised."""
        return self.scales != PLAIN

    @property
    def hidden(self) -> int:
        return self.places[2]

    @property
    def weights(self) -> int:
        """How many an expert has, biases left out."""
        _, gated, hidden, inner = self.places[:4]
        return hidden * inner * (2 + gated)

    @classmethod
    def of(cls, module: Any, layout: SlotLayout) -> ExpertShape | str:
        """Of the module's experts; a string says why products.c can't compute them."""
        if layout.dtype not in DTYPES:
            return f"experts in {layout.dtype}"
        if getattr(module, "has_post_expert_norm", False):
            return "a norm after each expert"
        scales = _scales(module, layout)
        if isinstance(scales, str):
            return scales
        gate = Gate.of(module)
        if isinstance(gate, str):
            return gate
        across = bool(module.is_transposed) and scales == PLAIN
        return cls(_places(module, layout), layout.dtype, gate, across, scales)


def _scales(module: Any, layout: SlotLayout) -> Scales | str:
    up, down = _up(module), "down_proj"
    matrices = {parameter.name: parameter for parameter in layout.parameters if parameter.name in (up, down)}
    first, second = (matrices[name].packed for name in (up, down))
    if first is None and second is None:
        return PLAIN
    if first is None or second is None or first.scales_dtype != second.scales_dtype:
        return "an expert's matrices that are quantised in unlike ways"
    if bool(module.is_transposed) != first.turned:
        return "quantised matrices that lie transposed"
    widest = max(max(parameter.shape) for parameter in matrices.values()) * layout.dtype.itemsize
    if widest > WIDEST:
        return f"rows of {widest} bytes, unpacked"
    return Scales(first.scales, second.scales, coding_fields(first.coding, first.scales_dtype), first.part)


def _up(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _places(module: Any, layout: SlotLayout) -> tuple[int, int, int, int, int, int, int, int, int]:
    at = {parameter.name: parameter.offset for parameter in layout.parameters}
    shapes = {parameter.name: parameter.shape for parameter in layout.parameters}
    up = _up(module)
    hidden, inner = shapes["down_proj"][::-1] if module.is_transposed else shapes["down_proj"]
    wide = (inner * (1 + module.has_gate), hidden)
    assert shapes[up] == (wide[::-1] if module.is_transposed else wide), shapes
    return (
        DTYPES[layout.dtype], int(module.has_gate), hidden, inner, layout.slot_bytes,
        at[up], at.get(f"{up}_bias", -1), at["down_proj"], at.get("down_proj_bias", -1),
    )  # fmt: skip
