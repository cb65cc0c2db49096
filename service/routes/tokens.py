"""`POST /tokenize` and `/detokenize`, as vLLM has them; `POST /v1/embeddings` of the embedder that retrieves.

None of them is a query, so each works at a desk of its own, within limits, where it holds up no query.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.context import PartsDep
from service.desk import Desk, Stop, refuse_longer
from service.parts import Parts
from service.prompts import encode_chat, encode_prompt
from service.schemas import DetokenizeBody, EmbeddingsBody, TokenizeBody
from store.errors import InvalidInput
from store.records import F32

router = APIRouter(tags=["openai"])

MOST_EMBEDDED = 2**18  # characters of a call
MOST_TOKENIZED = 2**20  # characters of a call
MOST_TOKENS = 2**18  # of a call, to text
PIECE_TEXTS, PIECE_CHARACTERS = 32, 2048  # embedded in one go, for some tens of milliseconds


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, request: Request, parts: PartsDep) -> Response:
    """The tokens of a text, or of messages in the model's chat template."""
    length = len(body.prompt or "") + sum(len(message.text) for message in body.messages or ())
    refuse_longer(length, MOST_TOKENIZED, "characters", "prompt" if body.messages is None else "messages")
    desk: Desk = request.app.state.tokens_desk
    return await desk.run(lambda _: _json(tokens_of(body, parts)), request, parts.settings.request_timeout)


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, request: Request, parts: PartsDep) -> Response:
    """The text of tokens."""
    refuse_longer(len(body.tokens), MOST_TOKENS, "tokens", "tokens")
    desk: Desk = request.app.state.tokens_desk
    return await desk.run(lambda _: _json(text_of(body, parts)), request, parts.settings.request_timeout)


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingsBody, request: Request, parts: PartsDep) -> Response:
    """Unit vectors, whatever `model` is called: the service has one embedder, and its id is in the answer."""
    embedder = parts.retriever.embedder
    if body.dimensions not in (None, embedder.dimension):
        raise InvalidInput(
            f"Embeddings of {embedder.id} have {embedder.dimension} dimensions, not {body.dimensions}. Leave it out.",
            param="dimensions",
        )
    texts = [body.input] if isinstance(body.input, str) else body.input
    refuse_longer(sum(map(len, texts)), MOST_EMBEDDED, "characters", "input")
    desk: Desk = request.app.state.embeddings_desk
    return await desk.run(
        partial(embedded, texts, body.encoding_format, parts), request, parts.settings.request_timeout
    )


def tokens_of(body: TokenizeBody, parts: Parts) -> dict[str, Any]:
    """`ignored` are options that this model's chat template does not read."""
    tokenizer, ignored = parts.engine.tokenizer, tuple[str, ...]()
    if body.messages is not None:
        tokens, ignored = encode_chat(body.messages, body, tokenizer)
    else:
        tokens = tokenizer.encode(body.prompt or "", special_tokens=body.add_special_tokens)
    found = {"count": len(tokens), "max_model_len": parts.max_context, "tokens": tokens, "ignored": ignored}
    return {**found, "token_strs": [tokenizer.spell(t)[0] for t in tokens]} if body.return_token_strs else found


def text_of(body: DetokenizeBody, parts: Parts) -> dict[str, Any]:
    return {"prompt": encode_prompt(body.tokens, parts.engine.tokenizer, parts.engine.card, "tokens")[1]}


def embedded(texts: Sequence[str], form: str, parts: Parts, stop: Stop) -> Response:
    """In pieces, between which the embedder is free for queries; usage is in the served model's tokens."""
    embedder, encode = parts.retriever.embedder, parts.engine.tokenizer.encode
    data: list[dict[str, Any]] = []
    count = 0
    for piece in pieces(texts):
        stop.check()
        for vector in embedder.embed(piece):  # [n, d]
            data.append({"object": "embedding", "index": len(data), "embedding": _encoded(vector, form)})
        count += sum(len(encode(text)) for text in piece)
    usage = {"prompt_tokens": count, "total_tokens": count}
    return _json({"object": "list", "data": data, "model": embedder.id, "usage": usage})


def pieces(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in order, as few characters at once as one long text has."""
    piece: list[str] = []
    for text in texts:
        if piece and (len(piece) == PIECE_TEXTS or sum(map(len, piece)) + len(text) > PIECE_CHARACTERS):
            yield piece
            piece = []
        piece.append(text)
    if piece:
        yield piece


def _json(answer: dict[str, Any]) -> Response:
    """Written out here, in the desk's thread: a long list takes as long as the work itself."""
    return Response(json.dumps(answer, ensure_ascii=False), media_type="application/json")


def _encoded(vector: F32, form: str) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]
