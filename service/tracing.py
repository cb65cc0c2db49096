"""What a request spent its time on, as OpenTelemetry spans: retrieve, then generate with queue, swap, prefill, decode.

The rest of the service speaks to OpenTelemetry's API, which does nothing until `exporting` gives it somewhere to send
to. Spans carry figures and names of tasks, never text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastapi.telemetry import TelemetryConfig
from opentelemetry import context, trace

from engine.requests import FinishedEvent
from store.errors import InvalidInput

if TYPE_CHECKING:
    from service.answer import Prepared

tracer = trace.get_tracer("moepager")
PROBES = ("/healthz", "/health", "/readyz", "/metrics")
MILLISECOND = 10**6  # in nanoseconds


class Trail:
    """The spans of one prompt, written when it has ended: the engine's own figures say when what happened."""

    def __init__(self) -> None:
        self._context = context.get_current()
        self._submitted = time.time_ns()

    def ended(self, prepared: Prepared, outcome: str, finished: FinishedEvent | None) -> None:
        span = tracer.start_span("generate", self._context, start_time=self._submitted)
        if not span.is_recording():  # nobody wants it
            return
        serving = prepared.serving
        said: dict[str, str | float] = {
            "moepager.task": serving.retrieval.task or "",
            "moepager.mode": serving.mode,
            "moepager.keep": serving.keep,
            "moepager.outcome": outcome,
            "gen_ai.request.model": prepared.model,
        }
        if finished is not None:
            said |= _figures(finished)
        span.set_attributes(said)
        if finished is not None:
            self._parts(trace.set_span_in_context(span), finished)
        span.end(time.time_ns())

    def _parts(self, parent: context.Context, finished: FinishedEvent) -> None:
        """Queue, swap, prefill and decode, one after the other; a swap that reads ahead of the prefill overlaps it."""
        served, now = finished.served, time.time_ns()
        admitted = self._submitted + round(served.queue_ms * MILLISECOND)
        first = self._submitted + round(served.ttft_ms * MILLISECOND)
        swapped = admitted + round(served.swap_ms * MILLISECOND)
        _span("queue", parent, self._submitted, admitted)
        if served.experts_paged:
            _span("swap", parent, admitted, swapped)
        if finished.completion_tokens:
            _span("prefill", parent, min(swapped, first), first)
            _span("decode", parent, first, max(first, now))


def _figures(finished: FinishedEvent) -> dict[str, str | float]:
    served = finished.served
    return {
        "moepager.coverage": served.coverage,
        "moepager.experts": served.experts,
        "moepager.experts_paged": served.experts_paged,
        "moepager.bytes_paged": served.bytes_paged,
        "moepager.ttft_ms": served.ttft_ms,
        "gen_ai.usage.input_tokens": finished.prompt_tokens,
        "gen_ai.usage.output_tokens": finished.completion_tokens,
    }


def _span(name: str, parent: context.Context, start: int, end: int) -> None:
    tracer.start_span(name, parent, start_time=start).end(end)


@contextmanager
def exporting(url: str | None) -> Iterator[None]:
    """Send spans to an OTLP endpoint over HTTP, in the background; what is left is sent at the end.

    Raises InvalidInput where the packages for it are not installed.
    """
    if url is None:
        yield
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError as error:
        raise InvalidInput(
            f"Traces need packages that are not installed ({error.name}): pip install 'moepager[traces]', or leave "
            "--traces out.",
            param="traces",
        ) from None
    provider = TracerProvider(resource=Resource.create({"service.name": "moepager"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=5)))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        provider.shutdown()


def flush() -> None:
    """Send what is left: a server that ends by a signal comes no further than the end of its application."""
    force: Callable[[], object] | None = getattr(trace.get_tracer_provider(), "force_flush", None)
    if force is not None:  # the API's own provider, which drops all, has none
        force()


def unseen(scope: MutableMapping[str, Any]) -> bool:
    """Whether a request makes no span: probes are asked every second, by nobody."""
    return scope.get("path") in PROBES


# FastAPI makes the span of a request itself, in the trace that its `traceparent` names. Its inner steps are no news,
# and what it would record of refused bodies may be anybody's text.
TELEMETRY: TelemetryConfig = {"operation_spans": False, "metrics": False, "logs": False, "exclude": unseen}
