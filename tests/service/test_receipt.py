"""The receipt as a client reads it."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

from engine.guard import Escalated, Guard
from service.receipt import Receipt


def receipt(**told: Any) -> Receipt:
    return Receipt(**{**{field.name: field.name for field in fields(Receipt)}, **told})


def test_every_field_is_told_and_what_lies_in_it_is_plain() -> None:
    guard, escalated = Guard(0.5, 0.1, 20), Escalated(3, 0.4, 0.5)
    found = receipt(guard=guard, escalated=escalated, ignored=("a", "b"), doubts=(), calls=(1, 2))
    said = found.json()
    assert said == {**asdict(found), "ignored": ["a", "b"], "doubts": [], "calls": [1, 2]}
    assert json.loads(json.dumps(said)) == said


def test_what_there_was_not_is_null() -> None:
    said = receipt(guard=None, escalated=None, ignored=(), doubts=(), calls=None).json()
    assert (said["guard"], said["escalated"], said["calls"]) == (None, None, None)
