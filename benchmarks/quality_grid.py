"""What `bench quality` measures, and a row of what it finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from demo.tasks.registry import TASKS
from profiler.allocation import UNIFORM, choose_allocators
from profiler.allocators import ALLOCATORS
from profiler.scorers.registry import DEFAULTS, SCORERS, choose
from profiler.stand_ins import choose as choose_stand_ins
from store.errors import InvalidInput
from store.stand_ins import KINDS, NOTHING

ALL = "all"
UNAVAILABLE = frozenset({"router_growth", "subset_losses"})  # the demo has no base checkpoint, and too many experts


@dataclass(frozen=True, slots=True)
class Grid:
    """What is measured. `draws` bootstrap draws of the calibration text stand beside the text itself (draw 0).

    `few_shot` numbers of items are drawn as often, for `scorers` that need no extras, with one allocator. The automatic
    choice is made from every draw and from the text as it is, never from a few items; so are the selections that are
    bred by so many children as `evolve` says (0: none). At each share in `active` every selection of scorers, and the
    automatic choice, is measured with fewer calls a token, too, shared out to the layers by every rule.
    """

    items: int = 100
    tasks: tuple[str, ...] = tuple(task.name for task in TASKS)
    scorers: tuple[str, ...] = DEFAULTS
    allocators: tuple[str, ...] = (UNIFORM,)
    stand_ins: tuple[str, ...] = (NOTHING,)
    keeps: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125)
    draws: int = 0
    few_shot: tuple[int, ...] = ()
    automatic: bool = False
    evolve: int = 0
    active: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        known = [task.name for task in TASKS]
        if unknown := [task for task in self.tasks if task not in known]:
            raise InvalidInput(f"The demo has no task {unknown[0]!r}; it has {', '.join(known)}.", param="task")
        if self.few_shot and not self.draws:
            raise InvalidInput("Few-shot rows are means over draws: give --draws 3 too.", param="few-shot")


@dataclass(frozen=True, slots=True)
class Row:
    """`draw` 0 is the calibration text as it is; `shots` is the number of its items where only a few were drawn."""

    scorer: str
    allocator: str
    task: str
    keep: float
    draw: int
    shots: int | None
    accuracy: float
    retention: float
    nll: float
    coverage: float
    items: int
    stand_in: str = NOTHING
    active: float = 1.0
    calls_by: str = "all"


def grid_of(
    items: int,
    tasks: Sequence[str] | None,
    scorers: Sequence[str] | None,
    allocators: Sequence[str] | None,
    stand_ins: Sequence[str] | None,
    draws: int,
    few_shot: str,
    automatic: bool,
    evolve: int = 0,
    active: Sequence[float] | None = None,
) -> Grid:
    """From a command's options. Raises InvalidInput for a name that nobody knows and numbers that are none."""
    names = [name for name, one in SCORERS.items() if not one.needs & UNAVAILABLE]
    chosen = names if scorers == [ALL] else [one.name for one in choose(scorers)]
    shared = list(ALLOCATORS) if allocators == [ALL] else list(choose_allocators(allocators or [UNIFORM]))
    parts = [part for part in few_shot.replace(" ", "").split(",") if part]
    if wrong := [part for part in parts if not part.isdecimal() or int(part) < 1]:
        raise InvalidInput(f"--few-shot takes numbers of items such as 5,10,25, got {wrong[0]!r}.", param="few-shot")
    return Grid(
        items=items,
        tasks=tuple(tasks) if tasks else Grid().tasks,
        scorers=tuple(chosen),
        allocators=tuple(shared),
        stand_ins=KINDS if stand_ins == [ALL] else tuple(choose_stand_ins(stand_ins)),
        draws=draws,
        few_shot=tuple(int(part) for part in parts),
        automatic=automatic,
        evolve=evolve,
        active=tuple(active or ()),
    )
