"""What is only known at the moment when it is asked for: who waits, of which task, and what the engine has read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from weakref import WeakKeyDictionary

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.engine import Engine
from engine.worker import EngineWorker, TokenStream

NO_TASK = "none"


class LiveMetrics(Collector):
    def __init__(self, engine: Engine, worker: EngineWorker) -> None:
        self._engine, self._worker = engine, worker
        self._tasks: WeakKeyDictionary[TokenStream, str] = WeakKeyDictionary()
        self._seen = {NO_TASK}  # a task whose queue is empty again is a 0, not a gap

    def submitted(self, stream: TokenStream, task: str | None) -> None:
        self._tasks[stream] = task or NO_TASK
        self._seen.add(task or NO_TASK)

    def collect(self) -> Iterator[Metric]:
        queue = GaugeMetricFamily("moepager_queue_length", "Queries that wait.", labels=["task"])
        waiting = Counter(self._tasks.get(stream, NO_TASK) for stream in self._worker.queued())
        for task in sorted(self._seen):
            queue.add_metric([task], waiting[task])
        yield queue
        engine = self._engine.residency()
        yield CounterMetricFamily(
            "moepager_read_bytes",
            "Bytes of experts read since start, whoever wanted them and however the query ended.",
            value=engine.bytes_read,
        )
        yield CounterMetricFamily(
            "moepager_experts_paged", "Experts paged in since start, in every mode.", value=engine.experts_paged
        )
