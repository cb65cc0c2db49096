"""What keeps web pages out of a service without keys: it answers to its own names, and other pages may change nothing.

A browser sends what any page tells it to: a form to `127.0.0.1`, or scripts to a name of the page's own that was made
to lead there (DNS rebinding). Where keys are set neither has one, so this is not asked then. Clients that are no
browsers send no Origin, and are not concerned.
"""

from __future__ import annotations

import socket
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from service.settings import Settings
from store.errors import Forbidden

READING = frozenset({"GET", "HEAD", "OPTIONS"})  # a page can't read the answers of another origin
ANY = "*"


def refuse_pages(method: str, headers: Headers, settings: Settings) -> None:
    """Raises Forbidden for a Host that is no name of this service, and for a change that another page asks for."""
    host = headers.get("host", "")
    if host and not is_own(name_of(host), settings):
        raise Forbidden(
            f"This service has no keys, so it answers only to its own names, and {host!r} is none. Name it in "
            "MOEPAGER_ALLOWED_HOSTS, or make keys (`moepager keys create`)."
        )
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    foreign = origin is not None and urlsplit(origin).netloc.lower() != host.lower()
    if method not in READING and (foreign or site in ("cross-site", "same-site")):
        raise Forbidden(
            f"This service has no keys, so a page of {origin or 'another site'} may change nothing here. Ask from its "
            "own console or from a program, or make keys (`moepager keys create`)."
        )


def name_of(host: str) -> str:
    """A Host header without its port, in lower case; empty for what is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_own(name: str, settings: Settings) -> bool:
    """An address is: only a name can be made to lead elsewhere."""
    allowed = {one.strip().lower() for one in (settings.allowed_hosts or "").split(",")}
    known = {"localhost", settings.host.lower(), socket.gethostname().lower(), *allowed}
    return ANY in allowed or (name != "" and name in known) or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
