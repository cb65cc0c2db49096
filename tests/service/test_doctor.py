"""What the doctor finds wrong, and that it changes nothing by looking."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import service.doctor
from engine.card import ModelCard
from engine.plan import plan_memory
from service.doctor import (
    Check,
    check_address,
    check_device,
    check_jobs,
    check_memory,
    check_space,
    check_store,
    examine,
)
from service.memory import available_memory
from service.model import engine_config
from service.settings import Settings
from store.database import open_store
from store.errors import BudgetError, InvalidInput

GIB = 1024**3


@pytest.fixture
def settings(half_settings: Settings) -> Settings:
    return half_settings


@dataclass
class Machine:
    """A machine's own files: 16 GiB free, and a control group below another one."""

    folder: Path

    def meminfo(self) -> Path:
        file = self.folder / "meminfo"
        file.write_text(f"MemTotal: 1 kB\nMemAvailable: {16 * GIB // 1024} kB\n")
        return file

    def group(self, line: str, folder: str, names: tuple[str, str], most: object) -> int | None:
        own = self.folder / "cgroup" / folder
        own.mkdir(parents=True)
        for name, value in zip((*names, "memory.stat"), (most, 3 * GIB, f"anon 1\ninactive_file {GIB}"), strict=True):
            (own / name).write_text(f"{value}\n")
        (self.folder / "groups").write_text(f"{line}\n")
        return available_memory(self.meminfo(), self.folder / "groups", self.folder / "cgroup")


V1, V2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")


@pytest.mark.parametrize(
    ("line", "folder", "names", "most", "left"),
    [
        ("0::/a/b", "a/b", V2, 4 * GIB, 2 * GIB),
        ("0::/a/b", "a", V2, 4 * GIB, 2 * GIB),  # of the group above
        ("0::/", ".", V2, 4 * GIB, 2 * GIB),  # in a container
        ("0::/a", "a", V2, "max", 16 * GIB),
        ("5:cpu,memory:/a", "memory/a", V1, 4 * GIB, 2 * GIB),
        ("5:memory:/of/the/host", "memory", V1, 4 * GIB, 2 * GIB),
        ("5:memory:/a", "memory/a", V1, 2**63 - 4096, 16 * GIB),  # how version 1 says that there is none
    ],
)
def test_a_containers_limit_is_less_than_the_machine_has(
    tmp_path: Path, line: str, folder: str, names: tuple[str, str], most: object, left: int
) -> None:
    assert Machine(tmp_path).group(line, folder, names, most) == left


def test_a_job_is_added_to_the_service(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine_config(settings)
    needed = plan_memory(ModelCard.read(config.model), config).total_bytes
    monkeypatch.setattr(service.doctor, "available_memory", lambda: needed + 1000)
    assert "Lower MOEPAGER_JOB_MEMORY" in check_memory(settings)  # only where somebody starts a job
    with pytest.raises(BudgetError, match="MOEPAGER_JOB_MEMORY"):
        check_memory(settings.model_copy(update={"job_memory": 1001}))
    assert "beside it" in check_memory(settings.model_copy(update={"job_memory": 1000}))
    monkeypatch.setattr(service.doctor, "available_memory", lambda: needed - 1)
    with pytest.raises(BudgetError, match="Lower --memory"):
        check_memory(settings)


def test_memory_in_which_no_job_could_run_is_found_with_how_much_it_would_take(settings: Settings) -> None:
    assert "fit in a profiling job" in check_jobs(settings)
    small = settings.model_copy(update={"job_memory": 1000})
    with pytest.raises(BudgetError, match="Give MOEPAGER_JOB_MEMORY") as refused:
        check_jobs(small)
    [least] = re.findall(r"MOEPAGER_JOB_MEMORY (\d+)MiB", str(refused.value))
    assert "fit in" in check_jobs(settings.model_copy(update={"job_memory": int(least) << 20}))
    assert not found(small)["jobs"].ok
    as_little = settings.model_copy(update={"memory": 1000, "job_memory": None})
    assert "none could run" in check_jobs(as_little)  # matters only where somebody starts one
    assert "Give MOEPAGER_JOB_MEMORY" in check_jobs(as_little)
    assert "workers" in check_jobs(small.model_copy(update={"redis": "redis://localhost"}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda:0", "nonsense"])
def test_a_device_that_is_not_here_is_found(settings: Settings, device: str) -> None:
    with pytest.raises(InvalidInput, match="can't run on device"):
        check_device(settings.model_copy(update={"device": device}))
    assert check_device(settings) == "cpu is here"


def found(settings: Settings) -> dict[str, Check]:
    return {check.name: check for check in examine(settings)}


def test_what_breaks_a_check_off_is_a_finding(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in Path(str(settings.model)).iterdir():
        (model / file.name).symlink_to(tmp_path / "gone" if file.suffix == ".safetensors" else file.resolve())
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOEPAGER_HOME", str(tmp_path / "file" / "home"))
    checks = found(settings.model_copy(update={"model": str(model), "store": None, "port": 0}))
    assert not any(checks[name].ok for name in ("model", "space"))
    assert all(check.detail for check in checks.values())


def test_a_data_folder_that_is_full_is_found(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEPAGER_HOME", str(tmp_path / "not" / "made"))
    assert "free for" in check_space(settings)
    monkeypatch.setattr(service.doctor, "LEAST_SPACE", 2**62)
    with pytest.raises(InvalidInput, match="Make room"):
        check_space(settings)
    assert not (tmp_path / "not").exists()


def test_a_port_in_use_and_an_open_door_are_found(settings: Settings, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'own.db'}"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = settings.model_copy(update={"port": taken.getsockname()[1]})
        with pytest.raises(InvalidInput, match="can't be listened on"):
            check_address(busy)
    public = settings.model_copy(update={"host": "0.0.0.0", "port": 0, "store": url})
    for _ in range(2):  # without a store, and with an empty one
        with pytest.raises(InvalidInput, match="moepager keys create"):
            check_address(public)
        open_store(url).close()


def test_a_look_neither_makes_nor_migrates_a_store(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'own.db'}"
    mine = settings.model_copy(update={"store": url})
    assert "makes it" in check_store(mine)
    assert list(tmp_path.iterdir()) == []
    open_store(url).close()
    assert "0 tasks" in check_store(mine)
    monkeypatch.setattr("store.revision.HEAD", "9999")
    assert "migrates it" in check_store(mine)
    monkeypatch.setattr("store.revision.HEAD", "0001")
    assert not found(mine)["store"].ok
