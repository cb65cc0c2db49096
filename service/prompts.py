"""From what a client wrote to the engine's tokens, and the text that retrieval reads."""

from __future__ import annotations

from collections.abc import Sequence

from engine.card import ModelCard
from engine.text import Tokenizer
from service.schemas import Message
from store.errors import InvalidInput


def encode_query(query: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """As one user message where the model has a chat template, else as plain text."""
    if tokenizer.has_chat_template:
        return tokenizer.encode_chat([{"role": "user", "content": query}])
    return tokenizer.encode(query)


def encode_messages(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[int, ...]:
    """OpenAI's `developer` is the `system` of the templates."""
    turns = [{"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in messages]
    return tokenizer.encode_chat(turns)


def last_user_text(messages: Sequence[Message]) -> str | None:
    return next((m.text for m in reversed(messages) if m.role == "user"), None)


def encode_prompt(prompt: str | Sequence[int], tokenizer: Tokenizer, card: ModelCard) -> tuple[tuple[int, ...], str]:
    """The tokens of a completion's prompt, and its text."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt), prompt
    if not all(0 <= token < card.vocab for token in prompt):
        raise InvalidInput(
            f"Token ids of this model are 0 to {card.vocab - 1}; the prompt has {min(prompt)} to {max(prompt)}.",
            param="prompt",
        )
    return tuple(prompt), tokenizer.decode(prompt)
