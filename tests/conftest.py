"""What more than one room's tests share: a real browser, and pages that tell every error that they saw."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect

from demo.browser import open_browser
from store.errors import NotFound

expect.set_options(timeout=30_000)  # ms: a busy machine is no failure


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """For one module: while it is open, nothing else in this thread can run an event loop."""
    try:
        opened = open_browser()
        with opened as browser:
            yield browser
    except NotFound as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the console of a service. In the end: no error in the page but those a test expects, no foreign request."""
    problems: list[str] = []
    contexts = []

    def open_page(url: str, expected: tuple[str, ...] = (), **options: Any) -> Page:
        def watch(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning") and not any(part in message.text for part in expected):
                problems.append(f"{message.type}: {message.text}")

        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", watch)
        page.on("pageerror", lambda error: problems.append(f"uncaught: {error}"))
        page.on("request", lambda request: request.url.startswith(url) or problems.append(f"foreign: {request.url}"))
        page.goto(f"{url}/console/")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []
