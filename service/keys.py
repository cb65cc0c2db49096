"""API keys: how one is made, and which stored one a request's key is. Knows hashes, no HTTP and no database.

A key is `mp-<id>-<secret>`. The secret has 256 random bits, so a plain sha256 keeps it: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection, Sequence
from datetime import UTC, datetime

from store.errors import InvalidInput
from store.records import ApiKey, Role

SHAPE = re.compile(r"mp-([0-9a-f]{12})-[A-Za-z0-9_-]{43}")
NOBODY = "0" * 64  # compared with where no stored key has the id, so that both take the same time
ROLES: dict[str, Role] = {"query": "query", "operator": "operator"}


def make_key(name: str, role: str, per_minute: int | None, tasks: Collection[str] = ()) -> tuple[ApiKey, str]:
    """What is stored, and the key itself, which is shown once. With `tasks` there are no others for it."""
    if role not in ROLES:
        raise InvalidInput(f"A key's role is query or operator, got {role!r}.", param="role")
    if not name.strip() or not name.isprintable():
        raise InvalidInput(f"A key's name is printable text that says whose it is, got {name!r}.", param="name")
    if per_minute is not None and per_minute < 1:
        raise InvalidInput(f"A key's limit is at least 1 request a minute, got {per_minute}.", param="per_minute")
    if tasks and role == "operator":
        raise InvalidInput(
            "An operator runs the whole service: jobs, eviction, proposals out of everybody's queries. Only a key of "
            "role query can be limited to tasks.",
            param="task",
        )
    identity = secrets.token_hex(6)
    secret = f"mp-{identity}-{secrets.token_urlsafe(32)}"
    named, made = tuple(sorted(set(tasks))) or None, datetime.now(UTC)
    return ApiKey(identity, name.strip(), ROLES[role], digest_of(secret), per_minute, made, named), secret


def digest_of(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class KeyRing:
    """All stored keys at one moment. Empty: nobody needs a key."""

    def __init__(self, keys: Sequence[ApiKey] = ()) -> None:
        self._keys = {key.id: key for key in keys}

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, secret: str) -> ApiKey | None:
        shape = SHAPE.fullmatch(secret)
        key = self._keys.get(shape[1]) if shape else None
        same = hmac.compare_digest(digest_of(secret), key.digest if key else NOBODY)
        return key if same else None
