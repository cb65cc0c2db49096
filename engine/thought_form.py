"""How a model marks the thought that comes before its answer, read off the source of its own chat template."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# `</think>`, `[/THINK]`, `</seed:think>`, `◁/think▷`: what a thought ends with. It begins so, too, less the slash.
END = re.compile(r"[<\[◁]/(?:\w+:)?(?:think|thinking|thought|reason|reasoning)[>\]▷]", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ThoughtForm:
    """An answer begins with `begin`, the thought and `end`, or its prompt ends with `begin` already."""

    begin: str
    end: str

    def opened_by(self, prompt: str) -> bool:
        """Whether the prompt's end leaves a thought open for the model to go on with."""
        return prompt.rstrip().endswith(self.begin)


def thought_form_of(sources: Iterable[str]) -> ThoughtForm | None:
    """None where the template's source has no such mark."""
    found = next((match.group() for source in sources for match in END.finditer(source)), None)
    return None if found is None else ThoughtForm(found.replace("/", "", 1), found)
