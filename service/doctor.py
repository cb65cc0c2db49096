"""`moepager doctor`: one check for each thing that a service needs, with its finding or, where it fails, the fix."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.card import ModelCard
from engine.embedder import open_embedder
from engine.kernels import kernel_name
from engine.plan import plan_memory
from service.disk import measure_disk
from service.model import engine_config
from service.parts import open_index
from service.serving import Catalogue
from service.settings import Settings
from store.database import open_store
from store.errors import BudgetError, InvalidInput, MoepagerError
from store.sizes import show_bytes


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    ok: bool
    detail: str

    def json(self) -> dict[str, Any]:
        return asdict(self)


def examine(settings: Settings) -> list[Check]:
    """All checks, in the order in which a service would fail on them. A failing one does not stop the others."""
    checks: Mapping[str, Callable[[Settings], str]] = {
        "python": check_python,
        "threads": check_threads,
        "model": check_model,
        "kernel": check_kernel,
        "budget": check_budget,
        "memory": check_memory,
        "disk": check_disk,
        "store": check_store,
        "embedder": check_embedder,
        "index": check_index,
        "profiles": check_profiles,
        "redis": check_redis,
    }
    return [_run(name, check, settings) for name, check in checks.items()]


def _run(name: str, check: Callable[[Settings], str], settings: Settings) -> Check:
    try:
        return Check(name, True, check(settings))
    except MoepagerError as error:
        return Check(name, False, str(error))


def show_checks(checks: list[Check]) -> str:
    return "\n".join(f"{'ok' if check.ok else 'FAIL':>4}  {check.name:<10} {check.detail}" for check in checks)


def check_python(_settings: Settings) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "faiss-cpu"))
    return f"Python {platform.python_version()} on {platform.machine()}; {packages}"


def check_threads(settings: Settings) -> str:
    policy = os.environ.get("OMP_WAIT_POLICY", "unset")
    if policy.upper() != "PASSIVE":
        raise InvalidInput(
            f"OMP_WAIT_POLICY is {policy}: waiting threads spin, which slows a busy machine down many times. "
            "Set OMP_WAIT_POLICY=PASSIVE."
        )
    threads = settings.threads or os.environ.get("OMP_NUM_THREADS", "not limited")
    return f"{os.cpu_count()} processors, threads {threads}, OMP_WAIT_POLICY {policy}"


def check_model(settings: Settings) -> str:
    card = ModelCard.read(engine_config(settings).model)
    shape = f"{card.layers} MoE layers x {card.experts} experts of {show_bytes(card.expert_bytes)}"
    return f"{card.folder}: {card.family}, {shape}, fingerprint {card.fingerprint[:16]}"


def check_kernel(settings: Settings) -> str:
    """Who multiplies few rows; "own" where it can't be had fails, torch in its place does not, but is named."""
    config = engine_config(settings)
    dtype = ModelCard.read(config.model).geometry.dtype if config.dtype == "auto" else config.dtype
    return f"{kernel_name(config.kernel, dtype, config.device)} multiplies few rows, as in decoding"


def check_budget(settings: Settings) -> str:
    config = engine_config(settings)
    plan = plan_memory(ModelCard.read(config.model), config)
    return f"{plan.slots_per_layer} of {plan.experts} experts a layer fit; planned {show_bytes(plan.total_bytes)}"


def check_memory(settings: Settings) -> str:
    config = engine_config(settings)
    needed = plan_memory(ModelCard.read(config.model), config).total_bytes
    free = available_memory()
    if free is None:
        return "this system does not say how much memory is available"
    if needed > free:
        raise BudgetError(
            f"The plan needs {show_bytes(needed)}, but {show_bytes(free)} are available. "
            "Lower --memory, or end other programs."
        )
    return f"{show_bytes(free)} available, {show_bytes(needed)} planned"


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    if not meminfo.is_file():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def check_disk(settings: Settings) -> str:
    speed = measure_disk(sorted(engine_config(settings).model.glob("*.safetensors")))
    return f"{show_bytes(speed.bytes_per_second)}/s, reading {show_bytes(speed.bytes)} of the model itself"


def check_store(settings: Settings) -> str:
    with open_store(settings.store) as store:
        return f"{store.name}: opens, its schema is current, {len(store.tasks.list())} tasks"


def check_embedder(settings: Settings) -> str:
    embedder = open_embedder(settings.embedder)
    shape = embedder.embed(["a query"]).shape
    return f"{embedder.id}: {shape[1]} dimensions"


def check_index(settings: Settings) -> str:
    embedder = open_embedder(settings.embedder).id
    with open_store(settings.store) as store:
        index = open_index(settings.index, store, embedder)
        index.check(store.exemplars.list(embedder=embedder))
        where = settings.index or "memory"
        return f"{len(index)} exemplars of {embedder} in {where}, the same as in the store"


def check_profiles(settings: Settings) -> str:
    card = ModelCard.read(engine_config(settings).model)
    with open_store(settings.store) as store:
        tasks = Catalogue.read(store, card.fingerprint).tasks
    proven = [task for task in tasks.values() if task.candidates]
    return f"{len(tasks)} tasks have a profile of this model, {len(proven)} of them with evidence"


def check_redis(settings: Settings) -> str:
    if settings.redis is None:
        return "not used: the service runs its jobs itself"
    from service.job_queue import workers_of  # noqa: PLC0415 - torch comes along

    count = workers_of(settings.redis, ModelCard.read(engine_config(settings).model).fingerprint)
    if not count:
        raise MoepagerError(
            "It answers, but no worker waits for this model's jobs. Start `moepager worker` with the same --redis, "
            "--store and --model."
        )
    return f"{count} workers wait for this model's jobs"
