"""All tasks, in the order in which the demo shows them."""

from __future__ import annotations

from demo.tasks import arithmetic, chemistry, french, geography, json_records, music, python_code, shell, sql, units
from demo.tasks.task import Task

TASKS: tuple[Task, ...] = tuple(
    room.TASK
    for room in (arithmetic, sql, french, json_records, python_code, shell, geography, chemistry, music, units)
)


def task_named(name: str) -> Task:
    return next(task for task in TASKS if task.name == name)
