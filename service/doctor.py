"""`moepager doctor`: one check for each thing that a service needs, with its finding or, where it fails, the fix."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from engine.card import ModelCard
from engine.device import open_device
from engine.embedder import open_embedder
from engine.kernels import kernel_name
from engine.plan import plan_memory
from service.attempt import in_settings
from service.disk import measure_disk, show_access
from service.memory import available_memory
from service.model import engine_config, job_config
from service.parts import open_index
from service.serving import Catalogue
from service.settings import Settings
from store.database import Store, open_as_it_is
from store.errors import BudgetError, InvalidInput, MismatchError, MoepagerError, NotFound
from store.home import data_path
from store.sizes import parse_bytes, show_bytes

LEAST_SPACE = parse_bytes("256MiB")  # a store of ten tasks and a run's partial sums are far below


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
        "device": check_device,
        "memory": check_memory,
        "jobs": check_jobs,
        "disk": check_disk,
        "space": check_space,
        "store": check_store,
        "embedder": check_embedder,
        "index": check_index,
        "profiles": check_profiles,
        "redis": check_redis,
        "traces": check_traces,
        "address": check_address,
    }
    return [_run(name, check, settings) for name, check in checks.items()]


def _run(name: str, check: Callable[[Settings], str], settings: Settings) -> Check:
    try:
        return Check(name, True, check(settings))
    except MoepagerError as error:
        return Check(name, False, str(error))
    except Exception as error:  # a broken machine is what it looks for: files that are links to nowhere, no rights, ...
        said = f"{type(error).__name__}: {error}"
        return Check(name, False, f"The check itself broke off, as a service would: {said}. Mend what it names.")


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


def check_device(settings: Settings) -> str:
    return f"{open_device(settings.device)} is here"


def check_memory(settings: Settings) -> str:
    """Of the machine or container; a card's own is the plan's to bound. A job runs beside the service, if at all."""
    config = engine_config(settings)
    plan = plan_memory(ModelCard.read(config.model), config).total_bytes
    needed = plan if settings.device.startswith("cpu") else 0
    job = (settings.job_memory or plan) if settings.redis is None and settings.device.startswith("cpu") else 0
    free = available_memory()
    if free is None:
        return "this system does not say how much memory is available"
    if needed > free:
        raise BudgetError(
            f"The plan needs {show_bytes(needed)}, but {show_bytes(free)} are available. "
            "Lower --memory, or end other programs."
        )
    said = f"{show_bytes(free)} available, {show_bytes(needed)} planned"
    if needed + job <= free:
        return f"{said}, {show_bytes(job)} for a profiling job beside it" if job else said
    short = (
        f"{said}, and a profiling job started over REST takes {show_bytes(job)} beside that: too much by "
        f"{show_bytes(needed + job - free)}. Lower MOEPAGER_JOB_MEMORY, or give jobs to a worker (MOEPAGER_REDIS)."
    )
    if settings.job_memory is not None:
        raise BudgetError(short)
    return short


def check_jobs(settings: Settings) -> str:
    """Whether a profiling job started over REST could open the model at all in what it is given."""
    if settings.redis is not None:
        return "workers run them, in what they are given themselves"
    config = job_config(settings)
    try:
        plan = plan_memory(ModelCard.read(config.model), config)
    except BudgetError as error:
        said = in_settings(str(error))
        if settings.job_memory is not None:
            raise BudgetError(said) from error
        return f"none could run, which matters where somebody starts one. {said}"
    fit = f"{plan.slots_per_layer} of {plan.experts} experts a layer fit"
    return f"{fit} in a profiling job, which plans {show_bytes(plan.total_bytes)}"


def check_space(_settings: Settings) -> str:
    """Room for the embedded store and for unfinished runs."""
    folder = data_path()
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InvalidInput(f"The data folder {folder} can't be written: {there}. Set MOEPAGER_HOME to one that can.")
    free = shutil.disk_usage(there).free
    if free < LEAST_SPACE:
        raise InvalidInput(
            f"{show_bytes(free)} are free for {folder}; a store and its runs want {show_bytes(LEAST_SPACE)}. "
            "Make room, or set MOEPAGER_HOME to another disk."
        )
    return f"{show_bytes(free)} free for {folder}"


def check_address(settings: Settings) -> str:
    """Whether it can listen there, and whether all may then come who reach it."""
    where = f"{settings.host}:{settings.port}"
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((settings.host, settings.port))
        except OSError as error:
            raise InvalidInput(
                f"{where} can't be listened on: {error.strerror or error}. Set another MOEPAGER_PORT or MOEPAGER_HOST, "
                "or end what listens there; all is well if that is this very service."
            ) from error
    if settings.host in ("127.0.0.1", "::1", "localhost"):
        return f"{where} is free, and this machine's alone"
    keys = _of_store(settings, lambda store: f"{len(store.keys.list()) or 'no'} keys")
    if not keys[0].isdigit():
        raise InvalidInput(
            f"{where} is open to the network, and there are no keys: whoever reaches it may use all of it. "
            "`moepager keys create NAME --role operator`, or MOEPAGER_HOST=127.0.0.1."
        )
    return f"{where} is free, open to the network, with {keys}"


def check_traces(settings: Settings) -> str:
    if settings.traces is None:
        return "not used"
    if not all(map(importlib.util.find_spec, ("opentelemetry.sdk", "opentelemetry.exporter"))):
        raise InvalidInput("MOEPAGER_TRACES needs the extra `traces`: pip install 'moepager[traces]'.")
    return f"spans go to {settings.traces}"


def check_disk(settings: Settings) -> str:
    """Buffered reads are right, but slower and at the page cache's cost, so they are named."""
    speed = measure_disk(ModelCard.read(engine_config(settings).model))
    said = f"{show_bytes(speed.bytes_per_second)}/s, reading {show_bytes(speed.bytes)} of experts"
    return f"{said}, {show_access(speed.access)}"


def check_store(settings: Settings) -> str:
    said = "{}: opens, its schema is current, {} tasks"
    return _of_store(settings, lambda store: said.format(store.name, len(store.tasks.list())))


def _of_store(settings: Settings, tell: Callable[[Store], str]) -> str:
    """As it is: a look makes and migrates nothing. One that the first start will make is nothing wrong."""
    try:
        with open_as_it_is(settings.store) as store:
            return tell(store)
    except NotFound as error:
        return str(error)


def check_embedder(settings: Settings) -> str:
    embedder = open_embedder(settings.embedder)
    shape = embedder.embed(["a query"]).shape
    return f"{embedder.id}: {shape[1]} dimensions"


def check_index(settings: Settings) -> str:
    embedder = open_embedder(settings.embedder).id

    def compare(store: Store) -> str:
        index = open_index(settings.index, store, embedder)
        index.check(store.exemplars.list(embedder=embedder))
        return f"{len(index)} exemplars of {embedder} in {settings.index or 'memory'}, the same as in the store"

    return _of_store(settings, compare)


def check_profiles(settings: Settings) -> str:
    card = ModelCard.read(engine_config(settings).model)

    def count(store: Store) -> str:
        catalogue = Catalogue.read(store, card.hashes)
        if orphaned := catalogue.why_orphaned():
            raise MismatchError(orphaned)
        tasks = catalogue.tasks
        proven = [task for task in tasks.values() if task.candidates]
        return f"{len(tasks)} tasks have a profile of this model, {len(proven)} of them with evidence"

    return _of_store(settings, count)


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
