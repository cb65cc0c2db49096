"""The console of a real service on the bundled model, in a real browser: right answers, and who served them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from demo.commands import memory_for
from demo.corpus import read_pairs
from demo.tour import serving
from store.home import bundled_model


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_question_is_answered_by_the_experts_of_its_task(
    demo_run: dict[str, Any], demo_store: str, tmp_path: Path, visit: Callable[..., Page]
) -> None:
    with serving(demo_store, memory_for(bundled_model(), 0.25), tmp_path / "serve.log") as client:
        page = visit(str(client.base_url))
        page.get_by_label("Send the earlier turns along").uncheck()  # this model has never seen a second turn
        for number, query in enumerate(demo_run["queries"][:4]):
            page.get_by_label("Your question").fill(read_pairs(query["task"], "test")[0].prompt)
            page.keyboard.press("Enter")
            turn = page.get_by_role("article").nth(number)
            expect(turn.locator("[data-field=task] dd")).to_have_text(query["retrieved"], timeout=60_000)
            expect(turn.locator(".answer")).to_have_text(query["answer"].strip())
            expect(turn.locator("[data-field=keep] dd")).to_have_text("25.0%")
        page.get_by_role("link", name="Residency").click()
        page.get_by_label("Coloured by").select_option(label=f"selection of {demo_run['queries'][3]['task']}")
        legend = page.get_by_role("list", name="Legend")
        expect(legend).to_contain_text("in the selection, not resident: 0")
        page.context.close()  # before its service: the residency map asks once a second
