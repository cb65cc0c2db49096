"""Settings of a service: a file, MOEPAGER_* variables and the command line. `store.home` alone reads MOEPAGER_HOME.

An option of the command line wins over its variable, and that over the file. A name that is no setting's is refused
wherever it stands: a setting that silently does nothing is worse than none.
"""

from __future__ import annotations

import difflib
import io
import os
import re
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from dotenv.parser import parse_stream
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from engine.guard import ALARM_RATE
from service.redaction import PRIVATE
from store.errors import InvalidInput
from store.sizes import parse_bytes

PREFIX = "MOEPAGER_"
HOME = "MOEPAGER_HOME"  # read by store.home
FILE = "MOEPAGER_SETTINGS"  # names the settings' file

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
    allowed_hosts: str | None = None  # more names, with commas, that a service without keys answers to; *: any
    embedder: str = "minilm"
    index: Path | None = None  # folder of the vector index; None: kept in memory only
    unknown_task: UnknownTask = "exact"
    threshold: float | None = Field(default=None, ge=-1, le=1)  # None: calibrated on the stored exemplars
    keep: float | None = Field(default=None, gt=0, le=1)  # None: the largest with evidence that fits the budget
    scorer: str | None = None  # None: the one with the best evidence
    active: float = Field(default=1.0, gt=0, le=1)  # share of a token's calls of experts that is made
    mode: ServedMode = "mask"  # of requests of a known task that name none; auto: mask with a guard
    alarm_rate: float = Field(default=ALARM_RATE, gt=0, le=0.5)  # share of on-task queries that the guard may stop
    max_context: int | None = Field(default=None, gt=0)  # tokens; None: the engine's choice for this model
    max_batch: int = Field(default=8, gt=0)
    answer_tokens: int = Field(default=512, gt=0)  # the limit of an answer whose request names none
    queue_size: int = Field(default=64, gt=0)
    background_wait: float = Field(default=30.0, ge=0)  # seconds that a background request waits for its experts
    request_timeout: float = Field(default=600.0, gt=0)  # seconds
    body_timeout: float = Field(default=30.0, gt=0)  # seconds for a request's body to arrive
    connections: int = Field(default=512, gt=0)  # open at once; above them only probes are answered
    grace_seconds: float = Field(default=10.0, ge=0)  # for answers under way when the service is told to stop
    job_memory: Memory | None = None  # bytes for a profiling job, beside the service's own; None: the same as memory
    keep_unmatched: int = Field(default=0, ge=0, le=10_000)  # queries near no task that are kept for proposals; 0: none
    audit_days: int = Field(default=30, ge=1, le=36_500)  # how long retrieval decisions are kept
    redact: Annotated[str, AfterValidator(_pattern)] = PRIVATE  # what of their text is left out, a regular expression
    traces: str | None = None  # an OTLP endpoint over HTTP, such as http://localhost:4318/v1/traces; None: no traces
    redis: str | None = None  # a Redis URL: for jobs of `moepager worker`s and shared rate limits; None: neither
    reload_seconds: float = Field(default=1.0, gt=0)  # between two looks whether tasks or keys in the store changed
    device: str = "cpu"
    dtype: str = "auto"
    threads: int | None = Field(default=None, gt=0)  # None: torch's own choice
    stand_ins: int = Field(default=0, ge=0)  # tasks whose stand-ins are in memory at once; 0: none are served
    kernel: str = "auto"  # who multiplies few rows, as in decoding: auto, own (refuses to start without) or torch

    @property
    def background_seconds(self) -> float:
        """How long a background request waits for its experts: half of its time at most. The rest is for its answer,
        and where they do not come it hears of that, not of a timeout."""
        return min(self.background_wait, self.request_timeout / 2)


def refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    """Refuse the first MOEPAGER_* variable that names no setting, with the nearest right name."""
    known = [FILE, *known_names()]
    for name in sorted(environment):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            raise InvalidInput(_unknown(name, known))


def known_names() -> list[str]:
    return [HOME, *(PREFIX + name.upper() for name in Settings.model_fields)]


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)
    return f"No setting is named {name}. Did you mean {near[0]}? All of them: {', '.join(known)}."


def apply_file(file: Path, environment: MutableMapping[str, str]) -> None:
    """Set the variables that the file has and the environment has not. Lines are `MOEPAGER_NAME=value`, as systemd and
    Docker read them; an empty value is the default. Refuses what it can't read, and names that are no setting's."""
    try:
        lines = list(parse_stream(io.StringIO(file.read_text(encoding="utf-8"))))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"The settings' file {file} can't be read: {error}.", param="settings") from error
    found: dict[str, str] = {}
    for line in lines:
        if line.key is None and not line.error:
            continue
        written = line.original.string  # with the empty lines before it
        where = f"{file}, line {line.original.line + written[: -len(written.lstrip())].count(chr(10))}"
        if line.error or line.key is None or line.value is None:
            wanted = "Write MOEPAGER_NAME=value, quoted where it has blanks at an end, or a comment after #."
            raise InvalidInput(f"{where}: {written.strip()!r} sets nothing. {wanted}", param="settings")
        name = line.key.upper()
        if name not in known_names():
            raise InvalidInput(f"{where}: {_unknown(line.key, known_names())}", param="settings")
        if name in found:
            raise InvalidInput(f"{where}: {name} is set a second time. Leave one of them.", param="settings")
        found[name] = line.value
    for name, value in found.items():
        if value and not environment.get(name):
            environment[name] = value


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
