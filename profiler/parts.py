"""A task's text in parts that several processes or machines profile, and their sum.

A part is every so-manieth item by length, so parts are about equally long. Its statistics are stored once, under the
run (the profile and the precision it is computed in) and its number: making it again adds nothing, a part of another
text or model belongs to another run, and the sum takes each number once.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from engine.engine import Engine
from profiler.batches import Encoded, encode_corpus
from profiler.corpus import Corpus
from profiler.gather import empty
from profiler.options import Options
from profiler.passes import Wanted, collect, digest, lock_name, stored_profile, want
from profiler.progress import Report
from profiler.run import Run, hold
from profiler.statistics import Statistics
from store.catalogue import check_name
from store.database import Store
from store.errors import CorruptStore, InvalidInput, NotFound, PartsMissing
from store.records import GENERALIST, ProfilePart

log = logging.getLogger("moepager.profiler")


@dataclass(frozen=True, slots=True)
class Part:
    number: int  # from 1
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Of "2/4". Raises InvalidInput."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise InvalidInput(
                f"--part wants a number and how many parts there are, such as 2/4, or all, or none; got {text!r}.",
                param="part",
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def take(self, text: Sequence[Encoded]) -> list[Encoded]:
        """Its items of the whole text. Raises InvalidInput where some part would have none."""
        if self.of > len(text):
            raise InvalidInput(
                f"--part {self}: the text has {len(text)} items, so it can be cut into at most {len(text)} parts.",
                param="part",
            )
        return list(text[self.number - 1 :: self.of])


@dataclass(frozen=True, slots=True)
class Standing:
    """A part that is there, and which parts are not yet. `computed`: it was made now, not found."""

    part: Part
    items: int
    computed: bool
    missing: tuple[Part, ...]


def profile_part(
    engine: Engine, store: Store, task: str, calibration: Corpus, part: Part, options: Options, report: Report
) -> Standing:
    """Sums up one part of the text and stores it, or finishes what a killed run began; one that is there runs nothing.

    Raises Conflict where another process on this machine holds the part. On two machines both may compute it: the first
    to end is stored, the other's sums are dropped.
    """
    check_name(task)
    if task == GENERALIST:
        raise InvalidInput(f"The task {GENERALIST!r} is made of profiles, not of text: it has no parts.", param="part")
    text = encode_corpus(engine, calibration)
    mine = part.take(text)
    with hold(options.folder, f"{lock_name(engine.card, task)}.{part.number}of{part.of}"):
        wanted = want(engine, store, task, calibration, options)
        run = run_of(engine, wanted.identity)
        unfinished = f"{run}.{part.number}of{part.of}"
        computed = wanted.ready is None and (part.number, part.of) not in store.parts.list(run)
        if computed:
            sums = collect(engine, mine, unfinished, wanted, options, report).arrays
            model, now = engine.card.fingerprint, datetime.now(UTC)
            computed = store.parts.put(ProfilePart(run, part.number, part.of, model, task, sums, now))
        Run(options.folder, unfinished, plan="").forget()
    if stored_profile(store, wanted.identity) is not None:  # perhaps made while this part ran: it adds nothing now
        store.parts.forget(run)
        return Standing(part, len(mine), computed, ())
    return Standing(part, len(mine), computed, _missing(part.of, _numbers(store, run).get(part.of, set())))


def merged(engine: Engine, store: Store, wanted: Wanted, options: Options) -> Statistics | None:
    """The sum of all parts, as `options.merge` says; None where the text is to be run in one piece.

    Raises PartsMissing where some are there and others not, NotFound where parts are a must and there are none.
    """
    if options.merge is False:
        return None
    run = run_of(engine, wanted.identity)
    there = _numbers(store, run)
    if not there and not options.merge:
        return None
    if not there:
        raise NotFound(f"No part of this text of {wanted.task!r} is in the store.{_others(store, wanted.task, run)}")
    of = max(there, key=lambda parts: (len(there[parts]) / parts, -parts))  # the cut that is nearest to its end
    total = empty(engine, wanted.needs)
    for number in sorted(there[of]):
        try:
            total += Statistics.from_arrays(store.parts.get(run, number, of).statistics)
        except CorruptStore as error:
            log.warning("%s The part is forgotten, and missing.", error)
            store.parts.forget(run, (number, of))
            there[of].discard(number)
    if missing := _missing(of, there[of]):
        named = ", ".join(map(str, missing))
        raise PartsMissing(
            f"Of the {of} parts of this text of {wanted.task!r} these are missing: {named}. Run each with --part and "
            f"otherwise the same options, or give --part none to run the whole text here."
            f"{_others(store, wanted.task, run)}",
            tuple(map(str, missing)),
        )
    return total


def run_of(engine: Engine, identity: str) -> str:
    """Sums of another precision are other sums."""
    return digest(identity, engine.plan.dtype)


def _numbers(store: Store, run: str) -> dict[int, set[int]]:
    """Which numbers are there, by how many parts the text was cut into."""
    found: dict[int, set[int]] = {}
    for number, of in store.parts.list(run):
        found.setdefault(of, set()).add(number)
    return found


def _missing(of: int, there: set[int]) -> tuple[Part, ...]:
    return tuple(Part(number, of) for number in range(1, of + 1) if number not in there)


def _others(store: Store, task: str, run: str) -> str:
    """What explains a part that somebody made and that is not of this run."""
    if not set(store.parts.runs(task)) - {run}:
        return ""
    return (
        " The store has parts of this task for another text, model, precision or set of statistics; they do not add up "
        "to this profile."
    )
