"""A URL's parameters: one that the route does not know is refused, as an unknown field of a body is.

A filter that is ignored would list everything in the place of what was asked for, or forget it.
"""

from __future__ import annotations

from fastapi import Request
from fastapi.routing import APIRoute

from store.errors import InvalidInput

AZURE = ("api-version",)  # OpenAI's clients send it with every request where they are set up for Azure; it asks nothing


def refuse_unknown(request: Request) -> None:
    """Raises InvalidInput with the name. For routes of the API alone: pages get parameters from wherever they are
    linked, and probes from whoever probes."""
    route = request.scope.get("route")
    if not isinstance(route, APIRoute) or not route.path.startswith("/v1/"):
        return
    known = [parameter.alias for parameter in route.dependant.query_params]
    passed = AZURE if "openai" in route.tags else ()
    for name in request.query_params:
        if name not in known and name not in passed:
            has = f"It has {', '.join(known)}" if known else "It has none"
            raise InvalidInput(
                f"`{name[:80]}` is not a parameter of {request.method} {route.path}. {has}; leave it out, or check its "
                "spelling.",
                param=name[:80],
            )
