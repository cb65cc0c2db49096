"""The files of deploy/: as far as this machine has the tools to check them, and said where it has not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.attempt import KILL_SECONDS
from service.draining import LAST_WORDS_SECONDS
from service.settings import PREFIX, Settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return parsed


def compose_client() -> list[str] | None:
    """`docker compose` where the client has the plugin, else the older docker-compose."""
    docker, older = shutil.which("docker"), shutil.which("docker-compose")
    if docker and not subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        return [docker, "compose"]
    return [older] if older else None


def test_the_compose_client_accepts_the_files() -> None:
    client = compose_client()
    if client is None:
        pytest.skip("neither `docker compose` nor docker-compose is here: hand-written rules alone check compose.yaml")
    env = {**os.environ, "POSTGRES_PASSWORD": "x"}
    merged = []
    for files in (["compose.yaml"], ["compose.yaml", "compose.cuda.yaml"]):
        named = [word for file in files for word in ("-f", str(DEPLOY / file))]
        command = [*client, *named, "--profile", "redis", "config"]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 0, done.stderr
        merged.append(yaml.safe_load(done.stdout)["services"])
    plain, cuda = merged
    for name in ("moepager", "worker"):
        assert "deploy" not in plain[name]
        [device] = cuda[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        assert cuda[name]["build"]["target"] == "cuda"
        assert cuda[name]["environment"]["MOEPAGER_DEVICE"] == "cuda:0"
        assert cuda[name]["environment"]["MOEPAGER_HOST"] == "0.0.0.0"
        assert plain[name]["environment"].keys() >= {PREFIX + field.upper() for field in Settings.model_fields}


def test_the_compose_file_names_only_what_there_is(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert {"moepager", "worker", "postgres", "redis"} == services.keys()
    for service in services.values():
        for volume in service.get("volumes", ()):
            name = volume.split(":")[0]
            assert name in compose["volumes"] or name.startswith(("$", ".")), volume
        assert set(service.get("depends_on", ())) <= services.keys()
    build = services["moepager"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == (DEPLOY / "Dockerfile").resolve()


def test_the_port_is_open_to_this_machine_only(compose: dict[str, Any]) -> None:
    assert all(port.startswith("127.0.0.1:") for port in compose["services"]["moepager"]["ports"])
    assert not any("ports" in compose["services"][name] for name in ("postgres", "redis"))


def test_settings_that_the_files_name_are_settings(compose: dict[str, Any]) -> None:
    known = {"MOEPAGER_HOME", *(PREFIX + name.upper() for name in Settings.model_fields)}
    for name in ("moepager", "worker"):
        assert compose["services"][name]["environment"].keys() <= {*known, "HF_HUB_OFFLINE"}
    set_there = set(re.findall(r"\b(MOEPAGER_[A-Z_]+)=", (DEPLOY / "Dockerfile").read_text()))
    assert set_there
    assert set_there <= known


def test_the_image_has_both_targets_and_no_rights() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
    names = [re.match(r"\S+ AS (\w+)", stage)[1] for stage in stages]  # type: ignore[index]
    assert names == ["base", "cpu", "cuda"]
    for stage in stages[1:]:
        assert stage.index("USER moepager") < stage.index("ENTRYPOINT")
    for path in re.findall(r"^COPY (\S+) ", text, re.MULTILINE):
        assert (ROOT / path).exists()
    pinned = re.findall(r"torch==([\d.]+)", text)
    assert set(pinned) == set(re.findall(r"torch==([\d.]+)", (ROOT / "Makefile").read_text()))


def test_the_image_has_the_extras_that_settings_and_commands_promise() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = re.findall(r"'\.\[([\w,]+)\]'", (DEPLOY / "Dockerfile").read_text())
    assert len(installed) == 2
    for each in installed:
        assert {"minilm", "plots", "traces"} <= set(each.split(",")) <= extras.keys()


def test_the_image_looks_after_its_health_at_the_port_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    [words] = re.findall(r"^HEALTHCHECK .*?CMD (\[.*\])$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    server = HTTPServer(("127.0.0.1", 0), Healthy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MOEPAGER_PORT", str(server.server_port))
    done = subprocess.run([sys.executable, *json.loads(words)[1:]], capture_output=True, text=True, check=False)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr


def test_what_the_service_writes_is_its_owners_alone() -> None:
    unit = (DEPLOY / "moepager.service").read_text().splitlines()
    assert {"UMask=0077", "StateDirectoryMode=0700"} <= set(unit)
    assert "install -d -m 700 -o moepager /data" in (DEPLOY / "Dockerfile").read_text()


def test_nothing_of_a_developers_folder_comes_into_the_image() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert {".git", ".venv*", ".hypothesis", "**/*.so"} <= set(ignored)


def test_the_unit_is_accepted_by_systemd(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    text = (DEPLOY / "moepager.service").read_text()
    assert {"[Unit]", "[Service]", "[Install]"} <= set(text.splitlines())
    if analyze is None:
        pytest.skip("no systemd-analyze here: the unit's sections are checked, not its words")
    unit = tmp_path / "moepager.service"
    unit.write_text(text.replace("/opt/moepager/.venv/bin/moepager", "/bin/true"))
    done = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True, check=False)
    assert "Unknown" not in done.stderr, done.stderr


def test_who_stops_the_service_waits_for_its_grace_its_last_words_and_its_job(compose: dict[str, Any]) -> None:
    needed = Settings(model="x").grace_seconds + LAST_WORDS_SECONDS + KILL_SECONDS
    unit = re.search(r"^TimeoutStopSec=(\d+)$", (DEPLOY / "moepager.service").read_text(), re.MULTILINE)
    assert unit is not None
    assert int(unit[1]) > needed
    for name in ("moepager", "worker"):
        assert int(compose["services"][name]["stop_grace_period"].removesuffix("s")) > needed


def test_the_page_for_operators_names_every_setting_metric_board_and_file() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    for name in Settings.model_fields:
        assert PREFIX + name.upper() in page, name
    for file in DEPLOY.iterdir():
        if not file.name.endswith(".dockerignore"):
            assert file.name in page, file.name
