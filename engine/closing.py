"""How an unfinished JSON answer may end soon. Knows JSON's syntax and asks a grammar what it allows; no tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask

QUOTE, BACKSLASH = 0x22, 0x5C
LETTERS = [bytes([code]) for code in range(0x30, 0x7F) if code != BACKSLASH]
INSIDE = (b'"', *LETTERS)  # of a string: its end, else what fills it up
OUTSIDE = (b"}", b"]", b",", b":", b"null", b"true", b"0", b'"', b"n", b"t", b"f", b"[", b"{", *LETTERS)


@dataclass(frozen=True, slots=True)
class Place:
    """Whether JSON text has come to the inside of a string."""

    inside: bool = False
    escaped: bool = False

    def after(self, text: bytes) -> Place:
        inside, escaped = self.inside, self.escaped
        for code in text:
            if escaped:
                escaped = False
            elif code == QUOTE:
                inside = not inside
            else:
                escaped = inside and code == BACKSLASH
        return replace(self, inside=inside, escaped=escaped)


class JsonCloser:
    """Finds few tokens that end an answer, by what usually ends JSON soonest. No promise that they are the fewest."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self._inside = list(self._single(INSIDE))
        self._outside = list(self._single(OUTSIDE))
        self._mask = np.zeros((1, -(-tokenizer.vocab_size // 32)), dtype=np.int32)  # [1, V / 32] bits

    def path(self, matcher: LLMatcher, place: Place, most: int) -> list[int] | None:
        """At most `most` tokens after which the answer may end; None where none were found.

        `matcher`, whose text has come to `place`, stays as it is.
        """
        copy, path = matcher.deep_copy(), list[int]()
        while len(path) <= most and not copy.is_error():
            if copy.is_accepting():
                return path
            tokens = self._forced(copy) or self._next(copy, place)
            if not copy.consume_tokens(tokens):
                return None
            path += tokens
            place = place.after(self._tokenizer.decode_bytes(tokens))
        return None

    def _single(self, texts: Iterable[bytes]) -> Iterable[int]:
        for text in texts:
            tokens = self._tokenizer.tokenize_bytes(text)
            if len(tokens) == 1:
                yield tokens[0]

    def _forced(self, matcher: LLMatcher) -> list[int]:
        """Tokens of the text that alone may follow, as far as they are sure."""
        text = matcher.compute_ff_bytes()
        tokens = self._tokenizer.tokenize_bytes(text) if text else []
        return list(tokens[: matcher.validate_tokens(tokens)]) if tokens else []

    def _next(self, matcher: LLMatcher, place: Place) -> list[int]:
        fill_next_token_bitmask(matcher, self._mask)
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")  # [V rounded up]
        for token in self._inside if place.inside else self._outside:
            if bits[token]:
                return [token]
        return [int(bits.argmax())]
