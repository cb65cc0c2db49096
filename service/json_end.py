"""Where a JSON object, or a list, ends in text that comes in pieces."""

from __future__ import annotations


class JsonEnd:
    """Counts brackets outside of strings; that it is JSON is the grammar's affair."""

    def __init__(self) -> None:
        self._depth, self._quoted, self._escaped = 0, False, False
        self.reached = False

    def split(self, text: str) -> tuple[str, str]:
        """What of it still belongs to the object, and what comes behind its end."""
        for place, character in enumerate(text, 1):
            if self._closes(character):
                self.reached = True
                return text[:place], text[place:]
        return text, ""

    def _closes(self, character: str) -> bool:
        """Whether the object is complete with this character."""
        if self._quoted:
            escaped, self._escaped = self._escaped, character == "\\" and not self._escaped
            self._quoted = escaped or character != '"'
            return False
        self._quoted = character == '"'
        self._depth += (character in "{[") - (character in "}]")
        return character in "}]" and self._depth == 0
