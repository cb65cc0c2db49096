"""What is known only at the moment when it is asked for: who waits, of which task, what the engine read, and jobs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from weakref import WeakKeyDictionary

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.engine import Engine
from engine.worker import EngineWorker, TokenStream
from store.records import NO_TASK, JobTally


class LiveMetrics(Collector):
    def __init__(self, engine: Engine, worker: EngineWorker) -> None:
        self._engine, self._worker = engine, worker
        self._tasks: WeakKeyDictionary[TokenStream, str] = WeakKeyDictionary()
        self.jobs: JobTally | None = None  # None: the store is away, and nobody knows
        self.drained = False
        self.changed = 0  # of the model's files
        self._seen = {NO_TASK}  # a task whose queue is empty again is a 0, not a gap

    def begin(self, tasks: Iterable[str]) -> None:
        """Their queues are told from now on."""
        self._seen.update(tasks)

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
        yield GaugeMetricFamily("moepager_drained", "1 while an operator has drained this process.", value=self.drained)
        yield GaugeMetricFamily(
            "moepager_model_files_changed",
            "Config and tokenizer files that say something else than when the model was opened.",
            value=self.changed,
        )
        yield from self._of_jobs()

    def _of_jobs(self) -> Iterator[Metric]:
        jobs = GaugeMetricFamily("moepager_jobs", "Profiling jobs of this model in the store.", labels=["state"])
        oldest = GaugeMetricFamily(
            "moepager_jobs_oldest_seconds", "Since the oldest job that has not ended was asked for."
        )
        if self.jobs is not None:
            for state, count in self.jobs.counts.items():
                jobs.add_metric([state], count)
            oldest.add_metric([], self.jobs.oldest_seconds)
        yield jobs
        yield oldest
