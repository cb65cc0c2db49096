"""JSON bodies whose text is no text: halves of characters, as clients make that cut a text between two UTF-16 units."""

from __future__ import annotations

import json
import re
from typing import Any

from fastapi import Request

from store.errors import InvalidInput

# Half of a pair, escaped or as bytes: json lets both through. The halves of a whole pair look so, too.
SUSPECT = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
HALF = re.compile("[\ud800-\udfff]")
MOST_SHOWN = 200  # characters of a field's name, which may be anything


async def refuse_half_characters(request: Request) -> None:  # no thread: see context.py
    """Raises InvalidInput that names the field. What passes can be written as UTF-8 wherever it goes."""
    if "json" not in request.headers.get("content-type", ""):
        return
    body = await request.body()
    if json.detect_encoding(body).startswith("utf-8") and not SUSPECT.search(body):
        return
    try:
        read = await request.json()
    except (ValueError, RecursionError):  # a route that reads no body got one
        return
    field = half_character(read)
    if field is not None:
        raise InvalidInput(
            f"`{field}` has half of a character (a lone UTF-16 surrogate, U+D800 to U+DFFF), which is no Unicode. Send "
            "whole characters: a text must not be cut between the two halves of one.",
            param=field,
        )


def half_character(body: Any) -> str | None:
    """A place in parsed JSON where such a text is, as `messages[0].content`; of such a name, what it is a name in."""
    left = [("", body)]
    while left:
        place, value = left.pop()
        texts = value if isinstance(value, dict) else [value] if isinstance(value, str) else []
        if any(HALF.search(text) for text in texts):
            return place[:MOST_SHOWN] or "body"
        if isinstance(value, dict):
            left += [(f"{place}.{name}" if place else name, each) for name, each in value.items()]
        elif isinstance(value, list):
            left += [(f"{place}[{number}]", each) for number, each in enumerate(value)]
    return None
