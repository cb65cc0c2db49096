"""What a service counts, in Prometheus's form. Only this file and `live_metrics` import prometheus_client.

A registry a service, not the library's global one, so that two services in a process do not add up. Tasks are labels:
there are as many as are profiled, since a request can't name another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from engine.engine import Engine
from engine.requests import FinishedEvent
from engine.worker import EngineWorker, TokenStream
from service.live_metrics import LiveMetrics
from store.records import NO_TASK, JobTally, Mode

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
NO_MODE = "none"  # of queries that were refused before one was chosen
FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # seconds to the first token
EACH = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)  # seconds a further token
ESCALATED_AT = ("prompt", "answer")
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


class Metrics:
    def __init__(self, engine: Engine, worker: EngineWorker) -> None:
        self.registry = CollectorRegistry()
        self._of = cache(_labelled)  # asked ten times a query, always of the same few
        self._engine, self._worker = engine, worker
        of_task = ("task", "mode")
        self._requests = self._counter("requests", "Queries that ended, and how.", (*of_task, "outcome"))
        self._responses = self._counter("responses", "HTTP answers.", ("status",))
        self._escalations = self._counter(
            "escalations", "Queries of mode auto that were finished exactly, and where.", ("task", "at")
        )
        self._abstentions = self._counter("abstentions", "Queries that were near no task.")
        self._drifts = self._counter(
            "drift", "Alarms that a task's traffic is not what its profile was made of.", ("task",)
        )
        self._alone = self._counter(
            "rate_limits_alone", "Requests whose key's limit was counted by this process alone, for Redis was away."
        )
        self._tokens = self._counter("tokens", "Tokens read and written.", ("kind",))
        for kind in ("prompt", "completion"):
            self._tokens.labels(kind)
        self._swaps = self._counter("swaps", "Queries that had to wait for experts.", of_task)
        self._bytes = self._counter("bytes_paged", "Bytes of experts read for queries.", of_task)
        self._hits = self._counter("expert_hits", "Experts of a selection that were there already.", ("task",))
        self._misses = self._counter("expert_misses", "Experts of a selection that had to be paged in.", ("task",))
        self._choices = self._counter(
            "exact_choices", "Experts that the router chose in mode exact, for each token and layer.", ("task",)
        )
        self._exact_misses = self._counter("exact_misses", "Of these, those that had to be paged in.", ("task",))
        self._ttft = self._histogram("ttft_seconds", "From the queue to the first token.", FIRST, of_task)
        self._tpot = self._histogram("tpot_seconds", "For each further token.", EACH, of_task)
        self._swap = self._histogram("swap_seconds", "Waiting for experts.", FIRST, of_task)
        self._coverage = self._histogram("coverage", "Router weight inside the selection.", SHARES, ("task",))
        self._gauges()

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"moepager_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...]) -> Histogram:
        return Histogram(f"moepager_{name}", text, labels, buckets=buckets, registry=self.registry)

    def _gauges(self) -> None:
        """Read when they are asked for."""
        read: dict[str, tuple[str, Callable[[], float]]] = {
            "running": ("Queries that are decoded now.", lambda: self._worker.running),
            "slots": ("Slots for experts on the device.", lambda: self._engine.residency().slots),
            "slots_resident": ("Slots that hold an expert.", lambda: self._engine.residency().resident),
            "slots_leased": ("Slots that running queries hold.", lambda: self._engine.residency().leased),
            "hit_rate": ("Share of selected experts that were there already, since start.", self.hit_rate),
        }
        for name, (text, function) in read.items():
            Gauge(f"moepager_{name}", text, registry=self.registry).set_function(function)
        self._live = LiveMetrics(self._engine, self._worker)
        self.registry.register(self._live)
        ProcessCollector(registry=self.registry)  # memory, processor time, open files

    def hit_rate(self) -> float:
        """NaN until a selection was leased."""
        hits, misses = _sum(self._hits), _sum(self._misses)
        return hits / (hits + misses) if hits + misses else float("nan")

    def begin(self, tasks: Iterable[str]) -> None:
        """Counts of these tasks, and of no task, stand at 0 where nothing was counted yet.

        One that appeared with its first event would hide it, for a rate is a difference between two scrapes; and the
        first is what matters: a task's cold swap, an alarm.
        """
        named = frozenset(tasks)
        self._live.begin(named)
        for task in named:
            self._drifts.labels(task)
        for task in named | {NO_TASK}:
            for counter in (self._hits, self._misses, self._choices, self._exact_misses):
                counter.labels(task)
            for counter in (self._swaps, self._bytes):
                for mode in get_args(Mode):
                    counter.labels(task, mode)
            for at in ESCALATED_AT:
                self._escalations.labels(task, at)

    def submitted(self, stream: TokenStream, task: str | None) -> None:
        self._live.submitted(stream, task)

    def abstained(self) -> None:
        self._abstentions.inc()

    def drifted(self, task: str) -> None:
        self._of(self._drifts, task).inc()

    def answered(self, status: int) -> None:
        self._of(self._responses, str(status)).inc()

    def counted_alone(self) -> None:
        self._alone.inc()

    def ended(self, task: str | None, mode: str, outcome: str) -> None:
        self._of(self._requests, task or NO_TASK, mode, outcome).inc()

    def finished(self, task: str | None, finished: FinishedEvent, each: float | None) -> None:
        """What an answer cost; `each` is seconds for each further token, None where there was only one."""
        served, name = finished.served, task or NO_TASK
        self._of(self._tokens, "prompt").inc(finished.prompt_tokens)
        self._of(self._tokens, "completion").inc(finished.completion_tokens)
        self._of(self._bytes, name, served.mode).inc(served.bytes_paged)
        if served.experts_paged:
            self._of(self._swaps, name, served.mode).inc()
            self._of(self._swap, name, served.mode).observe(served.swap_ms / 1000)
        if finished.completion_tokens:
            self._of(self._ttft, name, served.mode).observe(served.ttft_ms / 1000)
        if each is not None:
            self._of(self._tpot, name, served.mode).observe(each)
        if served.escalated is not None:
            self._of(self._escalations, name, "answer" if served.escalated.at_token else "prompt").inc()
        elif served.mode != "exact":
            self._of(self._coverage, name).observe(served.coverage)
            self._of(self._hits, name).inc(max(0, served.experts - served.experts_paged))
            self._of(self._misses, name).inc(served.experts_paged)
        else:
            self._of(self._choices, name).inc(self._chosen(finished))
            self._of(self._exact_misses, name).inc(served.experts_paged)

    def _chosen(self, finished: FinishedEvent) -> int:
        """The last token is chosen, but goes through no layer any more."""
        card = self._engine.card
        tokens = finished.prompt_tokens + max(0, finished.completion_tokens - 1)
        return tokens * card.layers * card.top_k

    def text(self, jobs: JobTally | None = None, drained: bool = False, changed: int = 0) -> bytes:
        """`jobs` are None where the store can't be asked; `changed` of the model's files are not what was opened."""
        self._live.jobs, self._live.drained, self._live.changed = jobs, drained, changed
        return generate_latest(self.registry)


def _labelled(metric: Any, *labels: str) -> Any:
    return metric.labels(*labels)


def _sum(counter: Counter) -> float:
    return sum(one.value for metric in counter.collect() for one in metric.samples if one.name.endswith("_total"))
