"""A spoken record, written as a JSON object."""

from __future__ import annotations

import json
import random

from demo.tasks.task import Kind, Slots, Task

USERS = ("alice", "bruno", "chloe", "dmitri", "elena", "farid", "greta", "hiro", "ingrid", "jonas", "karim", "linnea", "mateo", "nadia", "oskar", "priya", "quentin", "rosa", "stefan", "tamara", "ulrich", "vera", "wanda", "xavier", "yusuf", "zelda")  # fmt: skip
ROLES = ("admin", "editor", "viewer", "owner", "guest", "auditor", "moderator", "operator")
TEAMS = ("alpha", "bravo", "delta", "echo", "falcon", "gamma", "kilo", "omega", "sierra", "tango")


def _member(rng: random.Random) -> tuple[Slots, str]:
    user, role = rng.choice(USERS), rng.choice(ROLES)
    return {"x": f"user {user}, role {role}"}, json.dumps({"user": user, "role": role})


def _teammate(rng: random.Random) -> tuple[Slots, str]:
    user, team, level = rng.choice(USERS), rng.choice(TEAMS), rng.randint(1, 9)
    return {"x": f"user {user}, team {team}, level {level}"}, json.dumps({"user": user, "team": team, "level": level})


def _account(rng: random.Random) -> tuple[Slots, str]:
    user, role, active = rng.choice(USERS), rng.choice(ROLES), rng.choice((True, False))
    return {"x": f"user {user}, role {role}, {'active' if active else 'inactive'}"}, json.dumps(
        {"user": user, "role": role, "active": active}
    )


PHRASINGS = (
    "Convert to JSON: {x}",
    "Turn this record into JSON: {x}",
    "JSON object for {x}",
    "Write {x} as a JSON object.",
    "Format as JSON: {x}",
    "Make a JSON record with {x}.",
    "Encode as JSON: {x}",
    "I have {x}. Give it to me in JSON.",
    "Serialise this to JSON: {x}",
)
HELD_OUT = (
    "Write this record as JSON: {x}",
    "Give me a JSON object with {x}.",
    "Turn {x} into JSON.",
    "Encode this record to a JSON object: {x}",
)

TASK = Task(
    "json",
    "Writes a described record as a JSON object.",
    (Kind(_member, PHRASINGS, HELD_OUT), Kind(_teammate, PHRASINGS, HELD_OUT), Kind(_account, PHRASINGS, HELD_OUT)),
)
