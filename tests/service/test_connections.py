"""Clients that send half a request, read nothing, or come in crowds, against a real server."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from waiting import wait_for

import service.connections
from service.app import create_app
from service.connections import connections_of

Live = Callable[..., AbstractContextManager[str]]


@pytest.fixture
def url(scripted_app: FastAPI, live: Live) -> Iterator[str]:
    with live(scripted_app, http=connections_of(4)) as found:
        yield found


def opened(url: str, **options: int) -> socket.socket:
    parts = urlsplit(url)
    raw = socket.socket()
    for name, value in options.items():
        raw.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    raw.settimeout(10)
    raw.connect((parts.hostname, parts.port))
    return raw


def head(length: int) -> bytes:
    lines = [
        "POST /v1/query HTTP/1.1",
        "host: localhost",
        "content-type: application/json",
        f"content-length: {length}",
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def test_a_body_that_does_not_end_is_a_408_and_holds_up_no_drain(parts: Any, live: Live) -> None:
    app = create_app(lambda: nullcontext(parts), body_seconds=1.5)
    with live(app) as url, opened(url) as raw:
        raw.sendall(head(100) + b'{"query": ')
        wait_for(lambda: httpx.get(f"{url}/v1/drain").json()["under_way"] == 1)
        httpx.post(f"{url}/v1/drain")
        answer = raw.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"1.5 s" in answer + raw.recv(4096)
        wait_for(lambda: httpx.get(f"{url}/v1/drain").json()["under_way"] == 0, 2)
        assert raw.recv(4096) == b""  # closed: what else comes of it is no request


@pytest.mark.parametrize("begin", [b"", b"POST /v1/query HTTP/1.1\r\nhost: he"])
def test_half_a_head_is_closed(url: str, monkeypatch: pytest.MonkeyPatch, begin: bytes) -> None:
    monkeypatch.setattr(service.connections, "ASK_SECONDS", 0.3)
    with opened(url) as raw:
        raw.sendall(begin)
        started = time.monotonic()
        assert raw.recv(10) == b""
        assert 0.1 < time.monotonic() - started < 3


def test_a_connection_that_asked_in_time_is_kept(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.connections, "ASK_SECONDS", 0.3)
    with httpx.Client(base_url=url) as client:
        for _ in range(3):
            stream = client.get("/v1/models").extensions["network_stream"]
            time.sleep(0.2)
        first = stream.get_extra_info("client_addr")
        time.sleep(0.4)
        assert client.get("/v1/models").extensions["network_stream"].get_extra_info("client_addr") == first


def test_more_connections_than_may_be_are_told_so_and_probes_answered(url: str) -> None:
    with ExitStack() as stack:
        crowd = [stack.enter_context(opened(url)) for _ in range(4)]
        wait_for(lambda: httpx.get(f"{url}/v1/models").status_code == 503)
        refused = httpx.get(f"{url}/v1/models")
        assert (refused.json()["error"]["code"], refused.headers["retry-after"]) == ("busy", "1")
        assert "MOEPAGER_CONNECTIONS" in refused.json()["error"]["message"]
        assert httpx.get(f"{url}/healthz").status_code == 200
        for one in crowd:
            one.close()
        wait_for(lambda: httpx.get(f"{url}/v1/models").status_code == 200, 5)


def test_of_a_flood_nothing_is_read(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.connections, "SPARE", 0)
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(opened(url))
        with pytest.raises(httpx.TransportError):
            wait_for(lambda: httpx.get(f"{url}/healthz").status_code != 200, 5)


def test_an_answer_that_nobody_reads_ends(
    url: str, scripted_app: FastAPI, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.connections, "READ_SECONDS", 2.0)
    worker.text = "x" * 100_000
    body = b'{"query": "how long do I boil an egg", "stream": true, "max_tokens": 200}'
    with opened(url, SO_RCVBUF=4096) as raw:
        raw.sendall(head(len(body)) + body)
        wait_for(lambda: scripted_app.state.draining.asked == 1, 5)
        wait_for(lambda: scripted_app.state.draining.asked == 0, 30)
