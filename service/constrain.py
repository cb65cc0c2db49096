"""What a request wants its answer to look like, as a constraint of the engine: compiled here, within limits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from engine.constraints import (
    Constraint,
    Grammar,
    choice_grammar,
    json_grammar,
    lark_grammar,
    regex_grammar,
)
from engine.text import Tokenizer
from service.bodies import OpenAIBody, StructuredOutputs
from store.errors import Busy, InvalidInput

SECONDS = 5.0  # for one grammar; the library's own limits mostly come first
_compilers = ThreadPoolExecutor(2, "moepager-compile")

Schema = Mapping[str, Any] | bool


@dataclass(frozen=True, slots=True)
class Wanted:
    """`param` is the field that asks for it; `schema` where the answer is to be JSON."""

    param: str
    grammar: Grammar
    schema: Schema | None = None

    @property
    def is_json(self) -> bool:
        return self.schema is not None


def wanted_of(body: OpenAIBody) -> Wanted | None:
    """What the body asks for by the one of several fields that it uses; None where any answer will do."""
    found = [*_of_response_format(body.response_format), *_of_guided(body)]
    if body.structured_outputs is not None:
        found += _of_structured(body.structured_outputs)
    if len(found) > 1:
        names = " and ".join(f"`{one.param}`" for one in found)
        raise InvalidInput(f"{names} each say what the answer looks like. Send one of them.", param=found[1].param)
    return found[0] if found else None


def compiled(wanted: Wanted, tokenizer: Tokenizer) -> Constraint:
    """Raises InvalidInput that names the field and why it can't be enforced; Busy where others' are compiled so long
    that its turn did not come."""
    words = tokenizer.words
    work = _compilers.submit(words.compile, wanted.grammar, wanted.param, is_json=wanted.is_json)
    try:
        return work.result(SECONDS)
    except TimeoutError:
        if work.cancel():  # it never began
            raise Busy(
                f"`{wanted.param}` waited {SECONDS:g} s to be compiled, behind others' grammars. Try again shortly."
            ) from None
        raise InvalidInput(
            f"`{wanted.param}` could not be compiled within {SECONDS:g} s. Use a simpler one.", param=wanted.param
        ) from None


def _of_response_format(written: Mapping[str, Any] | None) -> list[Wanted]:
    kind = "text" if written is None else written.get("type")
    if written is None or kind == "text":
        return []
    if kind == "json_object":
        return [_json("response_format", {"type": "object"})]
    if kind != "json_schema":
        raise InvalidInput(
            f"`response_format` is of type text, json_object or json_schema; got {kind!r}.",
            param="response_format.type",
        )
    inner = written.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
        raise InvalidInput(
            '`response_format` of type json_schema needs {"json_schema": {"name": ..., "schema": {...}}}.',
            param="response_format.json_schema",
        )
    return [_json("response_format", schema)]


def _of_guided(body: OpenAIBody) -> list[Wanted]:
    found = []
    if body.guided_json is not None:
        found.append(_json("guided_json", _schema("guided_json", body.guided_json)))
    if body.guided_regex is not None:
        found.append(Wanted("guided_regex", regex_grammar(body.guided_regex)))
    if body.guided_choice is not None:
        found.append(Wanted("guided_choice", choice_grammar(body.guided_choice)))
    if body.guided_grammar is not None:
        found.append(Wanted("guided_grammar", lark_grammar(body.guided_grammar)))
    return found


def _of_structured(written: StructuredOutputs) -> list[Wanted]:
    found = []
    if written.json_ is not None:
        found.append(_json("structured_outputs.json", _schema("structured_outputs.json", written.json_)))
    if written.json_object:
        found.append(_json("structured_outputs.json_object", {"type": "object"}))
    if written.regex is not None:
        found.append(Wanted("structured_outputs.regex", regex_grammar(written.regex)))
    if written.choice is not None:
        found.append(Wanted("structured_outputs.choice", choice_grammar(written.choice)))
    if written.grammar is not None:
        found.append(Wanted("structured_outputs.grammar", lark_grammar(written.grammar)))
    return found


def _json(param: str, schema: Schema) -> Wanted:
    return Wanted(param, json_grammar(schema), schema)


def _schema(param: str, written: dict[str, Any] | bool | str) -> Schema:
    """A schema, or one written as text."""
    if not isinstance(written, str):
        return written
    try:
        schema = json.loads(written)
    except ValueError as error:
        raise InvalidInput(f"`{param}` is no JSON: {error}.", param=param) from None
    if not isinstance(schema, dict | bool):
        raise InvalidInput(f"`{param}` must be a JSON schema: an object or a boolean.", param=param)
    return schema
