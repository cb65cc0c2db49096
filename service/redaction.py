"""What is left out of a query's text before it is kept."""

from __future__ import annotations

import re

# E-mail addresses, and runs of six or more digits with the usual signs between: telephones, cards, accounts.
PRIVATE = r"[\w.+-]+@[\w-]+\.[\w.-]+|\+?\d(?:[ ./-]?\d){5,}"
REDACTED = "[redacted]"


def redact(text: str, pattern: str = PRIVATE) -> str:
    """`text` with every match of `pattern` taken out."""
    return re.sub(pattern, REDACTED, text)
