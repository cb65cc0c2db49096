"""Who may ask: keys, and headers that keep browsers careful. Plain ASGI, before routes."""

from __future__ import annotations

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.browsers import refuse_pages
from service.context import Opening
from service.middleware import put_headers
from service.rate_limits import RateLimits
from service.refusals import refusal
from store.errors import Forbidden, MoepagerError, Unauthorized
from store.records import ApiKey

OPEN = frozenset({"/", "/docs", "/healthz", "/health", "/readyz"})  # probes and addresses typed by hand carry no key
CONSOLE = "/console"  # its files are the same for everybody; what they show comes from routes that need a key
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
POLICY = b"content-security-policy"
STRICT = b"default-src 'none'; frame-ancestors 'none'"
# Of the console: its own files and nothing else, and no script can make markup out of text.
OWN = (
    b"default-src 'self'; base-uri 'none'; object-src 'none'; form-action 'none'; frame-ancestors 'none'; "
    b"require-trusted-types-for 'script'; trusted-types 'none'"
)


class SecurityHeaders:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                put_headers(message, (*HEADERS, (POLICY, OWN if is_console(scope["path"]) else STRICT)))
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)


def is_console(path: str) -> bool:
    return path == CONSOLE or path.startswith(f"{CONSOLE}/")


class Guard:
    """Lets a request through with its key in `scope["api_key"]` (None where the service has no keys), or refuses it."""

    def __init__(self, app: ASGIApp, limits: RateLimits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN and not is_console(scope["path"]):
            send = _counted(scope, send)
            try:
                scope["api_key"] = await self._admitted(scope)
            except MoepagerError as error:
                await refusal(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _admitted(self, scope: Scope) -> ApiKey | None:
        opening: Opening = scope["app"].state.opening
        parts = opening.current()  # while it loads, nobody knows whether keys are needed
        if not len(parts.keys):
            refuse_pages(scope["method"], Headers(scope=scope), parts.settings)
            return None
        kind, _, secret = Headers(scope=scope).get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not secret.strip():
            raise Unauthorized("This service needs a key: send `Authorization: Bearer KEY`. Its operator makes keys.")
        key = parts.keys.find(secret.strip())
        if key is None:
            raise Unauthorized("Nobody knows this key. Check it, or ask the operator for a new one: it may be revoked.")
        await self._limits.take(key, parts.metrics.counted_alone)
        return key


def _counted(scope: Scope, send: Send) -> Send:
    opening: Opening = scope["app"].state.opening

    async def counting(message: Message) -> None:
        if message["type"] == "http.response.start" and opening.ready:
            opening.current().metrics.answered(message["status"])
        await send(message)

    return counting


async def require_operator(request: Request) -> None:
    key: ApiKey | None = request.scope.get("api_key")
    if key is not None and key.role != "operator":
        raise Forbidden(
            f"{request.method} {request.url.path} is for operators; key {key.name!r} may only query. Ask the operator."
        )


operators_only = Depends(require_operator)
