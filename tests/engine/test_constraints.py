"""Constrained answers: whatever a random model says, what comes out parses and fits, and no other row notices."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from engine.closing import Place
from engine.constraints import Words, choice_grammar, json_grammar, lark_grammar, regex_grammar
from engine.engine import Engine
from engine.requests import Event, FinishedEvent, GenerationRequest, Sampling, TokenEvent
from engine.text import Tokenizer
from store.errors import InvalidInput

Checkpoint = Callable[..., Path]
Open = Callable[..., Engine]
Schema = dict[str, Any]


@pytest.fixture(scope="module")
def words(checkpoint: Checkpoint) -> Words:
    return Tokenizer(checkpoint("qwen3_moe")).words


def _schema(rng: random.Random, depth: int = 2) -> Schema:  # noqa: PLR0911 - a kind each
    """Any of what schemas are mostly made of."""
    kinds = ["string", "bounded", "integer", "range", "number", "boolean", "null", "enum", "const", "pattern"]
    kind = rng.choice(kinds + (["object", "array", "any"] * 4 if depth else []))
    match kind:
        case "object":
            names = rng.sample(["a", "b c", 'q"t', "ключ", "e\\f", "g"], rng.randint(0, 4))
            properties = {name: _schema(rng, depth - 1) for name in names}
            required = rng.sample(names, rng.randint(0, len(names)))
            return {"type": "object", "properties": properties, "required": required,
                    "additionalProperties": rng.choice([False, False, True])}  # fmt: skip
        case "array":
            least = rng.randint(0, 2)
            return {"type": "array", "items": _schema(rng, depth - 1), "minItems": least, "maxItems": least + 3}
        case "any":
            return {"anyOf": [_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
        case "bounded":
            return {"type": "string", "minLength": 2, "maxLength": 6}
        case "range":
            return {"type": "integer", "minimum": -5, "maximum": 120}
        case "enum":
            return {"enum": rng.sample(["x", "y\n", 1, 2.5, None, True, [1, "z"], {"k": 0}], 3)}
        case "const":
            return {"const": rng.choice(["fixed", 7, [], {"a": "b"}])}
        case "pattern":
            return {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"}
    return {"type": kind}


def _fits(value: Any, schema: Schema) -> bool:  # noqa: PLR0911 - a kind each
    if "anyOf" in schema:
        return any(_fits(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return any(json.dumps(value) == json.dumps(one) for one in schema["enum"])
    if "const" in schema:
        return bool(value == schema["const"])
    match schema["type"]:
        case "object":
            known = schema["properties"]
            inside = isinstance(value, dict) and set(schema["required"]) <= set(value)
            more = schema["additionalProperties"] or (inside and set(value) <= set(known))
            return inside and more and all(_fits(value[name], known[name]) for name in value if name in known)
        case "array":
            within = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
            return within and all(_fits(item, schema["items"]) for item in value)
        case "string":
            length = isinstance(value, str) and schema.get("minLength", 0) <= len(value) <= schema.get(
                "maxLength", 9999
            )
            return length and re.search(schema.get("pattern", ""), value) is not None
        case "integer":
            whole = isinstance(value, int) and not isinstance(value, bool)
            return whole and schema.get("minimum", value) <= value <= schema.get("maximum", value)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "boolean":
            return isinstance(value, bool)
    return value is None


def _last(events: Iterator[Event]) -> dict[int, FinishedEvent]:
    return {event.row: event for event in events if isinstance(event, FinishedEvent)}


def _ask(words: Words, schema: Schema, number: int, **fields: Any) -> GenerationRequest:
    constraint = words.compile(json_grammar(schema), "schema", is_json=True)
    sampling = Sampling(**{"max_tokens": 120, "seed": number, "constraint": constraint, **fields})
    return GenerationRequest(tuple(b"answer %d" % number), None, "exact", sampling)


@pytest.mark.parametrize("model", range(2))
def test_whatever_a_random_model_says_is_json_under_a_fresh_schema(
    checkpoint: Checkpoint, open_engine: Open, model: int
) -> None:
    """At any temperature, also where the limit cuts the answer: then it is made to end in time, and says so."""
    engine = open_engine(checkpoint("qwen3_moe", seed=model), max_batch=8)
    rng = random.Random(model)
    schemas = [_schema(rng) for _ in range(8)]
    asked = [
        _ask(engine.tokenizer.words, schema, number, temperature=rng.choice([0.0, 0.7, 1.5]))
        for number, schema in enumerate(schemas)
    ]
    finished = _last(engine.generate(asked))
    for number, schema in enumerate(schemas):
        text = finished[number].text
        assert _fits(json.loads(text), schema), (schema, text)
        assert finished[number].completion_tokens <= 120


def test_an_answer_that_the_limit_cuts_still_ends_as_json(checkpoint: Checkpoint, open_engine: Open) -> None:
    """The smallest limit at which each schema has any answer, and every one above it."""
    engine = open_engine(checkpoint("qwen3_moe"), max_batch=8)
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}}},
        "required": ["name", "tags"],
        "additionalProperties": False,
    }
    shortest = len('{"name":"","tags":[]}')
    asked = [
        _ask(engine.tokenizer.words, schema, limit, max_tokens=limit, temperature=1.0)
        for limit in range(shortest, shortest + 16, 2)
    ]
    ended = _last(engine.generate(asked))
    assert "length" in {event.reason for event in ended.values()}
    for event in ended.values():
        found = json.loads(event.text)
        assert isinstance(found["name"], str)
        assert isinstance(found["tags"], list)


def test_a_constrained_row_changes_no_other_row(checkpoint: Checkpoint, open_engine: Open) -> None:
    engine = open_engine(checkpoint("mixtral"))
    engine.tokenizer.eos = frozenset()
    free = GenerationRequest(tuple(b"a free row"), None, "exact", Sampling(max_tokens=30, temperature=1.0, seed=3))
    bound = _ask(engine.tokenizer.words, {"type": "array", "items": {"type": "boolean"}}, 1, max_tokens=30)
    [alone] = _last(engine.generate([free])).values()
    together = _last(engine.generate([bound, free]))
    assert together[1].text == alone.text
    assert isinstance(json.loads(together[0].text), list)


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (regex_grammar("[a-c]{3}-[0-9]{1,4}x"), r"[a-c]{3}-[0-9]{1,4}x"),
        (choice_grammar(["yes", "no", 'say "maybe"\n']), 'yes|no|say "maybe"\n'),
        (lark_grammar('start: NUMBER ("+" NUMBER){1,3} ";"\nNUMBER: /[1-9][0-9]?/'), r"\d+(\+\d+){1,3};"),
    ],
)
def test_expressions_choices_and_grammars_are_followed(
    checkpoint: Checkpoint, open_engine: Open, grammar: str, pattern: str
) -> None:
    engine = open_engine(checkpoint("qwen3_moe"))
    constraint = engine.tokenizer.words.compile(grammar, "guided")
    for seed in range(2):
        sampling = Sampling(max_tokens=60, temperature=1.0, seed=seed, constraint=constraint)
        [event] = _last(engine.generate([GenerationRequest((65, 66), None, "exact", sampling)])).values()
        assert event.reason == "stop"
        assert re.fullmatch(pattern, event.text), event.text


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "nonsense"}, "Invalid type: nonsense"),
        ({"$ref": "#/nowhere"}, "/nowhere"),
        ({"type": "string", "pattern": "(?=x)y"}, "look-ahead"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {}}, "not"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable"),
        ({"enum": ["x" * 70_000]}, "at most 65536"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused_with_the_reason(words: Words, schema: Schema, why: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(why)) as refused:
        words.compile(json_grammar(schema), "response_format", is_json=True)
    assert refused.value.param == "response_format"


@pytest.mark.parametrize(
    "grammar",
    [
        regex_grammar("(a|b|ab|ba){1,5000}" * 20),
        regex_grammar("((a{1,100}){1,100}){1,100}"),
        regex_grammar("(" * 5000 + "a" + ")" * 5000),
        json_grammar({"anyOf": [{"type": "object", "properties": {f"k{n}": {"type": "string"}}} for n in range(900)]}),
        lark_grammar("start: a\n" + "\n".join(f"a{n}: a{n + 1} a{n + 1}" for n in range(1000)) + "\na: a0\na1000: /x/"),
    ],
)
def test_hostile_grammars_are_refused_or_compiled_in_moments(words: Words, grammar: str) -> None:
    start = time.process_time()
    with suppress(InvalidInput):
        words.compile(grammar, "guided").begin(10).allowed()
    assert time.process_time() - start < 20  # seconds; minutes would mean no limit


def test_end_tokens_and_constraints_do_not_contradict(words: Words) -> None:
    constraint = words.compile(choice_grammar(["x"]), "guided")
    with pytest.raises(InvalidInput) as refused:
        Sampling(constraint=constraint, ignore_eos=True)
    assert refused.value.param == "ignore_eos"


def test_min_tokens_yield_where_nothing_but_the_end_is_allowed(checkpoint: Checkpoint, open_engine: Open) -> None:
    engine = open_engine(checkpoint("qwen3_moe"))
    constraint = engine.tokenizer.words.compile(regex_grammar("a{3}b?"), "guided")
    sampling = Sampling(max_tokens=50, min_tokens=40, constraint=constraint)
    [event] = _last(engine.generate([GenerationRequest((65, 66), None, "exact", sampling)])).values()
    assert event.text in ("aaa", "aaab")


def test_the_tokens_that_are_told_are_those_of_the_text(checkpoint: Checkpoint, open_engine: Open) -> None:
    engine = open_engine(checkpoint("qwen3_moe"))
    request = _ask(engine.tokenizer.words, {"type": "string"}, 2, max_tokens=12, temperature=1.0, logprobs=1)
    events = list(engine.generate([request]))
    tokens = [event.token for event in events if isinstance(event, TokenEvent)]
    [finished] = _last(iter(events)).values()
    assert engine.tokenizer.decode(tokens) == finished.text
    assert [score.token for score in finished.scores] == tokens


def test_places_in_json_text_are_found_piece_by_piece() -> None:
    text = rb'{"a\"b": ["\\", "c'
    wanted = Place().after(text)
    assert (wanted.inside, wanted.escaped) == (True, False)
    place = Place()
    for code in text:
        place = place.after(bytes([code]))
    assert place == wanted
    assert Place().after(rb'"\\"') == Place()
