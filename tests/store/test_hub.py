"""What `--model` may mean. The hub is never asked here: the environment keeps it offline."""

from __future__ import annotations

from pathlib import Path

import pytest

from store.errors import CheckpointError
from store.home import bundled_model
from store.hub import model_folder


def test_a_folder_is_itself_and_nothing_means_the_bundled_model(tmp_path: Path) -> None:
    assert model_folder(str(tmp_path)) == tmp_path
    assert model_folder(None) == bundled_model()


@pytest.mark.parametrize("name", ["missing-folder", "/no/such/folder", "a/b/c"])
def test_an_unknown_folder_is_refused_with_its_name(name: str) -> None:
    with pytest.raises(CheckpointError, match=name):
        model_folder(name)


def test_a_hub_id_that_is_neither_cached_nor_reachable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="nobody/nothing-at-all is neither a folder"):
        model_folder("nobody/nothing-at-all")


def test_a_hub_id_that_the_environment_forbids_to_fetch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE=0"):
        model_folder("nobody/no-such-model")
