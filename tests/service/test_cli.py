"""The command line: gathering rooms, exit codes, and the real program as a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from typer.testing import CliRunner

import service.cli
from service.cli import GROUP, gather
from service.settings import Settings
from store.errors import BudgetError, InvalidInput

ROOT = Path(__file__).parents[2]
SERVE = EntryPoint("serve", "service.commands:app", GROUP)

Run = Callable[..., subprocess.CompletedProcess[str]]


def environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MOEPAGER_", "OMP_WAIT"))}
    return kept | {"MOEPAGER_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture
def moepager(tmp_path: Path) -> Run:
    """The program as a process of its own."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "service", *arguments]
        env = environment(tmp_path) | variables
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120, check=False)

    return run


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """The commands in this process."""
    monkeypatch.setenv("MOEPAGER_HOME", str(tmp_path))
    return lambda *arguments: CliRunner().invoke(gather([SERVE]), [str(argument) for argument in arguments])


def test_a_misspelt_variable_is_refused_by_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEPAGER_MEMROY", "2GiB")
    flat = typer.Typer()
    flat.command("cook")(lambda: typer.echo("cooked"))
    monkeypatch.setattr(EntryPoint, "load", lambda _self: flat)
    result = CliRunner().invoke(gather([EntryPoint("flat", "x:flat", GROUP)]), ["cook"])
    assert isinstance(result.exception, InvalidInput)
    assert "Did you mean MOEPAGER_MEMORY" in str(result.exception)
    assert "cooked" not in result.stdout


def test_the_version_is_told_without_a_command(moepager: Run) -> None:
    done = moepager("--version")
    assert (done.returncode, done.stdout) == (0, metadata.version("moepager") + "\n")


def test_apps_without_a_name_add_to_the_top_and_named_ones_become_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    flat, group = typer.Typer(), typer.Typer(name="bench")
    flat.command("cook")(lambda: typer.echo("cooked"))
    flat.command("eat")(lambda: typer.echo("eaten"))
    group.command("load")(lambda: typer.echo("loaded"))
    group.command("unload")(lambda: typer.echo("unloaded"))
    apps = {"a": flat, "b": group}
    monkeypatch.setattr(EntryPoint, "load", lambda self: apps[self.name])
    root = gather([EntryPoint("b", "", GROUP), EntryPoint("a", "", GROUP)])
    assert CliRunner().invoke(root, ["cook"]).output == "cooked\n"
    assert CliRunner().invoke(root, ["bench", "load"]).output == "loaded\n"
    assert CliRunner().invoke(root, ["load"]).exit_code == 2


def test_every_room_of_the_distribution_brings_its_commands(moepager: Run) -> None:
    done = moepager("--help")
    assert done.returncode == 0
    assert {"serve", "plan", "doctor", "profile", "bench", "demo"} <= {
        line.split()[0] for line in done.stdout.splitlines() if line[:2] == "  " and line.strip()
    }


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, service.cli; sys.argv = ['moepager', '--help']\n"
        "try: service.cli.main()\n"
        "except SystemExit as end: assert end.code == 0, end\n"
        "heavy = {'torch', 'transformers', 'faiss', 'sqlalchemy', 'fastapi', 'uvicorn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [(BudgetError("Too small."), 2, "moepager: Too small.\n"), (KeyboardInterrupt(), 130, ""), (None, 0, "")],
)
def test_errors_become_one_message_and_an_exit_code(
    error: BaseException | None,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    app = typer.Typer()

    @app.command("run")
    def run() -> None:
        if error is not None:
            raise error

    app.command("other")(lambda: None)
    monkeypatch.setattr(service.cli, "entry_points", lambda group: [EntryPoint("x", "", group)])
    monkeypatch.setattr(EntryPoint, "load", lambda self: app)
    monkeypatch.setattr(sys, "argv", ["moepager", "run"])
    with pytest.raises(SystemExit) as end:
        service.cli.main()
    assert end.value.code == code
    assert capsys.readouterr().err == words


def test_a_plan_prices_every_task_before_anything_is_loaded(
    invoke: Callable[..., Any], half_settings: Settings, card: Any, doubt: str
) -> None:
    options = ["--model", half_settings.model, "--store", half_settings.store, "--memory", half_settings.memory]
    done = invoke("plan", *options, "--max-context", 256, "--max-batch", 4, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output.splitlines()[-1])
    assert {"dense_bytes", "kv_bytes", "slot_bytes", "slots_per_layer", "tasks"} <= found.keys()
    assert (found["slots_per_layer"], found["budget"]) == (4, half_settings.memory)
    tasks = {task["task"]: task for task in found["tasks"]}
    assert list(tasks) == ["cooking", "sql", "unproven"]
    cooking = tasks["cooking"]
    assert (cooking["keep"], cooking["scorer"], cooking["bytes"]) == (0.5, "reap", 12 * found["slot_bytes"])
    assert cooking["quality"] == pytest.approx(0.9 * 0.85)
    assert cooking["load_seconds"] == pytest.approx(12 * card.expert_bytes / found["disk_bytes_per_second"])
    assert [(size["keep"], size["fits"]) for size in cooking["sizes"]] == [(1.0, False), (0.5, True), (0.25, True)]
    assert (cooking["doubts"], tasks["sql"]["doubts"]) == ([], [doubt])
    assert cooking["trust"]["tokens_per_expert"] == 50
    assert (tasks["unproven"]["keep"], tasks["unproven"]["sizes"]) == (None, [])
    assert "no stored evaluation" in tasks["unproven"]["refusal"]


def test_a_plan_of_one_task_and_one_size(invoke: Callable[..., Any], half_settings: Settings, doubt: str) -> None:
    options = ["--model", half_settings.model, "--store", half_settings.store, "--task", "sql", "--keep", 0.25]
    done = invoke("plan", *options)
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.output.splitlines() if "(served)" in line] == ["sql"]
    assert "25.0%" in next(line for line in done.output.splitlines() if "(served)" in line)
    assert f"{'sql':<16} doubt: {doubt}" in done.output.splitlines()


