"""Reading calibration text, and what is refused about it."""

from __future__ import annotations

import json

import pytest

from profiler.corpus import Item, Message, gather, read_corpus, read_items, refuse_overlap
from store.errors import InvalidInput


@pytest.fixture
def write(tmp_path):
    def write_lines(*lines, name="items.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
        return path

    return write_lines


def test_the_three_forms_of_an_item(write):
    talk = [{"role": role, "content": text} for role, text in [("system", "s"), ("user", "q"), ("assistant", "a")]]
    path = write(
        {"prompt": "p", "id": 7}, {"prompt": "p", "response": "r"}, {"messages": talk}, {"messages": talk[1:2]}
    )
    assert read_items(path) == [
        Item("p", line=1),
        Item("p", "r", line=2),
        Item("q", "a", (Message("system", "s"),), 3),
        Item("q", None, (), 4),
    ]


def test_blank_lines_and_a_byte_order_mark_are_no_items(write):
    path = write('\ufeff{"prompt": "a"}', "", "  ", {"prompt": "b"}, "")
    assert [(item.prompt, item.line) for item in read_items(path)] == [("a", 1), ("b", 4)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", r"line 2: not JSON"),
        ('["prompt"]', r"line 2: wanted a JSON object, got list"),
        ('{"text": "x"}', r"line 2: wanted exactly one of the keys `prompt` and `messages`, got \['text'\]"),
        ('{"prompt": " "}', r"line 2: `prompt` is empty"),
        ('{"prompt": 3}', r"line 2: `prompt` must be a text, got int"),
        ('{"prompt": "x", "response": ""}', r"line 2: `response` is empty"),
        ('{"messages": []}', r"line 2: `messages` must be a list"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', r"line 2: a message's `role` must be one of"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', r"line 2: the last message before the answer"),
        ('{"messages": [{"role": "user", "content": "x"}], "response": "y"}', r"line 2: .*remove `response`"),
    ],
)
def test_a_wrong_line_is_refused_by_its_number(line, message, write):
    with pytest.raises(InvalidInput, match=message):
        read_corpus(write({"prompt": "fine"}, line))


def test_text_that_is_not_utf8_is_refused_by_its_line(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(InvalidInput, match="line 2: not UTF-8"):
        read_corpus(path)


def test_a_missing_or_empty_file_is_refused(tmp_path, write):
    with pytest.raises(InvalidInput, match=r"no file .*absent\.jsonl"):
        read_corpus(tmp_path / "absent.jsonl")
    with pytest.raises(InvalidInput, match="holds no items"):
        read_corpus(write("", "\n"))


def test_repeated_items_are_left_out_and_named(write):
    corpus = read_corpus(
        write({"prompt": "a  b"}, {"prompt": "c"}, {"prompt": "a b "}, {"prompt": "c", "response": "d"})
    )
    assert [item.line for item in corpus.items] == [1, 2, 4]
    assert [(found.line, found.first_line) for found in corpus.duplicates] == [(3, 1)]


def test_evaluation_queries_that_calibration_has_seen_are_refused_whatever_their_answer(write):
    calibration = read_corpus(write({"prompt": "one"}, {"prompt": "two", "response": "2"}, name="calibration.jsonl"))
    evaluation = read_corpus(write({"prompt": "three"}, {"prompt": " two", "response": "zwei"}, name="eval.jsonl"))
    with pytest.raises(InvalidInput, match=r"1 of 2 .*eval.jsonl.*line 2 repeats calibration line 2"):
        refuse_overlap(calibration, evaluation)


def test_disjoint_texts_pass():
    for other in (Item("b"), Item("a", history=(Message("system", "be brief"),))):
        assert other.content_hash != Item("a").content_hash
        refuse_overlap(gather([Item("a")]), gather([other]))


def test_a_corpus_hash_changes_with_answers_and_order_but_not_with_the_file():
    first, second = Item("a", "x", line=1), Item("b", "y", line=2)
    whole = gather([first, second], "here").content_hash
    assert whole == gather([Item("a", "x", line=9), second], "there").content_hash
    assert whole != gather([second, first]).content_hash
    assert whole != gather([Item("a", "z"), second]).content_hash
