"""The progress bar of every command that profiles: standard error, a line a task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from profiler.progress import Progress as Step
from profiler.progress import Report


@contextmanager
def bar() -> Iterator[Report]:
    """A function to report to; a task's stages share its line."""
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        lines: dict[str, TaskID] = {}

        def report(step: Step) -> None:
            if step.task not in lines:
                lines[step.task] = progress.add_task(step.task)
            description = f"{step.stage} {step.task}"
            progress.update(lines[step.task], description=description, completed=step.done, total=step.total)

        yield report