def test_doctor_finds_a_healthy_set_up(
    invoke: Callable[..., Any], half_settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("MOEPAGER_PORT", "0")
    options = ["--model", half_settings.model, "--store", half_settings.store, "--embedder", "hash"]
    done = invoke("doctor", *options, "--index", tmp_path / "index", "--json")
    checks = {check["name"]: check for check in json.loads(done.output.splitlines()[-1])["checks"]}
    assert done.exit_code == 0, done.output
    assert all(set(check) == {"name", "ok", "detail"} and check["ok"] for check in checks.values())
    assert "6 exemplars" in checks["index"]["detail"]
    assert checks["kernel"]["detail"].startswith(("own (", "torch (")), checks["kernel"]
    assert "3 tasks have a profile of this model, 2 of them with evidence" in checks["profiles"]["detail"]


def test_doctor_goes_on_after_a_failing_check_and_exits_with_2(
    invoke: Callable[..., Any], half_settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("MOEPAGER_PORT", "0")
    (tmp_path / "bad.db").write_bytes(b"rubbish" * 1000)
    options = ["--model", half_settings.model, "--store", f"sqlite:///{tmp_path / 'bad.db'}", "--embedder", "hash"]
    done = invoke("doctor", *options, "--memory", "1MiB", "--json")
    checks = {check["name"]: check["ok"] for check in json.loads(done.output.splitlines()[-1])["checks"]}
    assert done.exit_code == 2
    assert [name for name, ok in checks.items() if ok] == [
        "python", "model", "kernel", "device", "jobs", "disk", "space", "embedder", "redis", "traces", "address"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "--model", "/no/such/folder"], "No model folder at /no/such/folder"),
        (["plan", "--model", "{model}", "--memory", "1MiB"], "Give --memory"),
        (["plan", "--model", "{model}", "--store", "{store}", "--task", "knitting"], "No task 'knitting'"),
        (["plan", "--model", "{model}", "--store", "sqlite:///{rubbish}"], "is damaged"),
        (["plan", "--model", "{pickled}"], "safetensors"),
        (["serve", "--model", "{dense}", "--port", "0"], "expert"),
        (["serve", "--model", "{model}", "--store", "{store}", "--memory", "2G"], "--memory: Not a size of memory"),
        (["serve", "--model", "{model}", "--store", "{store}", "--host", "203.0.113.9"], "Can't listen on 203.0.113.9"),
        (["serve", "--model", "{tokenless}", "--store", "{store}", "--port", "0", "--embedder", "hash"], "tokenizer"),
    ],
)
def test_what_a_person_can_put_right_is_one_message_and_exit_code_2(
    moepager: Run, model_folder: Path, store_url: str, tmp_path: Path, arguments: list[str], words: str
) -> None:
    places = {"model": str(model_folder), "store": store_url, **broken_places(model_folder, tmp_path)}
    done = moepager(*(argument.format(**places) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    [message] = [line for line in done.stderr.splitlines() if line.startswith("moepager: ")]
    assert words in message


def broken_places(model: Path, folder: Path) -> dict[str, str]:
    """A model of pickles, one without experts, one without a tokenizer, and a file that is no database."""
    config = json.loads((model / "config.json").read_text())
    for name in ("pickled", "dense", "tokenless"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    for name in ("model.safetensors", "generation_config.json"):
        (folder / "tokenless" / name).symlink_to(model / name)
    write_dense(folder / "dense" / "model.safetensors")
    (folder / "rubbish").write_bytes(b"rubbish" * 1000)
    return {name: str(folder / name) for name in ("pickled", "dense", "tokenless", "rubbish")}


def write_dense(file: Path) -> None:
    header = json.dumps(
        {"model.embed_tokens.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    ).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))


def test_a_misspelt_variable_stops_every_command(moepager: Run) -> None:
    done = moepager("serve", MOEPAGER_MEMROY="2GiB")
    assert done.returncode == 2
    assert "Did you mean MOEPAGER_MEMORY?" in done.stderr


@contextmanager
def served(home: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "service", "serve", "--port", "0", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment(home), cwd=home
    ) as process:
        try:
            assert process.stdout is not None
            printed = []
            for line in process.stdout:
                printed.append(line)
                if line.startswith("Listening on "):
                    break
            assert any("expert slots" in line for line in printed)
            yield process, printed[-1].split()[2].rstrip(";")
        finally:
            process.kill()


def test_serve_prints_its_plan_answers_and_ends_with_130_on_ctrl_c(
    tmp_path: Path, model_folder: Path, store_url: str
) -> None:
    arguments = ["--model", str(model_folder), "--store", store_url, "--embedder", "hash", "--keep", "0.25"]
    with served(tmp_path, *arguments) as (process, url):
        deadline = time.monotonic() + 60
        while httpx.get(f"{url}/readyz").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        answer = httpx.post(f"{url}/v1/query", json={"query": "how long do I boil an egg", "max_tokens": 4}).json()
        assert (answer["receipt"]["task"], answer["receipt"]["keep"]) == ("cooking", 0.25)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
