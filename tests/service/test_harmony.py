"""What gpt-oss writes in channels comes back as thought and answer, however it arrives."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tokenizers import Tokenizer as RawTokenizer

from engine.harmony import CHANNEL, MARKS, SIGNS
from engine.text import Detokenizer, Tokenizer
from engine.tiny import write_tiny
from service.answer_reader import Forms, message_of
from service.app import create_app
from service.channel_reader import ChannelReader
from service.parts import Parts, open_parts
from service.settings import Settings
from service.thought_reader import Thought

CHANNELS = Forms(channels=True)
TEXTS = ("analysis", "final", "commentary", " to=functions.f", "a", "b\n", "<", "<|", "|>", " ")
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if false %}<|channel|>analysis{% endif %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
WHOLE = "<|channel|>analysis<|message|>hm, 6 * 7<|end|><|start|>assistant<|channel|>final<|message|>42"


def signed(text: str) -> str:
    """As it is decoded from special tokens."""
    for mark, sign in SIGNS.items():
        text = text.replace(mark, sign)
    return text


def named(text: str) -> str:
    for mark, sign in SIGNS.items():
        text = text.replace(sign, mark)
    return text


def reference(text: str) -> tuple[str, str]:
    """Thought and answer by expressions over the whole text."""
    if not text.lstrip().startswith(CHANNEL):
        return "", named(text)
    told: dict[bool, list[str]] = {True: [], False: []}
    one = signed(r"(.*?)<|message|>(.*?)(?:<|end|>|(?=<|start|>)|(?=<|channel|>)|\Z)")
    for header, body in re.findall(one, text, re.DOTALL):
        name = re.findall(r"\A\s*(\w*)", header.rsplit(CHANNEL, 1)[-1])[0]
        said = name == "final" or (name == "commentary" and " to=" not in header)
        told[said] += [named(body)] if body else []
    return "\n\n".join(told[False]), "\n\n".join(told[True])


WORDS = (*SIGNS.values(), *SIGNS.values(), *MARKS, *TEXTS)


@pytest.mark.parametrize("seed", range(8))
def test_channels_are_told_apart_however_the_text_arrives(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(400):
        text = rng.choice(["", CHANNEL, signed(WHOLE)]) + "".join(rng.choices(WORDS, k=rng.randrange(12)))
        reader, pieces, at = ChannelReader(), list[Thought | str](), 0
        while at < len(text):
            step = rng.randrange(1, 9)
            pieces += reader.push(text[at : at + step])
            at += step
        pieces += reader.flush()
        thought = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
        said = "".join(piece for piece in pieces if isinstance(piece, str))
        assert (thought, said) == reference(text), text


@pytest.mark.parametrize(
    ("text", "thought", "said"),
    [
        (WHOLE, "hm, 6 * 7", "42"),
        ("<|channel|>final<|message|>42", None, "42"),
        ("<|channel|>analysis<|message|>and so on", "and so on", ""),  # where the limit cut it
        (
            "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>final<|message|>42",
            None,
            "I look.\n\n42",
        ),
        ("<|channel|>commentary to=functions.f json<|message|>{}", "{}", ""),
        ("assistantfinal", None, "assistantfinal"),
    ],
)
def test_a_message_has_the_final_channel_as_its_content(text: str, thought: str | None, said: str) -> None:
    message = message_of(signed(text), CHANNELS)
    assert (message.get("reasoning_content"), message["content"]) == (thought, said)


def test_a_mark_that_is_only_spelt_out_is_text(folder: Path) -> None:
    """As in an answer about harmony: the same letters, by other tokens."""
    tokenizer, said = Tokenizer(folder), "a text ends with <|end|>, and <|start|> comes next"
    letters = [token for letter in said for token in tokenizer.encode(letter, special_tokens=False)]
    tokens = (*tokenizer.encode("<|channel|>final<|message|>", special_tokens=False), *letters)
    assert message_of(tokenizer.decode(tokens, channels=True), CHANNELS)["content"] == said


def test_a_text_comes_out_as_it_is_written() -> None:
    reader = ChannelReader()
    texts = (
        "<|channel|>",
        "analysis",
        "<|message|>",
        "I ",
        "wonder",
        "<|end|>",
        "<|start|>assistant",
        "<|channel|>final",
    )
    assert [piece for text in texts for piece in reader.push(signed(text))] == [Thought("I "), Thought("wonder")]
    assert [reader.push(signed(text)) for text in ("<|message|>", "42", " it is")] == [[], ["42"], [" it is"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint whose tokenizer has the marks as special tokens."""
    made = write_tiny("qwen3_moe", tmp_path_factory.mktemp("channels") / "tiny", vocab_size=272)
    raw = RawTokenizer.from_file(str(made / "tokenizer.json"))
    raw.add_special_tokens(list(MARKS))
    raw.save(str(made / "tokenizer.json"))
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


@pytest.fixture(scope="module")
def parts(folder: Path) -> Iterator[Parts]:
    settings = Settings(
        model=str(folder),
        store=f"sqlite:///{folder.parent / 'store.db'}",
        embedder="hash",
        threads=1,
        allowed_hosts="testserver",
    )
    with open_parts(settings) as parts:
        yield parts


def test_marks_stay_in_the_text_only_where_they_are_asked_for(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    ends = tokenizer.eos - set(tokenizer.encode("".join(MARKS), special_tokens=False))
    assert ends
    tokens = (*tokenizer.encode(WHOLE, special_tokens=False), *ends)
    assert tokenizer.has_channels
    assert tokenizer.decode(tokens) == "analysishm, 6 * 7assistantfinal42"
    assert tokenizer.decode(tokens, channels=True) == signed(WHOLE)
    shown = Detokenizer(tokenizer, channels=True)
    assert "".join([*map(shown.push, tokens), shown.flush()]) == signed(WHOLE)


def test_a_template_without_channels_has_none(folder: Path, tmp_path: Path) -> None:
    assert not Tokenizer(write_tiny("qwen3_moe", tmp_path / "tiny")).has_channels


def test_chats_and_queries_are_split_by_marks_that_completions_leave_out(parts: Parts) -> None:
    """By the real engine, which is made to say one mark: without a channel before it, it is text."""
    mark = parts.engine.tokenizer.encode("<|message|>", special_tokens=False)[0]
    sampling: dict[str, Any] = {"max_tokens": 3, "logit_bias": {str(mark): 100}}
    ask = {"model": parts.model_id, "expert": {"mode": "exact"}, **sampling}
    with TestClient(create_app(lambda: nullcontext(parts))) as client:
        while client.get("/readyz").status_code == 503:
            pass
        chat = client.post(
            "/v1/chat/completions", json={**ask, "messages": [{"role": "user", "content": "why"}]}
        ).json()
        plain = client.post("/v1/completions", json={**ask, "prompt": "why"}).json()
        query = client.post("/v1/query", json={"query": "why", "mode": "exact", **sampling}).json()
    assert (chat["choices"][0]["message"]["content"], plain["choices"][0]["text"]) == ("<|message|>" * 3, "")
    assert query["answer"] == "<|message|>" * 3
