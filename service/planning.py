"""What a memory budget holds and what each task costs, before anything is loaded: the numbers of `moepager plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engine.card import ModelCard
from engine.plan import MemoryPlan, plan_memory
from service.disk import DiskSpeed, measure_disk
from service.model import engine_config
from service.price_tags import price_tag, smallest_as_good
from service.serving import Candidate, Catalogue, Policy, ProfiledTask, best_by_size, choose_candidate
from service.settings import Settings
from store.database import open_store
from store.errors import MoepagerError
from store.records import Price
from store.sizes import show_bytes


@dataclass(frozen=True, slots=True)
class TaskPlan:
    """A task under the budget: the selection that would serve it, or the reason why none would, and every size."""

    task: str
    serves: Candidate | None
    refusal: str | None
    sizes: tuple[Candidate, ...]
    profiled: ProfiledTask

    @property
    def prices(self) -> tuple[Price, ...]:
        return self.profiled.prices

    @property
    def as_good(self) -> Candidate | None:
        """A smaller size that the evidence can't tell from the one that serves, the smallest of them."""
        return smallest_as_good(self.serves, self.sizes, self.prices) if self.serves else None


@dataclass(frozen=True, slots=True)
class ModelPlan:
    card: ModelCard
    plan: MemoryPlan
    disk: DiskSpeed
    tasks: tuple[TaskPlan, ...]

    def load_seconds(self, candidate: Candidate) -> float:
        """Nothing is resident before loading, so every byte of the selection is missing."""
        return len(candidate.stored.selection) * self.card.expert_bytes / self.disk.bytes_per_second

    def size(self, candidate: Candidate, prices: Sequence[Price]) -> dict[str, Any]:
        evidence = candidate.evidence
        return {
            "keep": candidate.stored.keep,
            "scorer": candidate.stored.scorer,
            "stand_in": candidate.stored.stand_in,
            "active": candidate.stored.active,
            "calls": candidate.stored.selection.calls,
            "calls_by": candidate.stored.calls_by,
            "token_bytes": self.plan.token_bytes(candidate.stored.selection),
            "bytes": self.plan.bytes_of(candidate.stored.selection),
            "fits": self.plan.fits(candidate.stored.selection),
            "quality": evidence.retention,
            "accuracy": evidence.accuracy,
            "nll": evidence.nll,
            **asdict(price_tag(candidate, prices)),
            "load_seconds": self.load_seconds(candidate),
        }

    def task(self, each: TaskPlan) -> dict[str, Any]:
        sizes = [self.size(candidate, each.prices) for candidate in each.sizes]
        names = ("keep", "scorer", "bytes", "quality", "accuracy", "nll", "low", "high", "draws", "load_seconds")
        calls = ("active", "calls", "calls_by", "token_bytes")
        nothing = {**dict.fromkeys((*names, *calls, "stand_in", "others", "others_quality")), "fits": False}
        chosen = self.size(each.serves, each.prices) if each.serves else nothing
        as_good = each.as_good.stored.keep if each.as_good else None
        return {
            "task": each.task,
            **chosen,
            "refusal": each.refusal,
            "as_good_keep": as_good,
            **judgement(each.profiled),
            "sizes": sizes,
        }

    def json(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "model": str(self.card.folder),
            "family": self.card.family,
            **asdict(plan),
            "slots_per_layer": plan.slots_per_layer,
            "total_bytes": plan.total_bytes,
            "floor_bytes": plan.floor_bytes,
            "disk_bytes_per_second": self.disk.bytes_per_second,
            "disk_reads": self.disk.access.name,
            "tasks": [self.task(each) for each in self.tasks],
        }


def make_plan(settings: Settings, task: str | None = None) -> ModelPlan:
    """Reads headers, the store and half a second of the disk. Raises what serving would raise."""
    config = engine_config(settings)
    card = ModelCard.read(config.model)
    plan = plan_memory(card, config)
    with open_store(settings.store) as store:
        catalogue = Catalogue.read(store, card.hashes)
    wanted = catalogue.tasks.values() if task is None else [catalogue.named(task)]
    policy = Policy.of(settings, plan)
    tasks = tuple(plan_task(each, policy) for each in sorted(wanted, key=lambda each: each.name))
    return ModelPlan(card, plan, measure_disk(card), tasks)


def judgement(task: ProfiledTask) -> dict[str, Any]:
    """How far the task's profile can be trusted, as the profiler judged it; null and one doubt where nobody did."""
    return {"trust": None if task.trust is None else task.trust.figures, "doubts": list(task.doubts)}


