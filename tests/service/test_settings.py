"""Settings from variables and options. Pure: no service is opened."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import service.commands
from service.settings import PREFIX, Settings, load_settings
from store.errors import InvalidInput


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(PREFIX + name.upper(), raising=False)


def test_defaults_listen_on_this_machine_only() -> None:
    settings = load_settings()
    assert (settings.host, settings.port, settings.model, settings.memory) == ("127.0.0.1", 8000, None, None)
    assert (settings.unknown_task, settings.embedder, settings.keep) == ("exact", "minilm", None)


def test_a_variable_sets_and_an_option_wins_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEPAGER_MEMORY", "512MiB")
    monkeypatch.setenv("MOEPAGER_PORT", "9000")
    monkeypatch.setenv("MOEPAGER_INDEX", "/some/folder")
    settings = load_settings(port=9001, host=None)
    assert (settings.memory, settings.port, settings.index) == (2**29, 9001, Path("/some/folder"))
    assert settings.host == "127.0.0.1"


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEPAGER_MEMORY", "")
    assert load_settings().memory is None


@pytest.mark.parametrize(
    ("wrong", "right"), [("MOEPAGER_MEMROY", "MOEPAGER_MEMORY"), ("moepager_unknown_tasks", "MOEPAGER_UNKNOWN_TASK")]
)
def test_a_misspelt_variable_is_refused_with_the_nearest_right_name(
    wrong: str, right: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(wrong, "1GiB")
    with pytest.raises(InvalidInput, match=f"{wrong}. Did you mean {right}"):
        load_settings()


def test_the_home_variable_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOEPAGER_HOME", str(tmp_path))
    assert load_settings() == Settings.model_construct()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("memory", "2G", "--memory: Not a size of memory: '2G'"),
        ("port", 70000, "--port"),
        ("keep", 1.5, "--keep"),
        ("threshold", 2.0, "--threshold"),
        ("unknown_task", "guess", "--unknown-task"),
        ("max_batch", 0, "--max-batch"),
    ],
)
def test_a_bad_option_is_refused_by_its_name(name: str, value: object, words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        load_settings(**{name: value})
    assert words in str(caught.value)
    assert caught.value.param == name


def test_a_bad_variable_is_refused_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEPAGER_QUEUE_SIZE", "many")
    with pytest.raises(InvalidInput, match=r"MOEPAGER_QUEUE_SIZE: .* \(got 'many'\)"):
        load_settings()


def test_the_example_of_an_environment_has_every_setting_with_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    example = Path(__file__).parents[2] / "deploy" / "service.env.example"
    lines = [line for line in example.read_text().splitlines() if line and not line.startswith("#")]
    given = dict(line.split("=", 1) for line in lines)
    assert given.keys() == {"MOEPAGER_HOME", *(PREFIX + name.upper() for name in Settings.model_fields)}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert load_settings() == Settings.model_construct()


def test_every_setting_is_an_option_of_serve() -> None:
    options = inspect.signature(service.commands.serve).parameters
    assert options.keys() == Settings.model_fields.keys()
