"""Keys by which a client asks again without doing twice: the header Idempotency-Key."""

from __future__ import annotations

import hashlib
from typing import Annotated

from fastapi import Header, Request
from pydantic import BaseModel

from store.records import ApiKey, MadeBy

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="idempotency-key",
        min_length=1,
        max_length=255,
        description="Asked again with the same key, a request does nothing new and gets the first answer.",
    ),
]


def scoped(key: str | None, request: Request) -> str | None:
    """The key as the caller's own: two callers may choose the same."""
    caller: ApiKey | None = request.scope.get("api_key")
    return None if key is None else f"{caller.id if caller else ''}\x1f{key}"


def made_by(key: str | None, body: BaseModel) -> MadeBy | None:
    """What the store keeps of a request with a `key` that is the caller's own; None for one without."""
    return None if key is None else MadeBy(_hash(key), _hash(body.model_dump_json()))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
