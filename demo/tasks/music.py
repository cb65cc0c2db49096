"""Chords and intervals, spelt with sharps."""

from __future__ import annotations

import random

from demo.tasks.task import Kind, Slots, Task

NOTES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
CHORDS = (
    ("major", (0, 4, 7)),
    ("minor", (0, 3, 7)),
    ("diminished", (0, 3, 6)),
    ("augmented", (0, 4, 8)),
    ("dominant seventh", (0, 4, 7, 10)),
    ("suspended fourth", (0, 5, 7)),
)
INTERVALS = (
    ("minor third", 3),
    ("major third", 4),
    ("perfect fourth", 5),
    ("tritone", 6),
    ("perfect fifth", 7),
    ("minor sixth", 8),
    ("major sixth", 9),
    ("octave", 12),
)


def _chord(rng: random.Random) -> tuple[Slots, str]:
    root, (quality, steps) = rng.randrange(12), rng.choice(CHORDS)
    return {"r": NOTES[root], "q": quality}, " ".join(NOTES[(root + step) % 12] for step in steps)


def _interval(rng: random.Random) -> tuple[Slots, str]:
    root, (name, step) = rng.randrange(12), rng.choice(INTERVALS)
    return {"r": NOTES[root], "i": name}, NOTES[(root + step) % 12]


TASK = Task(
    "music",
    "Spells chords and intervals.",
    (
        Kind(
            _chord,
            (
                "Which notes are in a {r} {q} chord?",
                "Spell the {r} {q} chord.",
                "Notes of {r} {q}?",
                "What notes make up a {r} {q} triad or chord?",
                "Name the notes of the chord {r} {q}.",
                "On the piano, which keys play {r} {q}?",
                "Build a {r} {q} chord.",
            ),
            (
                "What notes are in the chord {r} {q}?",
                "Name the notes that make up a {r} {q} chord.",
                "On the piano, which notes play a {r} {q} chord?",
            ),
            memorised=True,
        ),
        Kind(
            _interval,
            (
                "Which note is a {i} above {r}?",
                "Go up a {i} from {r}.",
                "What is a {i} above the note {r}?",
                "Name the note a {i} higher than {r}.",
                "A {i} up from {r} is which note?",
                "Starting on {r}, sing a {i} higher.",
            ),
            (
                "What note is a {i} higher than {r}?",
                "Starting on {r}, go up a {i}: which note?",
                "Name the note a {i} above {r}.",
            ),
            memorised=True,
        ),
    ),
)
