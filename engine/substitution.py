"""Functions that modules of transformers call by name, replaced by ours in the modules of one model alone.

A family's linear attention, convolutions and state spaces are functions beside its modules, which look them up by name.
Those that take what one of ours takes are tried against it; where they agree, the modules of this model call ours.
transformers' own modules, and other models of the process, stay as they were.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from engine.quiet import no_advice


@dataclass(frozen=True, slots=True)
class Stand:
    """What may take the place of a function with parameters of these names: `agrees(theirs)` tries it, and
    `apply(theirs, ...)` is called as theirs is, which it may do itself."""

    takes: frozenset[str]
    agrees: Callable[[Any], bool]
    apply: Callable[..., Any]


def answer_of(theirs: Any, *args: Any, **named: Any) -> Any:
    """What a function gives that is tried; None where it can't be called so."""
    try:
        return theirs(*args, **named)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None


def lie_in_one(named: Mapping[str, Any]) -> bool:
    """Whether rows are handed over one after the other, told apart by numbers beside them, which ours don't take."""
    return any("seq" in name and each is not None for name, each in named.items())


def outlined(takes: frozenset[str], outline: Callable[..., Any]) -> Stand:
    """For a model on shapes alone: `outline`, called as theirs is, returns tensors of the right shapes. Whether ours
    would do the same as theirs is not tried."""
    return Stand(takes, lambda _: True, lambda _, *args, **named: outline(*args, **named))


def substitute(model: nn.Module, stands: Sequence[Stand]) -> int:
    """The modules of `model` that call ours from now on, counted. Each function is tried once."""
    in_place_of = cache(partial(_stand_in, stands))
    count = 0
    for module in model.modules():
        forward = inspect.unwrap(type(module).forward)
        if not isinstance(forward, FunctionType) or "forward" in vars(module):
            continue
        ours = {name: in_place_of(found) for name, found in _called(forward).items()}
        chosen = {name: found for name, found in ours.items() if found is not None}
        if chosen:
            module.forward = MethodType(_calling(forward, chosen), module)
            count += 1
    return count


def _called(forward: FunctionType) -> Mapping[str, FunctionType]:
    """Functions of its own file that `forward` names."""
    named = {name: forward.__globals__.get(name) for name in forward.__code__.co_names}
    return {
        name: found
        for name, found in named.items()
        if isinstance(found, FunctionType) and found.__module__ == forward.__module__
    }


def _stand_in(stands: Sequence[Stand], theirs: FunctionType) -> Any:
    """Of the stands that take no more than `theirs` does the one that takes most, if it agrees."""
    parameters = inspect.signature(theirs).parameters.keys()
    fitting = max((each for each in stands if each.takes <= parameters), key=lambda each: len(each.takes), default=None)
    with no_advice():
        return partial(fitting.apply, theirs) if fitting is not None and fitting.agrees(theirs) else None


def _calling(forward: FunctionType, ours: Mapping[str, Any]) -> FunctionType:
    """`forward` with other functions under some of the names that it calls."""
    return FunctionType(
        forward.__code__, {**forward.__globals__, **ours}, forward.__name__, forward.__defaults__, forward.__closure__
    )
