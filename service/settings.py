"""Settings of a service, from MOEPAGER_* variables and the command line. `store.home` alone reads MOEPAGER_HOME.

A command-line option wins over its variable. A variable that names no setting is refused: a setting that silently
does nothing is worse than none.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from engine.guard import ALARM_RATE
from service.redaction import PRIVATE
from store.errors import InvalidInput
from store.sizes import parse_bytes

PREFIX = "MOEPAGER_"
HOME = "MOEPAGER_HOME"  # read by store.home

UnknownTask = Literal["exact", "generalist", "refuse"]
ServedMode = Literal["mask", "auto"]


def _memory(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return parse_bytes(value)
    except InvalidInput as error:
        raise ValueError(str(error)) from None


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return value


Memory = Annotated[int, BeforeValidator(_memory), Field(gt=0)]


class Settings(BaseSettings):
    """Everything that a service can be told. `None` means what the comment beside the field says."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    model: str | None = None  # a folder or a hub id; None: the bundled demo model
    store: str | None = None  # a database URL; None: the embedded store in MOEPAGER_HOME
    memory: Memory | None = None  # bytes for everything on the device; None: as much as the whole model wants
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)  # 0: any free port
    embedder: str = "minilm"
    index: Path | None = None  # folder of the vector index; None: kept in memory only
    unknown_task: UnknownTask = "exact"
    threshold: float | None = Field(default=None, ge=-1, le=1)  # None: calibrated on the stored exemplars
    keep: float | None = Field(default=None, gt=0, le=1)  # None: the largest with evidence that fits the budget
    scorer: str | None = None  # None: the one with the best evidence
    mode: ServedMode = "mask"  # of requests of a known task that name none; auto: mask with a guard
    alarm_rate: float = Field(default=ALARM_RATE, gt=0, le=0.5)  # share of on-task queries that the guard may stop
    max_context: int | None = Field(default=None, gt=0)  # tokens; None: the engine's choice for this model
    max_batch: int = Field(default=8, gt=0)
    answer_tokens: int = Field(default=512, gt=0)  # the limit of an answer whose request names none
    queue_size: int = Field(default=64, gt=0)
    background_wait: float = Field(default=30.0, ge=0)  # seconds that a background request waits for its experts
    request_timeout: float = Field(default=600.0, gt=0)  # seconds
    grace_seconds: float = Field(default=10.0, ge=0)  # for answers under way when the service is told to stop
    job_memory: Memory | None = None  # bytes for a profiling job, beside the service's own; None: the same as memory
    keep_unmatched: int = Field(default=0, ge=0, le=10_000)  # queries near no task that are kept for proposals; 0: none
    redact: Annotated[str, AfterValidator(_pattern)] = PRIVATE  # what of their text is left out, a regular expression
    traces: str | None = None  # an OTLP endpoint over HTTP, such as http://localhost:4318/v1/traces; None: no traces
    redis: str | None = None  # a Redis URL: for jobs of `moepager worker`s and shared rate limits; None: neither
    reload_seconds: float = Field(default=1.0, gt=0)  # between two looks whether tasks or keys in the store changed
    device: str = "cpu"
    dtype: str = "auto"
    threads: int | None = Field(default=None, gt=0)  # None: torch's own choice
    stand_ins: int = Field(default=0, ge=0)  # tasks whose stand-ins are in memory at once; 0: none are served
    kernel: str = "auto"  # who multiplies few rows, as in decoding: auto, own (refuses to start without) or torch


def refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    """Refuse the first MOEPAGER_* variable that names no setting, with the nearest right name."""
    known = [HOME, *(PREFIX + name.upper() for name in Settings.model_fields)]
    for name in sorted(environment):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)
            raise InvalidInput(f"No setting is named {name}. Did you mean {near[0]}? All of them: {', '.join(known)}.")


def load_settings(**options: Any) -> Settings:
    """Settings from the environment, with the options that are not None on top."""
    refuse_unknown_variables(os.environ)
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        raise InvalidInput(_explain(error, given), param=_field(error)) from None


def _field(error: ValidationError) -> str:
    return str(error.errors()[0]["loc"][0])


def _explain(error: ValidationError, given: Mapping[str, object]) -> str:
    first = error.errors()[0]
    name = _field(error)
    source = f"--{name.replace('_', '-')}" if name in given else PREFIX + name.upper()
    return f"{source}: {first['msg'].removeprefix('Value error, ')} (got {first['input']!r})."
