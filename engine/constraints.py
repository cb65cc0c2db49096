"""What an answer may look like: JSON of a schema, a regular expression, choices, a grammar. Knows no tensors.

llguidance does the work: it says which tokens may come next. Everything that a client wrote is compiled here, in the
caller's thread and within limits, before a request is queued; the device's thread only asks for masks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask

from engine.closing import JsonCloser, Place
from store.errors import InvalidInput

MOST_BYTES = 64 * 2**10  # of a schema or grammar as it was sent
LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000, max_grammar_size=100_000, max_lexer_states=50_000, verbose_errors=False
)
ONE_LINE: Any = {"whitespace_pattern": " ?"}  # a weak model could put out blanks without end
LATE = 192  # tokens before the limit from which on an answer is kept able to end in time

Grammar = str  # as llguidance's own functions write it


def json_grammar(schema: Mapping[str, Any] | bool) -> Grammar:
    """JSON under a schema; what the library can't enforce of it is refused when it is compiled."""
    whole = schema if isinstance(schema, Mapping) else {} if schema else {"not": {}}
    try:
        return str(LLMatcher.grammar_from_json_schema(json.dumps(whole), overrides=ONE_LINE))
    except ValueError as error:
        raise InvalidInput(f"The JSON schema can't be read: {error}.") from None


def regex_grammar(pattern: str) -> Grammar:
    return str(LLMatcher.grammar_from_regex(pattern))


def lark_grammar(text: str) -> Grammar:
    return str(LLMatcher.grammar_from_lark(text))


def choice_grammar(choices: Sequence[str]) -> Grammar:
    """One of the texts, to the letter."""
    return lark_grammar("start: " + " | ".join(json.dumps(choice) for choice in choices))


class Constraint:
    """A compiled grammar. Shared by every row of a request; `begin` gives each a state of its own."""

    def __init__(self, matcher: LLMatcher, words: Words, closer: JsonCloser | None) -> None:
        self._matcher = matcher
        self._words = words
        self._closer = closer

    def begin(self, limit: int) -> Matching:
        """For an answer of at most `limit` tokens."""
        return Matching(self._matcher.deep_copy(), self._words, self._closer, limit)


class Words:
    """A model's vocabulary as bytes, which is what grammars are written about."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self.size: int = tokenizer.vocab_size
        self.end: int = tokenizer.eos_token

    def bytes_of(self, token: int) -> bytes:
        """Empty for special tokens."""
        if token >= self.size or self._tokenizer.is_special_token(token):
            return b""
        return self._tokenizer.decode_bytes([token])

    def compile(self, grammar: Grammar, param: str, *, is_json: bool = False) -> Constraint:
        """Raises InvalidInput, naming `param`, with the reason why the grammar can't be used. JSON ends in time."""
        if len(grammar) > MOST_BYTES:
            raise InvalidInput(
                f"`{param}` makes a grammar of {len(grammar)} bytes; at most {MOST_BYTES} are compiled. Shorten it.",
                param=param,
            )
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise InvalidInput(f"`{param}` can't be enforced: {_reason(matcher)}.", param=param)
        return Constraint(matcher, self, JsonCloser(self._tokenizer) if is_json else None)


class Matching:
    """What one answer may go on with. Belongs to the device's thread."""

    def __init__(self, matcher: LLMatcher, words: Words, closer: JsonCloser | None, limit: int) -> None:
        self._matcher = matcher
        self._mask = np.zeros((1, -(-words.size // 32)), dtype=np.int32)  # [1, V / 32] bits
        self._closer = closer
        self._left = limit
        self._words = words
        self._place = Place()
        self._ending: Sequence[int] | None = None  # tokens that end the answer from here
        self.shortened = False  # the model would have gone on, but the limit was near

    @property
    def ended(self) -> bool:
        """Nothing may follow but the end."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens may come next, [V of the tokenizer]. Raises InvalidInput where the grammar grew too complex."""
        fill_next_token_bitmask(self._matcher, self._mask)
        self._require_sound()
        bits = np.unpackbits(self._mask.view(np.uint8), axis=-1, bitorder="little")[0, : self._words.size]  # [V]
        return bits.view(np.bool_)

    def take(self, token: int) -> int:
        """Go on with the allowed `token`, or with another one where that is what still lets JSON end in time."""
        if self._closer is not None:
            if self._left <= LATE:
                token = self._in_time(token, self._closer)
            self._place = self._place.after(self._words.bytes_of(token))
        self._matcher.consume_token(token)
        self._require_sound()
        self._left -= 1
        return token

    def _in_time(self, token: int, closer: JsonCloser) -> int:
        """`token`, if the answer can still end within what is left after it; else the next of a known way to end."""
        if self._ending is None:
            self._ending = closer.path(self._matcher, self._place, self._left)
        further = self._matcher.deep_copy()
        if not further.consume_token(token) or further.is_stopped():
            return token
        after = closer.path(further, self._place.after(self._words.bytes_of(token)), self._left - 1)
        if after is None and self._ending is not None:
            self.shortened = True
            token, *after = self._ending or [self._words.end]
        self._ending = after
        return token

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            raise InvalidInput(
                f"The answer's constraint can't be followed any further: {_reason(self._matcher)}. Use a simpler one.",
                code="constraint_too_complex",
            )


def _reason(matcher: LLMatcher) -> str:
    lines = [line.strip() for line in str(matcher.get_error()).splitlines() if line.strip()]
    return " ".join(lines).rstrip(".")[:400]
