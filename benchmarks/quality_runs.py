"""What a long `bench quality` has measured so far, in a folder: a killed run goes on, and equal sets are measured once.

Each task has a file of its own, so that processes may share the folder if they share no task.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from profiler.batches import Encoded
from profiler.evaluate import Measured
from profiler.run import Run
from profiler.statistics import Statistics
from store.records import Selection

STEP = 50  # items that are measured together: asking for more items later measures just those


class Runs:
    """Everything is named by the model, the text and the set of experts, so that another model starts afresh."""

    def __init__(self, folder: Path, model: str, task: str) -> None:
        self._folder = folder / model[:16]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = self._folder / f"{task}.jsonl"
        self._task = task
        self._known = dict(self._read())

    def statistics(self, name: str, make: Callable[[], Statistics]) -> Statistics:
        """The statistics of one text of the task, kept under `name`."""
        run = Run(self._folder, f"{self._task}-{name}", plan=name)
        found = run.load()
        if found is not None:
            return found[1]
        made = make()
        run.save(1, made)
        return made

    def measured(
        self,
        items: Sequence[Encoded],
        selection: Selection | None,
        measure: Callable[[Sequence[Encoded]], Measured],
        what: str = "",
    ) -> Measured:
        """The sums over the items, measured in steps. `what` names what else the answer depends on."""
        parts = [items[start : start + STEP] for start in range(0, len(items), STEP)]
        sums = [self._part(part, selection, measure, what) for part in parts]
        return sum(sums[1:], start=sums[0])

    def _part(
        self,
        items: Sequence[Encoded],
        selection: Selection | None,
        measure: Callable[[Sequence[Encoded]], Measured],
        what: str,
    ) -> Measured:
        text = "\x1e".join(one.item.content_hash for one in items)
        name = f"{selection.digest if selection else 'whole'}{what}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        if name not in self._known:
            found = measure(sorted(items, key=lambda one: (len(one.tokens), one.number)))
            with self._file.open("a") as file:
                figures = {each: value for each, value in asdict(found).items() if each != "levels"}  # the guard's
                file.write(json.dumps({"name": name, **figures}) + "\n")
            self._known[name] = found
        return self._known[name]

    def _read(self) -> list[tuple[str, Measured]]:
        """A last line that a kill cut short is measured again."""
        if not self._file.exists():
            return []
        lines = self._file.read_text().split("\n")
        if lines[-1]:
            self._file.write_text("\n".join([*lines[:-1], ""]))
        records = [json.loads(line) for line in lines[:-1]]
        return [(record.pop("name"), Measured(**record)) for record in records]
