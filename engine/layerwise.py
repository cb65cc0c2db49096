"""One decoder layer of the model at a time, on hidden states that the caller carries: for models larger than memory.

The model's own forward runs each time, so masks, positions and rotary tables are its own; layers before the wanted one
are stepped over, the wanted one is handed the carried states, and the pass ends with its output. B rows, S positions,
H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from store.errors import UnsupportedFamily


class Reached(Exception):  # noqa: N818 - no error: it ends a pass whose rest nobody needs
    """The wanted layer's output."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def decoder_layers(model: Any, parts: Sequence[Any]) -> tuple[list[nn.Module], list[int]]:
    """The model's decoder layers in order, and which of them holds each of `parts` (one a MoE layer)."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            inside = {id(inner): at for at, layer in enumerate(module) for inner in layer.modules()}
            if all(id(part) in inside for part in parts):
                return list(module), [inside[id(part)] for part in parts]
    raise UnsupportedFamily(
        f"{type(model).__name__} does not keep its decoder layers in one list, so it can't be run layer by layer. "
        "Profile it with a budget that holds the whole model."
    )


@contextmanager
def only(layers: Sequence[nn.Module], wanted: int, hidden: Tensor | None) -> Iterator[None]:
    """While this is open, a pass of the model raises Reached with the output of layer `wanted`, begun as by `since`."""
    with since(layers, wanted, hidden):
        handle = layers[wanted].register_forward_hook(_reach)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def since(layers: Sequence[nn.Module], wanted: int, hidden: Tensor | None) -> Iterator[None]:
    """While this is open, a pass of the model begins at layer `wanted`.

    `hidden` [B, S, H] is what the layer before it gave; None for the first layer, which takes the model's embeddings.
    """
    with ExitStack() as stack:
        for layer in layers[:wanted]:
            stack.enter_context(_stepped_over(layer))
        if hidden is not None:
            handed = layers[wanted].register_forward_pre_hook(_hand_over(hidden), with_kwargs=True)
            stack.callback(handed.remove)
        yield


@contextmanager
def _stepped_over(layer: nn.Module) -> Iterator[None]:
    own = vars(layer).get("forward")  # where engine.layer_block has put one
    layer.forward = _give_back
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own


def _give_back(hidden_states: Tensor, *_: object, **__: object) -> Tensor:
    return hidden_states


def _hand_over(hidden: Tensor) -> Any:
    def hook(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    return hook


def _reach(layer: nn.Module, _: object, output: object) -> None:
    if not isinstance(output, Tensor):
        raise UnsupportedFamily(
            f"{type(layer).__name__} gives a {type(output).__name__} where hidden states were expected, so the model "
            "can't be run layer by layer. Profile it with a budget that holds the whole model."
        )
    raise Reached(output)
