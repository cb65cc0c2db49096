"""What the clients of a soak do: ask in every way that there is, talk, hang up, send nonsense; and what they check."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.soak_questions import CHAT, QUERY, NoAnswerError, Question, Said, Talk
from service.model import BUNDLED

REFUSED = (429, 503)  # with Retry-After: not wrong, come again
FULL = "busy"  # a queue that is full, a service that is drained, a background request whose experts do not come
DISK = "disk_error"  # only while the disk was made to fail
REST_SECONDS = 0.2


@dataclass(slots=True)
class Tally:
    """What happened; shared by all clients."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def blame(self, what: str) -> None:
        with self.lock:
            self.wrong.append(what)


@dataclass(frozen=True, slots=True)
class Reference:
    """What each was answered alone: whole, and streamed."""

    answers: Mapping[Question, tuple[Said, Said]]
    talks: Mapping[Talk, Sequence[Said]]

    @classmethod
    def taken(cls, client: httpx.Client, asked: Sequence[Question], held: Sequence[Talk]) -> Reference:
        answers = {one: (one.in_front().ask(client), one.in_front().ask(client, stream=True)) for one in asked}
        talked = {one: tuple(one.hold(client, f"alone-{uuid.uuid4()}")) for one in held}
        return cls(answers, talked)

    def right(self, question: Question, stream: bool) -> Collection[Said]:
        """In mode auto a stream may only go on exactly from the token where it strays; a whole answer starts anew."""
        whole, streamed = self.answers[question]
        return {streamed if stream else whole}


class Clients:
    """All clients of one soak. `disk_failed` says whether the disk was made to fail a moment ago."""

    def __init__(self, reference: Reference, tally: Tally, disk_failed: Callable[[], bool]) -> None:
        self._reference, self._tally, self._disk_failed = reference, tally, disk_failed

    def rush(self, make: Callable[[], httpx.Client], seconds: float, count: int, seed: int) -> None:
        """`count` clients at a time, each with a connection of its own, for so long."""
        end = time.monotonic() + seconds

        def work(number: int) -> None:
            rng = random.Random(f"{seed}-{number}")
            with make() as client:
                while time.monotonic() < end:
                    self.behave(client, rng)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def behave(self, client: httpx.Client, rng: random.Random) -> None:
        """One thing that a client does."""
        deeds = (self._ask, self._talk, self._hang_up, self._nonsense, self._too_much)
        deed = rng.choices(deeds, weights=(70, 10, 12, 5, 3))[0]
        try:
            deed(client, rng)
        except NoAnswerError as failed:
            self._excuse(failed, deed.__name__)
        except httpx.TransportError as error:
            self._tally.blame(f"{deed.__name__[1:]}: {type(error).__name__} {error}")

    def check_all(self, client: httpx.Client) -> None:
        """Every question once more, when all is over."""
        for question in self._reference.answers:
            for stream in (False, True):
                said = question.in_front().ask(client, stream)
                self._compare("at the end", said, self._reference.right(question, stream))

    def _ask(self, client: httpx.Client, rng: random.Random) -> None:
        question, stream = rng.choice(list(self._reference.answers)), rng.random() < 0.4
        began = time.monotonic()
        said = question.ask(client, stream)
        with self._tally.lock:
            self._tally.seconds.append(time.monotonic() - began)
        self._tally.note("streamed" if stream else "whole")
        self._compare(question.kind, said, self._reference.right(question, stream))

    def _talk(self, client: httpx.Client, rng: random.Random) -> None:
        talk = rng.choice(list(self._reference.talks))
        wanted = self._reference.talks[talk]
        for place, said in enumerate(talk.hold(client, str(uuid.uuid4()), stream=rng.random() < 0.5)):
            self._compare("talk, named" if talk.named else "talk", said, {wanted[place]})

    def _compare(self, kind: str, said: Said, right: Collection[Said]) -> None:
        self._tally.note(f"answers: {kind}")
        if said not in right:
            self._tally.blame(f"{kind}: wanted {sorted(right)}, got {said}")

    def _hang_up(self, client: httpx.Client, rng: random.Random) -> None:
        question = rng.choice(list(self._reference.answers))
        with client.stream("POST", question.route, json={**question.body, "stream": True}) as reply:
            if reply.status_code == 200:
                for count, _ in enumerate(reply.iter_raw()):
                    if count >= rng.randrange(4):
                        break
            elif reply.status_code not in REFUSED:
                self._tally.blame(f"who hung up was answered with {reply.status_code}")
        self._tally.note("hung up")

    def _nonsense(self, client: httpx.Client, rng: random.Random) -> None:
        asked = {"query": "what is this", "max_tokens": 4}
        bodies: Sequence[tuple[str, dict[str, Any]]] = (
            (QUERY, asked | {"mode": "sideways"}),
            (QUERY, asked | {"task": "no such task"}),
            (QUERY, asked | {"max_tokens": -1}),
            (QUERY, asked | {"keep": 2.0}),
            (QUERY, {"queery": "what is this"}),
            (CHAT, {"model": "no such model", "messages": [{"role": "user", "content": "x"}]}),
            (CHAT, {"model": BUNDLED, "messages": []}),
        )
        self._turned_away(client, *rng.choice(bodies), "nonsense")

    def _too_much(self, client: httpx.Client, _rng: random.Random) -> None:
        self._turned_away(client, QUERY, {"query": "what is this " * 400}, "too long")

    def _turned_away(self, client: httpx.Client, route: str, body: dict[str, Any], what: str) -> None:
        reply = client.post(route, json=body)
        if not 400 <= reply.status_code < 500 and reply.status_code not in REFUSED:
            self._tally.blame(f"a query that was {what} was answered with {reply.status_code}: {reply.text[:200]}")
        self._tally.note(what)

    def _excuse(self, failed: NoAnswerError, deed: str) -> None:
        """A refusal is no wrong answer where it is one: told as such, and for a fault that there was."""
        full = failed.status in (200, *REFUSED) and failed.code == FULL
        torn = failed.status in (200, 503) and failed.code == DISK and self._disk_failed()
        if not full and not torn:
            self._tally.blame(f"{deed[1:]}: {failed}")
        self._tally.note("refused" if full else "told of the disk")
        time.sleep(REST_SECONDS)