def plan_task(task: ProfiledTask, policy: Policy) -> TaskPlan:
    shares = sorted({candidate.stored.active for candidate in task.candidates}, reverse=True)
    sizes = tuple(size for share in shares for size in best_by_size(task, policy.scorer, share))
    try:
        serves = choose_candidate(task, policy.keep, policy.scorer, policy)
        return TaskPlan(task.name, serves, None, sizes, task)
    except MoepagerError as error:
        return TaskPlan(task.name, None, str(error), sizes, task)


def show_memory(card: ModelCard, plan: MemoryPlan) -> str:
    """The memory plan as `serve` prints it before it loads."""
    budget = "no limit" if plan.budget is None else show_bytes(plan.budget)
    rows = [
        ("model", f"{card.folder} ({card.family})"),
        ("experts", f"{plan.layers} MoE layers x {plan.experts}, top {card.top_k}{_strips(card)}"),
        ("budget", f"{budget}; planned {show_bytes(plan.total_bytes)}, floor {show_bytes(plan.floor_bytes)}"),
        ("dense weights", f"{show_bytes(plan.dense_bytes)} in {plan.dtype}"),
        ("KV cache", f"{show_bytes(plan.kv_bytes)}: {plan.max_batch} rows x {plan.max_context} tokens"),
        *_states(plan),
        ("staging", f"{show_bytes(plan.staging_bytes)}, router copies {show_bytes(plan.router_bytes)}"),
        ("kernels", f"{show_bytes(plan.kernel_bytes)} of compiled code for {plan.dtype}"),
        ("workspace", f"{show_bytes(plan.workspace_bytes)}: {plan.chunk_tokens} tokens at once"),
        ("expert slots", f"{plan.slots} x {show_bytes(plan.slot_bytes)} = {_slots(plan)}"),
        ("", f"{plan.slots_per_layer} of {plan.experts} experts a layer ({plan.keep:.0%})"),
    ]
    return "\n".join(f"{name:>14}  {text}" for name, text in rows)


def _states(plan: MemoryPlan) -> list[tuple[str, str]]:
    """Where the model has any."""
    text = f"{show_bytes(plan.state_bytes)}: {plan.max_batch} rows, however long"
    return [("states", text)] if plan.state_bytes else []


def _slots(plan: MemoryPlan) -> str:
    """Their bytes, and what an expert's matrices are in them."""
    return f"{show_bytes(plan.slots * plan.slot_bytes)} in {plan.slots_in.upper() if plan.quantised else plan.dtype}"


def _strips(card: ModelCard) -> str:
    return "" if card.strips == 1 else f": {card.strips} strips of each of {card.experts // card.strips}"


def show_plan(found: ModelPlan) -> str:
    lines = [show_memory(found.card, found.plan), f"{'disk':>14}  {show_bytes(found.disk.bytes_per_second)}/s", ""]
    if not found.tasks:
        return "\n".join([*lines, "No task has a profile of this model yet: `moepager profile` makes one."])
    lines.append(
        f"{'task':<16} {'keep':>6} {'bytes':>11} {'keeps':>7} {'accuracy (95%)':>18} {'off task':>8} {'load':>8}"
    )
    return "\n".join([*lines, *(line for each in found.tasks for line in _task_lines(found, each))])


def _task_lines(found: ModelPlan, each: TaskPlan) -> Sequence[str]:
    lines = []
    for candidate in each.sizes:
        size = found.size(candidate, each.prices)
        mark = "served" if candidate == each.serves else "fits" if size["fits"] else "too big"
        way = f"{size['scorer']}{_calls(size)}"
        lines.append(
            f"{each.task:<16} {size['keep']:>6.1%} {show_bytes(size['bytes']):>11} {_percent(size['quality']):>7} "
            f"{_sure(size):>18} {_percent(size['others']):>8} {size['load_seconds']:>6.2f} s  {way} ({mark})"
        )
    if each.refusal:
        lines.append(f"{each.task:<16} {each.refusal}")
    if each.as_good:
        lines.append(
            f"{each.task:<16} {each.as_good.stored.keep:.1%} is as good, as far as these items and draws tell: its "
            "accuracy lies inside the interval of the size that serves."
        )
    return [*lines, *(f"{each.task:<16} doubt: {doubt}" for doubt in each.profiled.doubts)]


def _calls(size: dict[str, Any]) -> str:
    """Nothing where a token makes all of its calls."""
    if size["calls"] is None:
        return ""
    return f", {size['active']:.0%} of the calls by {size['calls_by']}: {show_bytes(size['token_bytes'])} a token"


def _sure(size: dict[str, Any]) -> str:
    if size["low"] is None:
        return f"nll {size['nll']:.3f}"
    return f"{size['accuracy']:.1%} ({size['low']:.0%}-{size['high']:.0%})"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
