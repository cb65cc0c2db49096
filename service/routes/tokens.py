"""`POST /tokenize` and `/detokenize`, as vLLM has them; `POST /v1/embeddings` of the embedder that retrieves."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from fastapi import APIRouter

from service.context import PartsDep
from service.prompts import encode_messages, encode_prompt
from service.schemas import DetokenizeBody, EmbeddingsBody, TokenizeBody
from store.errors import InvalidInput
from store.records import F32

router = APIRouter(tags=["openai"])


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, parts: PartsDep) -> dict[str, Any]:
    """The tokens of a text, or of messages in the model's chat template."""
    tokenizer = parts.engine.tokenizer
    if body.messages is not None:
        tokens = encode_messages(body.messages, tokenizer)
    else:
        tokens = tokenizer.encode(body.prompt or "", special_tokens=body.add_special_tokens)
    found = {"count": len(tokens), "max_model_len": parts.max_context, "tokens": list(tokens)}
    if not body.return_token_strs:
        return found
    return {**found, "token_strs": await asyncio.to_thread(lambda: [tokenizer.spell(token)[0] for token in tokens])}


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, parts: PartsDep) -> dict[str, Any]:
    """The text of tokens."""
    _, text = encode_prompt(body.tokens, parts.engine.tokenizer, parts.engine.card)
    return {"prompt": text}


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingsBody, parts: PartsDep) -> dict[str, Any]:
    """Unit vectors, whatever `model` is called: the service has one embedder, and its id is in the answer."""
    embedder = parts.retriever.embedder
    if body.dimensions not in (None, embedder.dimension):
        raise InvalidInput(
            f"Embeddings of {embedder.id} have {embedder.dimension} dimensions, not {body.dimensions}. Leave it out.",
            param="dimensions",
        )
    texts = [body.input] if isinstance(body.input, str) else body.input
    vectors = await asyncio.to_thread(embedder.embed, texts)  # [n, d]
    data = [
        {"object": "embedding", "index": place, "embedding": _encoded(vector, body.encoding_format)}
        for place, vector in enumerate(vectors)
    ]
    count = sum(len(parts.engine.tokenizer.encode(text)) for text in texts)  # in the served model's tokens
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "data": data, "model": embedder.id, "usage": usage}


def _encoded(vector: F32, form: str) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]
