"""Settings from a file, variables and options. No service is opened."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import service.commands
from service.settings import PREFIX, Settings, apply_file, load_settings
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


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "service.env"


def test_a_file_sets_what_the_environment_does_not(file: Path) -> None:
    file.write_text(
        "# ours\nMOEPAGER_PORT=9000\n\nMOEPAGER_MODEL='/models/a b' # quoted\nMOEPAGER_HOST=0.0.0.0\nMOEPAGER_KEEP=\n"
    )
    environment = {"MOEPAGER_HOST": "127.0.0.1", "MOEPAGER_MODEL": ""}
    apply_file(file, environment)
    assert environment == {"MOEPAGER_HOST": "127.0.0.1", "MOEPAGER_PORT": "9000", "MOEPAGER_MODEL": "/models/a b"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\nMOEPAGER_MEMROY=2GiB", "line 2: No setting is named MOEPAGER_MEMROY. Did you mean MOEPAGER_MEMORY"),
        ("MOPAGER_PORT=1", "line 1: No setting is named MOPAGER_PORT. Did you mean MOEPAGER_PORT"),
        ("MOEPAGER_SETTINGS=other.env", "No setting is named MOEPAGER_SETTINGS"),
        ("MOEPAGER_PORT", "line 1: 'MOEPAGER_PORT' sets nothing"),
        ("MOEPAGER_PORT: 8000", "sets nothing"),
        ("MOEPAGER_PORT=1\nMOEPAGER_PORT=2", "line 2: MOEPAGER_PORT is set a second time"),
        ("MOEPAGER_MODEL='/models", "sets nothing"),
    ],
)
def test_a_file_with_a_mistake_is_refused_with_its_line_and_sets_nothing(file: Path, text: str, words: str) -> None:
    file.write_text(text)
    environment: dict[str, str] = {}
    with pytest.raises(InvalidInput, match=re.escape(words)):
        apply_file(file, environment)
    assert environment == {}


def test_a_file_that_is_not_there_is_refused(file: Path) -> None:
    with pytest.raises(InvalidInput, match=r"service\.env can't be read"):
        apply_file(file, {})


def test_the_example_is_such_a_file(file: Path) -> None:
    environment: dict[str, str] = {}
    apply_file(Path(__file__).parents[2] / "deploy" / "service.env.example", environment)
    assert environment["MOEPAGER_PORT"] == "8000"
    assert "MOEPAGER_MEMORY" not in environment


def test_every_command_reads_the_file(file: Path, tmp_path: Path) -> None:
    """By the command itself: the store that the file names is made, and the name it misspells is told."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "service", *words, "keys", "list"]
        return subprocess.run(command, env={**env, **more}, capture_output=True, text=True, check=False)

    file.write_text(f"MOEPAGER_STORE=sqlite:///{tmp_path / 'own.db'}\n")
    done = run("--settings", str(file))
    assert (done.returncode, "No keys" in done.stdout, (tmp_path / "own.db").exists()) == (0, True, True), done.stderr
    file.write_text("MOEPAGER_STROE=x\n")
    done = run(MOEPAGER_SETTINGS=str(file))
    assert done.returncode == 2
    assert "line 1: No setting is named MOEPAGER_STROE. Did you mean MOEPAGER_STORE?" in done.stderr
