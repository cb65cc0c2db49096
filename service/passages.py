"""A conversation that nobody names is known by what was said in it: a digest for the messages up to each answer.

So a chat goes on from our own answer, and chats that begin alike are told apart as soon as they differ. What was said
up to an answer never changes, so neither does what is known of it: a turn that is sent twice is decided the same way
twice. Left out are the system's messages, into which clients write the time of day, and thoughts, which few send back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from service.messages import Message

if TYPE_CHECKING:
    from service.sessions import Kept

MOST_LOOKS = 16  # answers back that are looked for: the newest may have been edited, or broken off


class Turn(NamedTuple):
    role: str
    text: str
    calls: str = ""


@dataclass(slots=True)
class Passage:
    """One request's place in such a conversation. `kept` is what was decided, until it is answered."""

    opening: str  # the digest of its first message
    answers: tuple[str, ...]  # up to each answer before, the newest first
    _owner: str
    _said: tuple[Turn, ...] = field(repr=False)
    kept: Kept | None = None

    @classmethod
    def of(cls, owner: str, said: Iterable[Turn], retold: bool = False) -> Passage:
        """`retold` by a client's own call, which may leave out how the conversation began."""
        turns = tuple(turn for turn in said if turn.role not in ("system", "developer"))
        digests, opening = list[str](), ""
        running = hashlib.sha256(owner.encode())
        for turn in turns:
            running.update(_bytes(turn))
            opening = opening or running.hexdigest()
            if turn.role == "assistant":
                digests.append(running.hexdigest())
        looked = digests[: -MOST_LOOKS - 1 : -1]
        if retold and (last := _last_exchange(turns)):
            looked.append(_digest(owner, last))
        return cls(opening, tuple(looked), owner, turns)

    def answered(self, answer: Mapping[str, Any]) -> tuple[str, str]:
        """What the conversation is known by once `answer`, an assistant's message, is given: whole, and by its end."""
        turns = (*self._said, answer_turn(answer))
        return _digest(self._owner, turns), _digest(self._owner, _last_exchange(turns))


def turn_of(message: Message) -> Turn:
    called = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    return Turn(message.role, message.text, _calls(called))


def answer_turn(answer: Mapping[str, Any]) -> Turn:
    """Of a message as a reply's body has it."""
    called = [(call["function"]["name"], call["function"]["arguments"]) for call in answer.get("tool_calls", ())]
    return Turn("assistant", answer["content"] or "", _calls(called))


def _last_exchange(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The last answer, and what it was an answer to; none where there is no answer."""
    for place in range(len(turns) - 1, 0, -1):
        if turns[place].role == "assistant":
            return (Turn("end of", ""), turns[place - 1], turns[place])
    return ()


def _calls(called: Sequence[tuple[str, str]]) -> str:
    """Clients write the same arguments with other blanks and in another order."""
    return json.dumps([[name, _read(arguments)] for name, arguments in called], sort_keys=True) if called else ""


def _read(arguments: str) -> object:
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return arguments


def _digest(owner: str, turns: Iterable[Turn]) -> str:
    running = hashlib.sha256(owner.encode())
    for turn in turns:
        running.update(_bytes(turn))
    return running.hexdigest()


def _bytes(turn: Turn) -> bytes:
    """Of each part its length comes first, so that no two conversations run together as one."""
    parts = (turn.role, turn.text.strip(), turn.calls)
    written = [part.encode("utf-8", "surrogatepass") for part in parts]
    return b"".join([len(one).to_bytes(8, "little") + one for one in written])
