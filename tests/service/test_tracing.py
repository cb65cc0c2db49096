"""Spans of a real service at a real OTLP endpoint: what a request spent its time on, and no text."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from service.settings import Settings
from service.tracing import exporting
from store.errors import InvalidInput

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(BaseHTTPRequestHandler):
    spans: list[Span]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            import gzip

            body = gzip.decompress(body)
        request = ExportTraceServiceRequest.FromString(body)
        self.spans.extend(span for r in request.resource_spans for s in r.scope_spans for span in s.spans)
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Not on the tests' standard error."""


@contextmanager
def collecting() -> Iterator[tuple[str, list[Span]]]:
    spans: list[Span] = []
    handler = type("Handler", (Collector,), {"spans": spans})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
        server.shutdown()
        thread.join()


@contextmanager
def serving(settings: Settings, traces: str, folder: Path) -> Iterator[httpx.Client]:
    names = ("model", "store", "embedder", "memory", "max_context", "max_batch")
    options = [f"--{name.replace('_', '-')}={getattr(settings, name)}" for name in names]
    words = [sys.executable, "-m", "service", "serve", "--port=0", "--threads=1", f"--traces={traces}", *options]
    env = {**os.environ, "MOEPAGER_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env) as process:
        assert process.stdout is not None
        url = next(line.split()[2].rstrip(";") for line in process.stdout if line.startswith("Listening on "))
        try:
            with httpx.Client(base_url=url, timeout=60) as client:
                while client.get("/readyz").status_code != 200:
                    time.sleep(0.05)
                yield client
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.slow
def test_a_request_is_a_trace_from_its_callers_span_down_to_the_decoding(
    half_settings: Settings, tmp_path: Path
) -> None:
    with collecting() as (url, spans):
        with serving(half_settings, url, tmp_path) as client:
            header = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
            query = {"query": "how long do I boil an egg", "max_tokens": 3}
            receipt = client.post("/v1/query", json=query, headers=header).json()["receipt"]
            client.get("/healthz")
        found = {span.name: span for span in spans}  # sent at the latest when the service ended
    assert {"retrieve", "generate", "queue", "swap", "prefill", "decode"} <= found.keys()
    asked = next(span for name, span in found.items() if "/v1/query" in name)
    assert (asked.trace_id.hex(), asked.parent_span_id.hex()) == (TRACE, CALLER)
    assert not [name for name in found if "healthz" in name or "readyz" in name]
    assert found["retrieve"].parent_span_id == found["generate"].parent_span_id == asked.span_id
    for name in ("queue", "swap", "prefill", "decode"):
        span = found[name]
        assert span.parent_span_id == found["generate"].span_id
        assert asked.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
    said = {each.key: each.value for each in found["generate"].attributes}
    assert said["moepager.task"].string_value == receipt["task"] == "cooking"
    assert said["moepager.bytes_paged"].int_value == receipt["bytes_paged"] > 0
    assert not any("boil" in str(span) for span in found.values())


def test_traces_without_their_packages_are_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(InvalidInput, match=r"moepager\[traces\]"), exporting("http://127.0.0.1:1"):
        pass
