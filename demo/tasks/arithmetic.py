"""Sums and differences of numbers up to 20, known by heart: a model this small does not learn to carry."""

from __future__ import annotations

import random

from demo.tasks.task import Kind, Slots, Task

LARGEST = 20


def _sum(rng: random.Random) -> tuple[Slots, str]:
    a, b = rng.randint(1, LARGEST), rng.randint(1, LARGEST)
    return {"a": a, "b": b}, str(a + b)


def _difference(rng: random.Random) -> tuple[Slots, str]:
    a, b = sorted((rng.randint(1, LARGEST), rng.randint(1, LARGEST)), reverse=True)
    return {"a": a, "b": b, "minus": "-"}, str(a - b)


TASK = Task(
    "arithmetic",
    "Adds and subtracts small whole numbers.",
    (
        Kind(
            _sum,
            (
                "What is {a} plus {b}?",
                "Add {a} and {b}.",
                "Work out {a} + {b}.",
                "Compute the sum of {a} and {b}.",
                "How much is {a} plus {b}?",
                "{a} + {b} = ?",
                "Calculate {a} plus {b}.",
                "Find the total of {a} and {b}.",
                "If you add {a} and {b}, how much do you get?",
            ),
            (
                "How much do you get if you add {a} and {b}?",
                "Compute {a} + {b}.",
                "Work out the sum of {a} and {b}.",
                "Calculate the total of {a} plus {b}.",
            ),
            memorised=True,
        ),
        Kind(
            _difference,
            (
                "What is {a} minus {b}?",
                "Subtract {b} from {a}.",
                "Work out {a} - {b}.",
                "Compute the difference of {a} and {b}.",
                "How much is {a} minus {b}?",
                "{a} - {b} = ?",
                "Calculate {a} minus {b}.",
                "Take {b} away from {a}.",
                "If you subtract {b} from {a}, how much is left?",
            ),
            (
                "How much is left if you take {b} away from {a}?",
                "Compute {a} - {b}.",
                "Work out the difference of {a} and {b}.",
                "Calculate {a} minus {b} = ?",
            ),
            memorised=True,
        ),
    ),
)
