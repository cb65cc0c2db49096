"""A headless Chromium that looks at the console, for tests and for the picture in the docs. Downloads none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from store.errors import NotFound

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (  # it speaks to this machine alone; and CI runs as root, where the sandbox refuses to work
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_chromium() -> str:
    """Path of the system's Chromium or Chrome. Raises NotFound where there is none."""
    for name in NAMES:
        path = shutil.which(name)
        if path is not None:
            return path
    raise NotFound(f"No Chromium on this machine (looked for {', '.join(NAMES)}). On Debian: apt-get install chromium.")


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Its event loop lives in this thread until the block ends: no other one can run here meanwhile."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - only development needs it

    path = find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(QUIET))
        try:
            yield browser
        finally:
            browser.close()
