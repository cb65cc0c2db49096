"""What was asked of `moepager profile`, in the words of the job: its text, its engine, its options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import typer

from engine.card import ModelCard
from engine.config import EngineConfig
from profiler.allocation import UNIFORM, choose_allocators, size_of
from profiler.allocators import PLAIN
from profiler.corpus import Corpus, read_corpus
from profiler.evidence import KEEPS
from profiler.options import Options
from profiler.parts import Part
from profiler.scorers.registry import BASELINES, SCORERS, choose
from profiler.stand_ins import choose as choose_stand_ins
from store.errors import InvalidInput, MismatchError
from store.hub import model_folder
from store.records import GENERALIST
from store.sizes import parse_bytes
from store.stand_ins import NOTHING

MERGES = {"all": True, "none": False}  # else: parts are taken where there are any
SHOWN_FINGERPRINT = 16  # letters
SHOWN = 5  # repeated lines of a file that are named one by one


@dataclass(frozen=True, slots=True)
class Asked:
    """The command's options by their names, None where one was not given."""

    task: str
    calibration: Path | None
    evaluation: Path | None
    others: Path | None
    model: str | None
    fingerprint: str | None
    memory: str | None
    scorer: list[str] | None
    allocator: list[str] | None
    stand_in: list[str] | None
    search: bool
    base: Path | None
    keep: list[str] | None
    draws: int
    evolve: int
    active: list[float] | None
    stream: bool | None
    part: str | None
    max_context: int | None
    batch: int
    device: str
    dtype: str
    threads: int | None

    def texts(self) -> tuple[Corpus | None, Corpus | None, Corpus | None]:
        """Calibration, evaluation, and other tasks' items. The generalist, and only it, has no calibration."""
        if (self.calibration is None) != (self.task == GENERALIST):
            made_of = f"--task {GENERALIST} takes no --calibration: it is made of the other tasks' profiles."
            missing = self.calibration is None
            raise InvalidInput("A task needs --calibration FILE." if missing else made_of, param="calibration")
        for name, given in (
            ("--others", self.others is not None),
            ("--draws", self.draws > 0),
            ("--evolve", self.evolve > 0),
        ):
            if given and self.task == GENERALIST:
                raise InvalidInput(f"The generalist takes no {name}: it has no text, and all tasks are its own.")
            if given and self.evaluation is None and name != "--evolve":
                raise InvalidInput(f"{name} prices what is measured on held-out items: give --eval FILE.", param="eval")
        return _read(self.calibration), _read(self.evaluation), _read(self.others)

    def config(self) -> EngineConfig:
        budget = None if self.memory is None else parse_bytes(self.memory)
        return EngineConfig(
            model_folder(self.model),
            memory=budget,
            device=self.device,
            dtype=self.dtype,
            max_context=self.max_context,
            max_batch=self.batch,
            threads=self.threads,
            stand_ins=int(choose_stand_ins(self.stand_in) != [NOTHING]),
            # An item goes through in one piece.
            chunk_tokens=max(self.max_context or 2048, 4096 if budget is None else 0),
        )

    def check_model(self, card: ModelCard) -> None:
        """Raises MismatchError where it is another model than the one that was asked for, by 16 letters or more."""
        wanted = self.fingerprint
        if wanted is None:
            return
        if len(wanted) < SHOWN_FINGERPRINT:
            raise InvalidInput(
                f"--fingerprint takes {SHOWN_FINGERPRINT} letters or more of one, got {wanted!r}.", param="fingerprint"
            )
        if not card.fingerprint.startswith(wanted):
            raise MismatchError(
                f"{card.folder} is the model {card.fingerprint[:16]} now, and {wanted[:16]} was asked for: its "
                "weights, config or tokenizer changed. Put the old files back, or restart what serves it (services and "
                "workers) and profile the task then."
            )

    def options(self) -> Options:
        sizes = [size_of(text) for text in self.keep] if self.keep else list(KEEPS)
        return Options(
            scorers=self._scorers(),
            allocators=tuple(choose_allocators(self.allocator or (PLAIN if self.search else (UNIFORM,)))),
            keeps=tuple(size for size in sizes if isinstance(size, float)),
            budgets=tuple(size for size in sizes if isinstance(size, int)),
            stand_ins=tuple(choose_stand_ins(self.stand_in)),
            draws=self.draws,
            evolve=self.evolve,
            active=tuple(sorted(set(self.active or ()), reverse=True)),
            rows=self.batch,
            model_name=self._model_name(),
            base=self.base,
            stream=self.stream,
            merge=MERGES.get(self.part or ""),
            search=self.search,
        )

    def one_part(self) -> Part | None:
        """The part that is to be run, None for the whole profile."""
        if self.part is not None and self.task == GENERALIST:
            raise InvalidInput("The generalist is made of profiles, not of text: it takes no --part.", param="part")
        return None if self.part is None or self.part in MERGES else Part.parse(self.part)

    def _scorers(self) -> list[str] | None:
        """A search tries everything that the pass gives anyway; the baselines take part in any case."""
        if self.search and self.scorer is None:
            return [name for name, one in SCORERS.items() if not one.needs and name not in BASELINES]
        choose(self.scorer)
        return self.scorer

    def _model_name(self) -> str | None:
        """What the store calls the model: a hub id as it is, a folder by its own name."""
        if self.model is None:
            return "demo"
        return None if Path(self.model).expanduser().is_dir() else self.model


def _read(path: Path | None) -> Corpus | None:
    """The text of one file; repeated lines are named."""
    if path is None:
        return None
    corpus = read_corpus(path)
    for found in corpus.duplicates[:SHOWN]:
        typer.echo(f"{corpus.source}, line {found.line} repeats line {found.first_line}: left out.", err=True)
    if len(corpus.duplicates) > SHOWN:
        typer.echo(f"{corpus.source}: {len(corpus.duplicates)} repeated lines left out in all.", err=True)
    return corpus
