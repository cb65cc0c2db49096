"""Config and tokenizer files that change under a running service: it serves on, says so, and its jobs notice."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from waiting import wait_for

from engine.card import ModelCard
from service.app import create_app
from service.doctor import check_profiles
from service.papers_watch import PapersWatch
from service.parts import Parts, open_parts
from service.settings import Settings
from store.errors import MismatchError
from store.papers import Papers


@pytest.fixture
def folder(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the model's files, which the parts take for those that they were opened from."""
    copied = Path(shutil.copytree(parts.folder, tmp_path / "model"))
    checkpoint = replace(parts.engine.checkpoint, papers=Papers.read(copied))
    monkeypatch.setattr(parts.engine, "checkpoint", checkpoint)
    return copied


@pytest.fixture
def running(parts: Parts, folder: Path) -> Iterator[TestClient]:
    own = replace(parts, settings=parts.settings.model_copy(update={"reload_seconds": 0.02}))
    with TestClient(create_app(lambda: nullcontext(own))) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        yield client


def files_changed(client: TestClient) -> float:
    [line] = [text for text in client.get("/metrics").text.splitlines() if text.startswith("moepager_model_files")]
    return float(line.split()[-1])


def test_a_change_is_told_and_served_through_until_the_old_files_are_back(
    running: TestClient, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "moepager.service")
    body = {"query": "how long do I boil an egg", "max_tokens": 4}
    before = running.post("/v1/query", json=body).json()["answer"]
    assert files_changed(running) == 0
    kept = {name: (folder / name).read_bytes() for name in ("tokenizer.json", "config.json")}
    for name in kept:
        (folder / name).write_text("{}")
    wait_for(lambda: files_changed(running) == 2)
    warnings = [line for line in caplog.messages if "changed since the model was opened" in line]
    assert any(line.startswith("config.json, tokenizer.json in ") for line in warnings)
    assert running.post("/v1/query", json=body).json()["answer"] == before
    assert running.get("/readyz").status_code == 200
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    wait_for(lambda: files_changed(running) == 0)
    assert "say again what they said" in caplog.messages[-1]


def test_contents_are_read_again_only_where_a_file_looks_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    papers, watch, read = Papers.read(folder), PapersWatch(), []
    changed = Papers.changed

    def counted(papers: Papers) -> tuple[str, ...]:
        read.append(papers)
        return changed(papers)

    monkeypatch.setattr(Papers, "changed", counted)
    for _ in range(3):
        watch.look(papers)
    assert len(read) == 1
    (folder / "chat_template.jinja").write_text("another")
    for _ in range(3):
        watch.look(papers)
    assert len(read) == 2
    assert watch.changed == ("chat_template.jinja",)


def test_a_start_with_another_tokenizer_says_which_tasks_are_not_served_and_why(
    stock: Callable[[str], None],
    half_settings: Settings,
    card: ModelCard,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    stock(url)
    copied = Path(shutil.copytree(card.folder, tmp_path / "tiny"))
    settings = half_settings.model_copy(update={"store": url, "model": str(copied)})
    assert "3 tasks have a profile" in check_profiles(settings)
    said = json.loads((copied / "tokenizer_config.json").read_text())
    (copied / "tokenizer_config.json").write_text(json.dumps(said | {"add_bos_token": True}))
    why = "The model's tokenizer changed since cooking, sql, unproven were profiled"
    with pytest.raises(MismatchError, match=why):
        check_profiles(settings)
    with open_parts(settings) as parts:
        assert not parts.catalogue.tasks
        assert any(line.startswith(why) for line in caplog.messages)
        with pytest.raises(MismatchError, match="the same weights with another tokenizer"):
            parts.catalogue.named("sql")
