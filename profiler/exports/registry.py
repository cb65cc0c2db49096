"""The forms, by name."""

from __future__ import annotations

from collections.abc import Mapping

from profiler.exports.base import Form
from profiler.exports.ktransformers import KTransformers
from profiler.exports.plain import Plain
from profiler.exports.vllm_ascend import VllmAscend
from profiler.exports.vllm_riy import VllmRiy
from store.errors import InvalidInput

_ALL: tuple[Form, ...] = (Plain(), VllmRiy(), VllmAscend(), KTransformers())
FORMS: Mapping[str, Form] = {form.name: form for form in _ALL}


def choose(name: str) -> Form:
    """Raises InvalidInput for an unknown one."""
    if name not in FORMS:
        raise InvalidInput(f"There is no form {name!r}; there are {', '.join(FORMS)}.", param="form")
    return FORMS[name]
