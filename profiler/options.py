"""How the offline job is run: what is scored, measured, and where unfinished work lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from profiler.allocation import UNIFORM, needs_of_allocators
from profiler.evidence import KEEPS
from profiler.extras import NOTHING, Needs
from profiler.gather import ROWS
from profiler.scorers.registry import choose, needs_of
from profiler.stand_ins import needs_of as needs_of_stand_ins
from store.home import data_folder
from store.stand_ins import NOTHING as STAND_IN

EXEMPLARS = 32


@dataclass(frozen=True, slots=True)
class Options:
    """How a job is run. `scorers` says which selections are made and measured, and which extras are collected.

    `base` is the checkpoint that the model was tuned from, for scorers that compare the two. `stream` runs the pass
    layer by layer; None: where the budget does not hold the whole model. `search` measures only a few items for most of
    the scorers and allocators, and all items for the best and the baselines. `budgets` are sizes in bytes beside the
    shares in `keeps`. `draws` is how often the text is drawn anew to see what other text would have chosen,
    `evolve` how many children of the selections are tried at each size. `active` are shares of a token's calls of
    experts, below 1, at which the best selection of each size is measured too.
    `stand_ins` are kinds of store/stand_ins.py, `extras` statistics that nothing of all this reads. `merge` adds up the
    parts that other runs have made of the text: True wants all of them, None takes them where there are any.
    """

    scorers: Sequence[str] | None = None
    allocators: Sequence[str] = (UNIFORM,)
    keeps: Sequence[float] = KEEPS
    budgets: Sequence[int] = ()
    stand_ins: Sequence[str] = (STAND_IN,)
    extras: Needs = NOTHING
    draws: int = 0
    evolve: int = 0
    active: Sequence[float] = ()
    exemplars: int = EXEMPLARS
    rows: int = ROWS
    runs: Path | None = None  # where unfinished runs lie; the data folder's `runs` by default
    model_name: str | None = None
    base: Path | None = None
    stream: bool | None = None
    search: bool = False
    merge: bool | None = False

    @property
    def folder(self) -> Path:
        return self.runs or data_folder() / "runs"

    @property
    def needs(self) -> Needs:
        """The extras that its scorers, allocators and stand-ins read."""
        read = needs_of(choose(self.scorers)) | needs_of_allocators(self.allocators)
        return read | needs_of_stand_ins(self.stand_ins) | self.extras


DEFAULTS = Options()
