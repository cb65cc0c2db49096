"""A transformers model on the meta device: built from its config alone, and tried there for a plan."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from engine import dispatch
from engine.cache_shape import CacheShape
from engine.running_functions import outlines
from engine.substitution import substitute
from engine.trial import try_caches
from engine.watermark import NOTHING, Working, working_bytes
from store.errors import UnsupportedFamily


@dataclass(frozen=True, slots=True)
class Tried:
    """What each decoder layer caches, how many numbers the model has besides its experts and, where a layer has running
    states, what a pass works in: by transformers' functions and by ours, which as many modules call."""

    caches: tuple[CacheShape, ...]
    dense: int
    theirs: Working = NOTHING
    ours: Working = NOTHING
    modules: int = 0


def try_layers(folder: Path, dtype: str) -> Tried:
    """Of the model of `folder`, whose config.json is enough, in `dtype`.

    Tried once for what is written there: a command may describe its model many times. Raises UnsupportedFamily for one
    that can't be run on shapes alone.
    """
    return _try_layers(folder, dtype, (folder / "config.json").read_bytes())


@lru_cache(maxsize=8)
def _try_layers(folder: Path, dtype: str, _: bytes) -> Tried:
    model = on_meta(folder, getattr(torch, dtype))
    caches, dense = try_caches(model), _dense_numbers(model)
    if not any(shape.states for shape in caches):
        return Tried(caches, dense)
    kept = sum(state.nbytes for shape in caches for state in shape.states)
    theirs = working_bytes(model, kept)
    modules = substitute(model, outlines())
    return Tried(caches, dense, theirs, working_bytes(model, kept), modules)


def _dense_numbers(model: Any) -> int:
    """In all that a checkpoint holds of it but its experts. What else a file has, as a tower for pictures, is not
    loaded."""
    modules = [module for module in model.modules() if not hasattr(module, "is_transposed")]
    held = [each for module in modules for each in module._parameters.values()]
    for module in modules:
        held += [each for name, each in module._buffers.items() if name not in module._non_persistent_buffers_set]
    return sum(tensor.numel() for tensor in {id(each): each for each in held if each is not None}.values())


def on_meta(folder: Path, dtype: torch.dtype) -> Any:
    """With our experts in the place of its own. Raises UnsupportedFamily for what transformers can't build."""
    dispatch.register()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _refuse_wrappers(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, experts_implementation=dispatch.IMPLEMENTATION, trust_remote_code=False
            )
    except (ValueError, KeyError, ImportError) as error:
        raise UnsupportedFamily(f"transformers can't build the model of {folder}: {error}") from error
    model.config.use_cache = False
    return model


def _refuse_wrappers(config: Any) -> None:
    """Models of several modalities: served by their language model where transformers has a class for that alone."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedFamily(
            f"transformers has no language model for model_type {config.model_type!r} alone, only one of several "
            "modalities or none. Serve a checkpoint of a text model; docs/families.md lists those that work."
        )
