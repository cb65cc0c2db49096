"""Keys by which a client asks again without doing twice: the header Idempotency-Key."""

from __future__ import annotations

from typing import Annotated

from fastapi import Header, Request

from store.records import ApiKey

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
