"""Errors as answers: OpenAI's error object and the status of the error's class. The only place that maps them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from store.errors import Busy, DiskError, MoepagerError, NotFound, ShardChanged, StoreUnreachable, TooMany, Unauthorized

log = logging.getLogger("moepager.service")

READY = "/readyz"  # asked every few seconds, so its refusals are not logged: who asks is told, and what it is about is
RETRY_AFTER = "1"  # seconds; short, for a queue place frees as soon as one answer ends
NO_RETRY = (409, 504)  # which these clients would try again by themselves
INTERNAL = "The service failed on this request; its log has the details under the request's id."


class UnknownModel(NotFound):
    """The code that OpenAI's clients know."""

    code = "model_not_found"


def add_refusals(app: FastAPI) -> None:
    app.add_exception_handler(MoepagerError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_body)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(Exception, _fail)


def error_body(error: MoepagerError) -> dict[str, Any]:
    return _body(str(error), error.status, error.code, getattr(error, "param", None))


def failure_body() -> dict[str, Any]:
    return _body(INTERNAL, 500, "internal_error", None)


def _body(message: str, status: int, code: str, param: str | None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, MoepagerError)
    if error.status >= 500 and request.url.path != READY:
        log.warning("request %s refused: %s", request.scope.get("request_id"), error)
    return refusal(error)


def refusal(error: MoepagerError) -> JSONResponse:
    return JSONResponse(error_body(error), error.status, _headers(error))


def _headers(error: MoepagerError) -> dict[str, str]:
    """OpenAI's clients obey `x-should-retry`: an answer that took too long would take as long again."""
    if isinstance(error, TooMany):
        return {"retry-after": str(error.seconds), "x-should-retry": "true"}
    if isinstance(error, Unauthorized):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, Busy | DiskError | StoreUnreachable):
        return {"retry-after": RETRY_AFTER, "x-should-retry": "true"}
    vain = error.status in NO_RETRY or isinstance(error, ShardChanged)
    return {"x-should-retry": "false"} if vain else {}


async def _refuse_body(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    message, param = explain(error.errors())
    return JSONResponse(_body(message, 400, "invalid_request", param), 400)


async def _refuse_route(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}."
    if error.status_code in (404, 405):
        message += " The routes are listed at /docs."
    if error.status_code == 400:  # the one thing that the framework itself refuses so
        is_form = request.headers.get("content-type", "").startswith("multipart/")
        message = f"The body can't be read as {'a form' if is_form else 'JSON in UTF-8'}: {error.detail}."
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    return JSONResponse(_body(message, error.status_code, code, None), error.status_code, error.headers)


async def _fail(request: Request, error: Exception) -> JSONResponse:
    name = request.scope["request_id"]
    log.error("request %s failed", name, exc_info=error)
    return JSONResponse(failure_body(), 500, {"x-request-id": name})  # sent from outside the middleware that adds it


def explain(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """One message and the field it is about. Of a union's several complaints the most specific one counts."""
    first = max(errors, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))
    if first["type"] == "json_invalid":
        wrong = first.get("ctx", {}).get("error", first["msg"])
        return f"The body is not JSON: {wrong}, at character {first['loc'][-1]}.", None
    said, param = first["msg"].removeprefix("Value error, "), field_name(first["loc"])
    if param is None and first["type"] == "value_error":
        return f"The body does not fit together: {said}.", None
    if param is None:
        return "The body must be a JSON object, sent with `Content-Type: application/json`.", None
    if first["type"] == "extra_forbidden":
        return f"`{param}` is not a field of this route. Leave it out, or check its spelling.", param
    if first["type"] == "missing":
        return f"`{param}` is missing. It is required.", param
    return f"`{param}`: {said}. Got {_shown(first.get('input'))}.", param


def field_name(location: Sequence[int | str]) -> str | None:
    """`("body", "messages", 0, "content", "list[TextPart]", 1, "type")` -> `messages[0].content[1].type`."""
    name = ""
    for step in location[1:]:
        if isinstance(step, int):
            name += f"[{step}]"
        elif step.isidentifier() and step[0].islower() and step not in ("str", "int"):  # others label union members
            name += f".{step}" if name else step
    return name or None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


async def with_error_frame(
    name: str, frames: AsyncIterator[bytes], encode: Callable[[Mapping[str, object]], bytes]
) -> AsyncIterator[bytes]:
    """The frames; what fails after the first byte becomes a last frame, for the status is long sent."""
    try:
        async for frame in frames:
            yield frame
    except MoepagerError as error:
        log.warning("request %s broke off: %s", name, error)
        yield encode(error_body(error))
    except Exception:  # the last border before the wire: the client has to see that its answer is not whole
        log.exception("request %s failed", name)
        yield encode(failure_body())
