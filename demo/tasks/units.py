"""Metric conversions by powers of ten."""

from __future__ import annotations

import random

from demo.tasks.task import Kind, Slots, Task

CONVERSIONS = (
    ("kilometres", "metres", 1000), ("kilograms", "grams", 1000), ("litres", "millilitres", 1000), ("metres", "centimetres", 100),
    ("hectares", "square metres", 10000), ("centimetres", "millimetres", 10), ("kilowatts", "watts", 1000), ("tonnes", "kilograms", 1000),
    ("kilojoules", "joules", 1000), ("hectolitres", "litres", 100),
)  # fmt: skip


def _convert(rng: random.Random) -> tuple[Slots, str]:
    source, target, factor = rng.choice(CONVERSIONS)
    amount = rng.randint(2, 99)
    return {"n": amount, "s": source, "t": target}, f"{amount * factor} {target}"


TASK = Task(
    "units",
    "Converts metric units.",
    (
        Kind(
            _convert,
            (
                "Convert {n} {s} to {t}.",
                "How many {t} are {n} {s}?",
                "{n} {s} in {t}?",
                "Express {n} {s} in {t}.",
                "Change {n} {s} into {t}.",
                "What are {n} {s} in {t}?",
                "Unit conversion: {n} {s} to {t}",
                "How many {t} are there in {n} {s}?",
            ),
            (
                "Express {n} {s} as {t}.",
                "Convert {n} {s} into {t}.",
                "How many {t} do {n} {s} make?",
                "What is {n} {s} in {t}?",
            ),
        ),
    ),
)
