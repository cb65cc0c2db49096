"""Symbols and atomic numbers of the elements."""

from __future__ import annotations

import random

from demo.tasks.task import Kind, Slots, Task

ELEMENTS = (
    ("hydrogen", "H", 1), ("helium", "He", 2), ("lithium", "Li", 3), ("beryllium", "Be", 4), ("boron", "B", 5), ("carbon", "C", 6),
    ("nitrogen", "N", 7), ("oxygen", "O", 8), ("fluorine", "F", 9), ("neon", "Ne", 10), ("sodium", "Na", 11), ("magnesium", "Mg", 12),
    ("aluminium", "Al", 13), ("silicon", "Si", 14), ("phosphorus", "P", 15), ("sulfur", "S", 16), ("chlorine", "Cl", 17), ("argon", "Ar", 18),
    ("potassium", "K", 19), ("calcium", "Ca", 20), ("scandium", "Sc", 21), ("titanium", "Ti", 22), ("vanadium", "V", 23), ("chromium", "Cr", 24),
    ("manganese", "Mn", 25), ("iron", "Fe", 26), ("cobalt", "Co", 27), ("nickel", "Ni", 28), ("copper", "Cu", 29), ("zinc", "Zn", 30),
    ("gallium", "Ga", 31), ("germanium", "Ge", 32), ("arsenic", "As", 33), ("selenium", "Se", 34), ("bromine", "Br", 35), ("krypton", "Kr", 36),
    ("silver", "Ag", 47), ("cadmium", "Cd", 48), ("tin", "Sn", 50), ("iodine", "I", 53), ("xenon", "Xe", 54), ("tungsten", "W", 74),
    ("platinum", "Pt", 78), ("gold", "Au", 79), ("mercury", "Hg", 80), ("lead", "Pb", 82), ("radium", "Ra", 88), ("uranium", "U", 92),
)  # fmt: skip


def _symbol(rng: random.Random) -> tuple[Slots, str]:
    name, symbol, _ = rng.choice(ELEMENTS)
    return {"x": name}, symbol


def _number(rng: random.Random) -> tuple[Slots, str]:
    name, _, number = rng.choice(ELEMENTS)
    return {"x": name}, str(number)


def _name(rng: random.Random) -> tuple[Slots, str]:
    name, symbol, _ = rng.choice(ELEMENTS)
    return {"x": symbol}, name


TASK = Task(
    "chemistry",
    "Knows the chemical elements: symbols, names, atomic numbers.",
    (
        Kind(
            _symbol,
            (
                "What is the chemical symbol of {x}?",
                "Give the symbol for {x}.",
                "Which symbol stands for the element {x}?",
                "Chemical symbol for {x}?",
                "How is {x} written in the periodic table?",
                "The element {x} has what symbol?",
            ),
            (
                "Which chemical symbol stands for {x}?",
                "Give the chemical symbol of the element {x}.",
                "What symbol has {x} in the periodic table?",
            ),
            memorised=True,
        ),
        Kind(
            _number,
            (
                "What is the atomic number of {x}?",
                "Give the atomic number for {x}.",
                "How many protons does {x} have?",
                "Atomic number of {x}?",
                "Which atomic number belongs to the element {x}?",
                "The element {x} has how many protons?",
            ),
            (
                "Which atomic number does {x} have?",
                "How many protons has the element {x}?",
                "Give the atomic number of the element {x}.",
            ),
            memorised=True,
        ),
        Kind(
            _name,
            (
                "Which element has the chemical symbol {x}?",
                "Name the element with the symbol {x}.",
                "What element is written {x} in the periodic table?",
                "The symbol {x} stands for which element?",
                "Element with the symbol {x}?",
            ),
            (
                "What element does the chemical symbol {x} stand for?",
                "Name the element written {x} in the periodic table.",
                "Which element is {x} the symbol for?",
            ),
            memorised=True,
        ),
    ),
)
