"""What a task is made of: kinds of question, each with a sampler of content and two disjoint sets of phrasings."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Slots = Mapping[str, object]

# Courtesies wrap some of the queries of every task; the held-out ones never occur in training.
OPENERS = ("Please help. ", "Hello! ", "Quick question: ", "Hi there. ", "One more thing: ")
CLOSERS = (" Thanks.", " Thank you!", " Just the answer.", " Please be brief.")
HELD_OUT_OPENERS = ("Hello, please help. ", "One quick question: ")
HELD_OUT_CLOSERS = (" Thank you, be brief.", " Just the answer, please.")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of question. `memorised` content (a capital) can't be held out: there only the phrasing is new."""

    sample: Callable[[random.Random], tuple[Slots, str]]
    phrasings: tuple[str, ...]
    held_out: tuple[str, ...]
    memorised: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    name: str
    description: str
    kinds: tuple[Kind, ...]

    def training_item(self, rng: random.Random) -> tuple[str, str]:
        """A prompt in a training phrasing with its answer; never content that is held out."""
        kind = rng.choice(self.kinds)
        slots, answer = kind.sample(rng)
        while not kind.memorised and is_held_out(slots):
            slots, answer = kind.sample(rng)
        return _wrap(rng, rng.choice(kind.phrasings).format(**slots), OPENERS, CLOSERS), answer

    def held_out_item(self, rng: random.Random) -> tuple[str, str]:
        """A prompt in a held-out phrasing; its content is held out too, where content can be."""
        kind = rng.choice(self.kinds)
        slots, answer = kind.sample(rng)
        while not kind.memorised and not is_held_out(slots):
            slots, answer = kind.sample(rng)
        return _wrap(rng, rng.choice(kind.held_out).format(**slots), HELD_OUT_OPENERS, HELD_OUT_CLOSERS), answer


def is_held_out(slots: Slots) -> bool:
    """One content in eight is held out, by a hash that no seed changes."""
    text = "|".join(f"{key}={slots[key]}" for key in sorted(slots))
    return hashlib.sha256(text.encode()).digest()[0] < 32


def _wrap(rng: random.Random, prompt: str, openers: tuple[str, ...], closers: tuple[str, ...]) -> str:
    draw = rng.random()
    if draw < 0.15:
        return rng.choice(openers) + prompt
    if draw < 0.3:
        return prompt + rng.choice(closers)
    return prompt
