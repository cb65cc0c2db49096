from __future__ import annotations

import inspect

import store.errors
from store.errors import InvalidInput, MoepagerError

CLASSES = {
    name: cls
    for name, cls in inspect.getmembers(store.errors, inspect.isclass)
    if issubclass(cls, MoepagerError) and cls is not MoepagerError
}


def test_every_error_has_a_code_of_its_own_and_an_http_status() -> None:
    assert len({cls.code for cls in CLASSES.values()}) == len(CLASSES)
    assert all(400 <= cls.status < 600 for cls in CLASSES.values())


def test_the_tree_in_the_docstring_has_every_direct_child_with_its_status() -> None:
    tree = store.errors.__doc__ or ""
    lines = {line.split()[1]: int(line.split()[2]) for line in tree.splitlines() if line.startswith(("├─", "└─"))}
    assert lines == {name: cls.status for name, cls in CLASSES.items() if MoepagerError in cls.__bases__}


def test_bad_input_names_its_parameter() -> None:
    error = InvalidInput("too long", param="prompt", code="context_length_exceeded")
    assert (str(error), error.param, error.code, error.status) == ("too long", "prompt", "context_length_exceeded", 400)
    assert InvalidInput("x").code == "invalid_request"
