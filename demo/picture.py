"""The console's picture in the docs: a real service on the bundled model, asked in a real browser."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from demo.browser import open_browser
from demo.tour import serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDTH = 1280
HEIGHTS = (800, 650)  # of the playground, and of the map below it
QUESTIONS = ("What is 7 plus 5?", "Translate into French: the green house")
TASK = "french"  # whose selection the map shows


def take_picture(store_url: str, memory: int, out: Path) -> None:
    """An answer with its receipt, and what was resident then."""
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(store_url, memory, Path(folder) / "serve.log") as client,
        open_browser() as browser,
    ):
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHTS[0]}, color_scheme="light")
        page.goto(f"{client.base_url}/console/")
        for question in QUESTIONS:
            ask(page, question)
        shots = [page.screenshot()]
        page.set_viewport_size({"width": WIDTH, "height": HEIGHTS[1]})
        page.get_by_role("link", name="Residency").click()
        page.get_by_label("Coloured by").select_option(label=f"selection of {TASK}")
        page.get_by_text("in the selection and resident").wait_for()
        shots.append(page.screenshot())
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(stacked(browser, shots))


def ask(page: Page, question: str) -> None:
    """Each question alone: the bundled model has never seen a second turn."""
    page.get_by_role("button", name="New conversation").click()
    page.get_by_label("Your question").fill(question)
    page.keyboard.press("Enter")
    page.get_by_text("Answered: ").wait_for()
    page.get_by_role("heading", name="Playground").click()  # away from the field, whose frame would catch the eye


def stacked(browser: Browser, shots: Sequence[bytes]) -> bytes:
    """One picture under the other, by the browser that took them."""
    page = browser.new_page(viewport={"width": WIDTH, "height": sum(HEIGHTS) + 12})
    images = "".join(
        f'<img src="data:image/png;base64,{base64.b64encode(shot).decode()}" style="display:block;margin-bottom:12px">'
        for shot in shots
    )
    page.set_content(f'<body style="margin:0;background:#888">{images}</body>')
    return page.screenshot()
