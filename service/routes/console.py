"""`/console`: the service's own page, and `GET /v1/session`, which tells it whose key it holds. Holds no data itself.

The files are static, the same for everybody, and need no key; all that they show comes from routes that do.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from service.context import PartsDep
from store.records import ApiKey

router = APIRouter(tags=["console"])

FOLDER = Path(__file__).parent.parent / "console"
# By the file's ending, not by the machine's own table: a browser runs no script of another type.
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
INDEX = "index.html"


@dataclass(frozen=True, slots=True)
class Page:
    content: bytes
    media_type: str
    etag: str


def read_pages() -> dict[str, Page]:
    """Every file of the console by its name: what is not among them is not there, so no path leads elsewhere."""
    pages = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in TYPES:
            content = path.read_bytes()
            pages[path.name] = Page(content, TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return pages


PAGES = read_pages()


@router.get("/", include_in_schema=False)
@router.get("/console", include_in_schema=False)
async def to_console() -> Response:
    return RedirectResponse("/console/")


@router.get("/docs", include_in_schema=False)
async def to_reference() -> Response:
    """Where people look for an API's description."""
    return RedirectResponse("/console/#/api")


@router.get("/console/{name:path}", include_in_schema=False)
async def page(name: str, request: Request) -> Response:
    """A browser asks again each time and is told that nothing changed: an upgrade shows at the next look."""
    found = PAGES.get(name or INDEX)
    if found is None:
        raise HTTPException(404, "The console has no such file")
    headers = {"etag": found.etag, "cache-control": "no-cache"}
    if request.headers.get("if-none-match") == found.etag:
        return Response(status_code=304, headers=headers)
    return Response(found.content, headers=headers, media_type=found.media_type)


@router.get("/v1/session")
async def session(request: Request, parts: PartsDep) -> dict[str, Any]:
    """Whose key this is and what it may do, and the service's limits. `key` is null where the service has no keys."""
    key: ApiKey | None = request.scope.get("api_key")
    return {
        "model": parts.model_id,
        "key": None if key is None else {"name": key.name, "role": key.role, "tasks": key.tasks},
        "operator": key is None or key.role == "operator",
        "max_context": parts.max_context,
        "answer_tokens": parts.settings.answer_tokens,
        "changes": parts.changes,
        "draining": request.app.state.draining.paused,
    }
