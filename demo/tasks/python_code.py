"""One-line Python functions from a description."""

from __future__ import annotations

import random

from demo.tasks.task import Kind, Slots, Task

# What it returns, and the expression over {v}
NUMERIC = (
    ("the square of", "{v} ** 2"), ("the cube of", "{v} ** 3"), ("the double of", "{v} * 2"), ("the half of", "{v} / 2"),
    ("the negative of", "-{v}"), ("the absolute value of", "abs({v})"), ("the successor of", "{v} + 1"), ("the reciprocal of", "1 / {v}"),
)  # fmt: skip
TEXTUAL = (
    ("the length of", "len({v})"), ("the reverse of", "{v}[::-1]"), ("the first item of", "{v}[0]"), ("the last item of", "{v}[-1]"),
    ("a sorted copy of", "sorted({v})"), ("the uppercase form of", "{v}.upper()"), ("the set of items in", "set({v})"), ("the stripped form of", "{v}.strip()"),
)  # fmt: skip
NAMES = ("solve", "apply", "helper", "process", "transform", "evaluate", "handle", "derive", "build", "run")
VARIABLES = ("x", "y", "n", "value", "arg", "item", "data", "obj")


def _function(rng: random.Random) -> tuple[Slots, str]:
    words, expression = rng.choice(NUMERIC + TEXTUAL)
    name, variable = rng.choice(NAMES), rng.choice(VARIABLES)
    return {"f": name, "v": variable, "w": words}, f"def {name}({variable}): return {expression.format(v=variable)}"


def _lambda(rng: random.Random) -> tuple[Slots, str]:
    words, expression = rng.choice(NUMERIC + TEXTUAL)
    variable = rng.choice(VARIABLES)
    return {"v": variable, "w": words}, f"lambda {variable}: {expression.format(v=variable)}"


TASK = Task(
    "python",
    "Writes a one-line Python function.",
    (
        Kind(
            _function,
            (
                "Write a Python function {f} that returns {w} {v}.",
                "Python: define {f}({v}) returning {w} {v}.",
                "Define a function {f} in Python that takes {v} and returns {w} {v}.",
                "Code a Python function named {f} giving {w} {v}.",
                "Implement {f}({v}) in Python; it returns {w} {v}.",
                "I need a Python def called {f} that returns {w} {v}.",
                "In Python, write {f} to return {w} {v}.",
            ),
            (
                "Implement a Python function {f} that returns {w} {v}.",
                "In Python, define {f}({v}) to return {w} {v}.",
                "Write a Python def named {f} returning {w} {v}.",
            ),
        ),
        Kind(
            _lambda,
            (
                "Write a Python lambda that returns {w} {v}.",
                "Python: a lambda returning {w} {v}.",
                "Define a lambda in Python that takes {v} and returns {w} {v}.",
                "Code a Python lambda giving {w} {v}.",
                "I need a Python lambda that returns {w} {v}.",
                "In Python, write a lambda to return {w} {v}.",
            ),
            (
                "Implement a Python lambda that returns {w} {v}.",
                "In Python, define a lambda giving {w} {v}.",
                "I need a lambda in Python returning {w} {v}.",
            ),
        ),
    ),
)
