"""Streaming text: nothing incomplete, nothing of a stop string, nothing lost."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.text import Detokenizer, StopFilter, Tokenizer
from engine.tiny import write_byte_tokenizer
from store.errors import CheckpointError, InvalidInput

Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    return Tokenizer(folder)


@pytest.mark.parametrize(
    "text", ["plain", "élan vital", "日本語 text", "emoji 👩‍🚀 done", "  two  spaces\n\ttab", "��"]
)
def test_streamed_pieces_are_whole_characters_and_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + detokenizer.flush() == text
    if "�" not in text:
        assert all("�" not in piece for piece in pieces)


def test_bytes_that_never_become_a_character_are_shown_at_the_end(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(ord("a")) == "a"
    assert detokenizer.push(0xE6) == ""  # the first of three bytes
    assert detokenizer.flush() == "�"
    assert detokenizer.flush() == ""


def test_special_tokens_are_no_text(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(token) for token in (257, ord("h"), 259, ord("i"))] == ["", "h", "", "i"]


@given(text=st.text(alphabet="abAB", max_size=30), stops=st.lists(st.text("abAB", min_size=1, max_size=4), max_size=3))
def test_a_stop_filter_equals_cutting_the_whole_text_at_the_first_stop(text: str, stops: list[str]) -> None:
    rng = random.Random(text)
    filtered, out, at = StopFilter(stops), "", 0
    while at < len(text) and not filtered.stopped:
        step = rng.randint(1, 3)
        out += filtered.push(text[at : at + step])
        at += step
        assert not any(stop in out for stop in stops)
    stopped = filtered.stopped
    out += filtered.flush()
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert stopped == bool(ends)
    if stopped:
        seen = text[:at]
        assert out == seen[: min(seen.find(stop) for stop in stops if stop in seen)]
    else:
        assert out == text


def test_what_could_begin_a_stop_string_is_held_until_it_is_certain() -> None:
    stop = StopFilter(["</end>"])
    assert [stop.push(piece) for piece in ("fine <", "/", "en", "ough")] == ["fine ", "", "", "</enough"]
    assert [stop.push(piece) for piece in (" <", "/end", "> more")] == [" ", "", ""]
    assert stop.stopped
    assert stop.push("later") == ""


def test_a_chat_is_rendered_up_to_the_assistants_turn(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert tokens[-len("<assistant> ") :] == tuple(b"<assistant> ")
    assert 259 in tokens


def test_every_end_token_of_the_generation_config_ends_an_answer(checkpoint: Checkpoint) -> None:
    assert Tokenizer(checkpoint("qwen2_moe")).eos == {258, 259}


def test_a_model_without_a_chat_template_says_so(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"chat_template"', '"unused"'))
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(InvalidInput, match="no chat template"):
        Tokenizer(tmp_path).encode_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])  # of the second, transformers makes up an empty tokenizer
def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path, family: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        Tokenizer(tmp_path)


def test_messages_that_the_template_refuses_are_bad_input(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ raise_exception('System role not supported') }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InvalidInput, match="refuses these messages: System role not supported"):
        Tokenizer(tmp_path).encode_chat([{"role": "system", "content": "hi"}])


def test_stop_strings_may_stay_in_the_text() -> None:
    stops = StopFilter(["END", "E"], include=True)
    assert [stops.push("abE"), stops.stopped] == ["abE", True]
    longer = StopFilter(["wait", "ai"], include=True)
    assert [longer.push("x wa"), longer.push("it y"), longer.stopped] == ["x ", "wait", True]


def test_tokens_are_spelt_with_their_bytes(checkpoint: Checkpoint) -> None:
    tokenizer = Tokenizer(checkpoint("qwen3_moe"))
    assert tokenizer.spell(65) == ("A", b"A")
    assert tokenizer.spell(0xC3) == ("bytes:\\xc3", b"\xc3")
    assert tokenizer.spell(258) == ("<eos>", b"")


def test_the_variables_of_a_template_are_known(checkpoint: Checkpoint) -> None:
    assert Tokenizer(checkpoint("qwen3_moe")).template_variables >= {"messages", "add_generation_prompt"}
