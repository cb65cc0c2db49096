"""Capitals and continents."""

from __future__ import annotations

import random

from demo.tasks.task import Kind, Slots, Task

COUNTRIES = (
    ("Peru", "Lima", "South America"), ("Chile", "Santiago", "South America"), ("Bolivia", "Sucre", "South America"), ("Ecuador", "Quito", "South America"),
    ("Colombia", "Bogota", "South America"), ("Uruguay", "Montevideo", "South America"), ("Paraguay", "Asuncion", "South America"), ("Venezuela", "Caracas", "South America"),
    ("Canada", "Ottawa", "North America"), ("Mexico", "Mexico City", "North America"), ("Cuba", "Havana", "North America"), ("Jamaica", "Kingston", "North America"),
    ("Norway", "Oslo", "Europe"), ("Sweden", "Stockholm", "Europe"), ("Finland", "Helsinki", "Europe"), ("Denmark", "Copenhagen", "Europe"),
    ("Poland", "Warsaw", "Europe"), ("Hungary", "Budapest", "Europe"), ("Austria", "Vienna", "Europe"), ("Portugal", "Lisbon", "Europe"),
    ("Spain", "Madrid", "Europe"), ("Italy", "Rome", "Europe"), ("Greece", "Athens", "Europe"), ("Ireland", "Dublin", "Europe"),
    ("Bulgaria", "Sofia", "Europe"), ("Croatia", "Zagreb", "Europe"), ("Latvia", "Riga", "Europe"), ("Estonia", "Tallinn", "Europe"),
    ("Japan", "Tokyo", "Asia"), ("Thailand", "Bangkok", "Asia"), ("Vietnam", "Hanoi", "Asia"), ("Mongolia", "Ulaanbaatar", "Asia"),
    ("Nepal", "Kathmandu", "Asia"), ("Iran", "Tehran", "Asia"), ("Iraq", "Baghdad", "Asia"), ("Jordan", "Amman", "Asia"),
    ("Lebanon", "Beirut", "Asia"), ("Indonesia", "Jakarta", "Asia"), ("Philippines", "Manila", "Asia"), ("Malaysia", "Kuala Lumpur", "Asia"),
    ("Egypt", "Cairo", "Africa"), ("Kenya", "Nairobi", "Africa"), ("Ghana", "Accra", "Africa"), ("Senegal", "Dakar", "Africa"),
    ("Morocco", "Rabat", "Africa"), ("Tunisia", "Tunis", "Africa"), ("Angola", "Luanda", "Africa"), ("Zambia", "Lusaka", "Africa"),
    ("Ethiopia", "Addis Ababa", "Africa"), ("Uganda", "Kampala", "Africa"), ("Sudan", "Khartoum", "Africa"), ("Somalia", "Mogadishu", "Africa"),
    ("Australia", "Canberra", "Oceania"), ("New Zealand", "Wellington", "Oceania"), ("Fiji", "Suva", "Oceania"), ("Samoa", "Apia", "Oceania"),
)  # fmt: skip


def _capital(rng: random.Random) -> tuple[Slots, str]:
    country, capital, _ = rng.choice(COUNTRIES)
    return {"x": country}, capital


def _continent(rng: random.Random) -> tuple[Slots, str]:
    country, _, continent = rng.choice(COUNTRIES)
    return {"x": country}, continent


def _country(rng: random.Random) -> tuple[Slots, str]:
    country, capital, _ = rng.choice(COUNTRIES)
    return {"x": capital}, country


TASK = Task(
    "geography",
    "Knows capitals, countries and continents.",
    (
        Kind(
            _capital,
            (
                "What is the capital of {x}?",
                "Name the capital city of {x}.",
                "Which city is the capital of {x}?",
                "Capital of {x}?",
                "{x}: what is its capital?",
                "Tell me the capital of {x}.",
                "Do you know the capital of {x}?",
            ),
            (
                "Which is the capital city of {x}?",
                "Do you know which city is the capital of {x}?",
                "Tell me the name of {x}'s capital.",
            ),
            memorised=True,
        ),
        Kind(
            _continent,
            (
                "On which continent is {x}?",
                "Name the continent of {x}.",
                "Which continent does {x} belong to?",
                "Continent of {x}?",
                "{x}: on what continent is it?",
                "Tell me the continent of {x}.",
                "Do you know the continent {x} is on?",
            ),
            (
                "What continent is {x} on?",
                "Do you know which continent {x} belongs to?",
                "Tell me on which continent {x} is.",
            ),
            memorised=True,
        ),
        Kind(
            _country,
            (
                "{x} is the capital of which country?",
                "Which country has the capital {x}?",
                "Name the country whose capital is {x}.",
                "Country with the capital {x}?",
                "Of which country is {x} the capital?",
                "Tell me the country whose capital is {x}.",
            ),
            (
                "Do you know which country has {x} as its capital?",
                "What country is {x} the capital of?",
                "Tell me which country has the capital {x}.",
            ),
            memorised=True,
        ),
    ),
)
