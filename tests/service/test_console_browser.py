"""The console in a real headless Chromium, against a live server with a real engine on the tiny model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from fastapi import FastAPI
from playwright.sync_api import Page, expect

from service.app import create_app
from service.discovery import Discovery
from service.keys import KeyRing, make_key
from service.parts import Parts, reread
from service.serving import Catalogue
from store.database import open_store
from store.records import Event, Role

Visit = Callable[..., Page]
Live = Callable[[FastAPI], AbstractContextManager[str]]

EGG = "how long do I boil an egg"
SECTIONS = ("Playground", "Residency", "Tasks", "Jobs", "Plan", "Decisions", "Proposals", "API")
NAMES = ("beans", "kale", "leeks", "peas", "corn", "mint", "dill", "sage", "chard")
PLANTS = [f"when do I plant {name} in the garden" for name in NAMES]
HOSTILE = "<img src=x onerror=hacked=1><script>hacked=1</script>"


@pytest.fixture(scope="module")
def site(app: FastAPI, live: Live) -> Iterator[str]:
    with live(app) as url:
        yield url


def section(page: Page, name: str) -> None:
    page.get_by_role("navigation").get_by_role("link", name=name).click()
    expect(page.get_by_role("heading", level=1)).to_be_visible()


def ask(page: Page, text: str, tokens: int = 8) -> None:
    page.get_by_label("Most tokens").fill(str(tokens))
    page.get_by_label("Your question").fill(text)
    page.keyboard.press("Enter")


def answered(page: Page) -> None:
    expect(page.get_by_role("status").filter(visible=True)).to_contain_text("Answered")


def field(page: Page, name: str) -> str | None:
    return page.locator(f"[data-field={name}] dd").last.text_content()


def check_accessible(page: Page) -> None:
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_section_loads_cleanly_and_is_accessible(site: str, visit: Visit, scheme: str) -> None:
    page = visit(site, color_scheme=scheme)
    ask(page, EGG)
    answered(page)
    for name in SECTIONS:
        section(page, name)
        expect(page).to_have_title(f"{name} – moepager console")
        page.wait_for_load_state("networkidle")
        if name == "Tasks":
            page.get_by_role("link", name="cooking").click()
            expect(page.locator("svg.chart")).to_be_visible()
        check_accessible(page)
    section(page, "Tasks")
    page.get_by_role("link", name="New task").click()
    expect(page.get_by_label("Name")).to_be_focused()
    check_accessible(page)
    page.get_by_role("button", name="Key").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    check_accessible(page)


def test_the_apis_own_page_tells_every_route_and_a_call_to_copy(site: str, visit: Visit, app: FastAPI) -> None:
    page = visit(site)
    page.goto(f"{site}/docs")
    expect(page.get_by_role("heading", level=1, name="API")).to_be_visible()
    routes = [(method, path) for path, item in app.openapi()["paths"].items() for method in item]
    expect(page.get_by_text(f"{len(routes)} of {len(routes)} routes")).to_be_visible()
    above, below = (page.locator("main .card").filter(visible=True).nth(n).bounding_box() for n in range(2))
    assert above is not None
    assert below is not None
    assert below["y"] - above["y"] - above["height"] == pytest.approx(16, abs=1)  # cards stand apart, as on every page
    page.get_by_label("Find a route or a field").fill("prefetch")
    expect(page.locator("summary").filter(visible=True)).to_have_count(1)
    opened = page.locator("details").filter(has_text="/v1/residency/prefetch")
    expect(opened.locator("summary")).to_contain_text("for operators")
    opened.locator("summary").press("Enter")
    expect(opened.get_by_role("row", name="task")).to_contain_text("required")
    expect(opened.get_by_role("row", name="keep")).to_contain_text("number > 0 ≤ 1")
    check_accessible(page)
    page.get_by_label("Find a route or a field").fill("")
    page.evaluate("document.querySelectorAll('main details').forEach((each) => { each.open = true; })")
    expect(page.locator("main pre")).to_have_count(len(routes))
    calls = page.locator("main pre").all_text_contents()
    for method, path in routes:
        address = site + re.sub(r"{(\w+)}", lambda name: name[1].upper(), path)
        begin = f"curl {address}" if method == "get" else f"curl -X {method.upper()} {address}"
        assert any(call.startswith(f"{begin} ") for call in calls), begin
    call = page.locator("details").filter(has=page.get_by_text("/v1/query", exact=True)).locator("pre").text_content()
    body = json.loads(re.search(r"-d '(.*)'", call or "")[1])  # type: ignore[index]
    assert httpx.post(f"{site}/v1/query", json={**body, "max_tokens": 1}).status_code == 200


def test_decisions_are_shown_page_by_page_and_of_one_task(site: str, visit: Visit) -> None:
    body = {"model": "tiny:cooking", "messages": [{"role": "user", "content": EGG}], "max_tokens": 1}
    for _ in range(51):
        assert httpx.post(f"{site}/v1/chat/completions", json=body, timeout=60).status_code == 200
    ask_id = httpx.post(f"{site}/v1/query", json={"query": EGG, "max_tokens": 1}, timeout=60).headers["x-request-id"]
    page = visit(site)
    section(page, "Decisions")
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(50)
    expect(rows.first).to_contain_text(ask_id)
    expect(rows.first).to_contain_text("retrieved by the query")
    expect(rows.nth(1)).to_contain_text("named in the request")
    expect(page.get_by_role("button", name="Newer")).to_be_disabled()
    page.get_by_role("button", name="Older").press("Enter")
    expect(page.get_by_text("Page 2")).to_be_visible()
    expect(page.get_by_text(ask_id)).to_have_count(0)
    page.get_by_role("button", name="Newer").press("Enter")
    expect(rows.first).to_contain_text(ask_id)
    page.get_by_label("Only of the task").select_option("sql")
    expect(page.get_by_text("No query was given this task.").or_(rows.first)).to_be_visible()
    expect(page.locator("tbody").get_by_role("link", name="cooking")).to_have_count(0)


def test_on_a_small_screen_the_chart_is_as_wide_as_the_screen_and_its_words_are_as_large(
    site: str, visit: Visit
) -> None:
    page = visit(site, viewport={"width": 360, "height": 640})
    page.goto(f"{site}/console/#/tasks/cooking")
    expect(page.locator("svg.chart")).to_be_visible()
    assert page.evaluate("[...document.querySelectorAll('.scroll')].filter((one) => one.querySelector('.chart'))"
                         ".every((one) => one.scrollWidth <= one.clientWidth)")  # fmt: skip
    height = page.evaluate("document.querySelector('.chart text').getBoundingClientRect().height")
    assert height >= 11, height


def test_a_task_is_paged_in_from_its_page(site: str, visit: Visit) -> None:
    httpx.delete(f"{site}/v1/residency")
    page = visit(site)
    section(page, "Tasks")
    page.get_by_role("link", name="cooking").click()
    page.get_by_role("button", name="Page it in").click()
    expect(page.get_by_text("12 of its 12 experts were read")).to_be_visible()
    assert httpx.get(f"{site}/v1/residency").json()["resident"] == 12


def test_an_answer_streams_in_and_ends_with_its_receipt(site: str, visit: Visit) -> None:
    page = visit(site)
    page.evaluate(
        """() => {
            window.seen = new Set();
            new MutationObserver(() => window.seen.add(document.querySelector('.answer')?.textContent))
                .observe(document.body, { subtree: true, childList: true, characterData: true });
        }"""
    )
    ask(page, EGG, 24)
    answered(page)
    body = {"model": "tiny", "messages": [{"role": "user", "content": EGG}], "max_tokens": 24}
    plain = httpx.post(f"{site}/v1/chat/completions", json=body, timeout=60).json()
    assert page.locator(".answer").text_content() == plain["choices"][0]["message"]["content"]
    assert page.evaluate("seen.size") > 3  # it grew on the page, piece by piece
    receipt = plain["usage"]["expert"]
    assert field(page, "task") == receipt["task"] == "cooking"
    assert field(page, "similarity") == f"{receipt['similarity']:.3f}"
    assert (field(page, "mode"), field(page, "keep")) == ("mask", "50.0%")
    assert (field(page, "experts"), field(page, "completion_tokens")) == ("12", "24")
    assert "tokens/s" in (page.get_by_role("status").filter(visible=True).text_content() or "")
    assert page.locator(".receipt [data-field]").count() >= len(receipt)
    page.get_by_text("Candidates of the retrieval").click()
    expect(page.locator(".ranked li")).to_have_count(2)
    expect(page.locator(".ranked li").first).to_contain_text("cooking")


def test_what_is_chosen_is_what_is_asked_for(site: str, visit: Visit) -> None:
    page = visit(site)
    page.get_by_label("Task", exact=True).select_option(label="sql")
    page.get_by_label("Experts kept").select_option(label="25.0%")
    page.get_by_label("System message").fill("Be brief.")
    page.get_by_label("mask").check()
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, EGG, 4)
    answered(page)
    assert (field(page, "task"), field(page, "keep"), field(page, "reason")) == ("sql", "25.0%", "named in the request")
    body = sent.value.post_data_json
    session = body["expert"].pop("session")
    assert re.fullmatch("[0-9a-f]{32}", session)
    assert body["expert"] == {"task": "sql", "mode": "mask", "keep": 0.25}
    assert (body["max_tokens"], body["temperature"], body["messages"][0]["role"]) == (4, 0, "system")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "and for rice", 4)
    assert [m["role"] for m in sent.value.post_data_json["messages"]] == ["system", "user", "assistant", "user"]
    assert sent.value.post_data_json["expert"]["session"] == session
    expect(page.locator(".turn")).to_have_count(2)
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, EGG, 4)
    assert len(sent.value.post_data_json["messages"]) == 2
    assert sent.value.post_data_json["expert"]["session"] != session


def test_a_refusal_is_shown_in_the_services_own_words(site: str, visit: Visit) -> None:
    page = visit(site, expected=("status of 400",))
    page.get_by_label("exact").check()
    page.get_by_label("Experts kept").select_option(label="25.0%")
    ask(page, EGG)
    body = {"model": "tiny", "messages": [{"role": "user", "content": EGG}], "expert": {"mode": "exact", "keep": 0.25}}
    refused = httpx.post(f"{site}/v1/chat/completions", json=body).json()["error"]["message"]
    expect(page.get_by_role("alert").filter(visible=True)).to_have_text(refused)
    assert page.get_by_label("Your question").input_value() == EGG  # nothing typed is lost


def test_stop_ends_the_answer_and_the_request_in_the_engine(
    parts: Parts, worker: Any, live: Live, visit: Visit
) -> None:
    worker.text, worker.delay = "word " * 1000, 0.02
    with live(create_app(lambda: nullcontext(replace(parts, worker=worker)))) as url:
        page = visit(url)
        for stop in (lambda: page.get_by_role("button", name="Stop").click(), lambda: page.keyboard.press("Escape")):
            ask(page, EGG)
            expect(page.locator(".answer").last).to_contain_text("word")
            stop()
            expect(page.get_by_role("status").filter(visible=True)).to_contain_text("Stopped")
            assert worker.streams[-1].request.cancelled.wait(10)
            expect(page.get_by_role("button", name="Ask")).to_be_enabled()


def test_an_error_in_mid_stream_is_no_answer(scripted_app: FastAPI, worker: Any, live: Live, visit: Visit) -> None:
    worker.failure = RuntimeError("broken")
    with live(scripted_app) as url:
        page = visit(url)
        ask(page, EGG)
        expect(page.get_by_role("alert").filter(visible=True)).to_contain_text("failed on this request")


def test_what_comes_from_the_service_is_text_and_never_markup(
    parts: Parts, worker: Any, live: Live, visit: Visit
) -> None:
    worker.text = HOSTILE
    known = parts.catalogue.tasks["cooking"]
    named = replace(known, name=HOSTILE, description=HOSTILE)
    catalogue = Catalogue(parts.catalogue.model, {HOSTILE: named, "cooking": known})
    app = create_app(lambda: nullcontext(replace(parts, catalogue=catalogue, worker=worker)))
    with live(app) as url:
        page = visit(url, expected=("TrustedHTML",))
        page.get_by_label("Task", exact=True).select_option(label=HOSTILE)
        ask(page, HOSTILE)
        expect(page.locator(".answer")).to_have_text(HOSTILE)
        assert field(page, "task") == HOSTILE
        section(page, "Tasks")
        page.get_by_role("link", name=HOSTILE).click()
        expect(page.get_by_role("heading", name=HOSTILE)).to_be_visible()
        section(page, "Plan")
        expect(page.get_by_role("link", name=HOSTILE)).to_be_visible()
        section(page, "Residency")
        page.get_by_label("Coloured by").select_option(label=f"selection of {HOSTILE}")
        assert page.evaluate("typeof hacked") == "undefined"
        assert page.locator("img").count() == 1  # the sign in the corner
        blocked = "() => { try { document.body.innerHTML = '<b>x</b>'; return 'parsed'; } catch { return 'refused'; } }"
        assert page.evaluate(blocked) == "refused"


def test_keys_open_what_their_role_may_do(parts: Parts, live: Live, visit: Visit) -> None:
    made: dict[Role, Any] = {"query": make_key("reader", "query", None), "operator": make_key("boss", "operator", None)}
    ring = KeyRing([key for key, _ in made.values()])
    with live(create_app(lambda: nullcontext(replace(parts, keys=ring)))) as url:
        page = visit(url, expected=("status of 401",))
        dialog = page.get_by_role("dialog", name="API key")
        expect(page.get_by_role("alert").filter(visible=True)).to_contain_text("needs a key")
        dialog.get_by_label("Key").fill("nobody's")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert").filter(visible=True)).to_contain_text("Nobody knows this key")
        dialog.get_by_label("Key").fill(made["query"][1])
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Key: reader (query)")).to_be_visible()
        ask(page, EGG)
        answered(page)
        section(page, "Jobs")
        expect(page.get_by_text("Jobs are for operators")).to_be_visible()
        section(page, "Proposals")
        expect(page.get_by_text("Proposals are for operators")).to_be_visible()
        section(page, "Residency")
        expect(page.get_by_role("button", name="Evict what is idle")).to_be_disabled()
        section(page, "Tasks")
        expect(page.get_by_text("New tasks are made by operators")).to_be_visible()
        expect(page.get_by_role("link", name="New task")).to_be_hidden()
        assert page.evaluate("JSON.stringify(localStorage)") == "{}"
        assert made["query"][1] in page.evaluate("JSON.stringify(sessionStorage)")
        page.reload()
        expect(page.get_by_role("button", name="Key: reader (query)")).to_be_visible()
        page.get_by_role("button", name="Key: reader").click()
        dialog.get_by_label("Key").fill(made["operator"][1])
        page.keyboard.press("Enter")
        expect(page.get_by_role("link", name="New task")).to_be_visible()
        section(page, "Jobs")
        expect(page.get_by_text("No job yet")).to_be_visible()


def test_tasks_show_their_evidence_with_intervals_and_what_speaks_against_it(
    site: str, visit: Visit, doubt: str
) -> None:
    page = visit(site)
    section(page, "Tasks")
    page.get_by_role("link", name="cooking").click()
    evidence = page.get_by_role("table", name="Evidence")
    expect(evidence.locator("tbody tr")).to_have_count(12)  # four scorers at three sizes
    expect(evidence).to_contain_text("reap (serves)")
    expect(page.locator(".chart .point")).to_have_count(12)
    expect(page.locator(".chart .whisker")).to_have_count(12)
    expect(page.locator(".doubts")).to_contain_text("baseline random is as good")
    expect(page.locator(".doubts")).not_to_contain_text(doubt)
    expect(page.get_by_text("gave an expert 50 tokens on the average")).to_be_visible()
    page.get_by_role("link", name="sql").click()
    expect(page.locator(".doubts li").first).to_have_text(doubt)
    expect(page.get_by_role("table", name="All tasks").locator("tr", has_text="sql")).to_contain_text("in doubt")
    page.get_by_role("link", name="unproven").click()
    expect(page.get_by_text("no stored evaluation")).to_be_visible()
    page.get_by_role("link", name="stranger").click()
    expect(page.get_by_text("it has no profile of this model")).to_be_visible()


def test_the_map_is_the_residency_that_the_service_tells(site: str, visit: Visit) -> None:
    page = visit(site)
    page.get_by_label("Task", exact=True).select_option(label="sql")
    ask(page, EGG)
    answered(page)
    section(page, "Residency")
    truth = httpx.get(f"{site}/v1/residency?experts=true").json()
    legend = page.get_by_role("list", name="Legend")
    everything = sum(len(row) for row in truth["table"])
    expect(legend).to_contain_text(f"resident, idle: {truth['resident']}")
    expect(legend).to_contain_text(f"not resident: {everything - truth['resident']}")
    page.get_by_label("Coloured by").select_option(label="selection of sql")
    expect(legend).to_contain_text("in the selection and resident: 12")
    page.get_by_role("img", name="Map of the experts").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    slot = truth["table"][1][1]
    where = "not resident" if slot < 0 else f"slot {slot}"
    expect(page.locator(".cell")).to_contain_text(f"Layer 1, expert 1: {where}")
    page.get_by_label("Laid out as").select_option(label="slots of the bank")
    expect(legend).to_contain_text("in the selection and resident: 12")
    page.get_by_role("button", name="Evict what is idle").click()
    expect(legend).to_contain_text("in the selection, not resident: 12")


def test_the_map_repaints_only_what_changed_and_can_be_paused(site: str, visit: Visit) -> None:
    page = visit(site)
    section(page, "Residency")
    expect(page.get_by_role("list", name="Legend")).to_contain_text("not resident")
    page.evaluate(
        """() => {
            window.painted = 0;
            const whole = CanvasRenderingContext2D.prototype.clearRect;
            CanvasRenderingContext2D.prototype.clearRect = function (...a) { window.painted++; whole.apply(this, a); };
        }"""
    )
    for _ in range(2):
        with page.expect_response("**/v1/residency?experts=true"):
            pass
    assert page.evaluate("painted") == 0
    page.get_by_role("button", name="Pause").click()
    looks: list[str] = []
    page.on("request", lambda request: looks.append(request.url))
    page.wait_for_timeout(1500)
    assert len(looks) <= 1  # one may have been on its way
    page.get_by_role("button", name="Paused").click()
    with page.expect_response("**/v1/residency?experts=true"):
        pass


def test_a_plan_follows_the_slider_and_says_what_a_budget_is_too_small_for(site: str, visit: Visit) -> None:
    page = visit(site, expected=("status of 422",))
    section(page, "Plan")
    fits = page.get_by_role("table", name="What fits of each task")
    expect(fits.get_by_role("row", name=re.compile("cooking"))).to_contain_text("50.0%")
    page.get_by_role("slider").focus()
    page.keyboard.press("End")
    expect(fits.get_by_role("row", name=re.compile("cooking"))).to_contain_text("100.0%")
    page.keyboard.press("Home")
    expect(fits.get_by_role("row", name=re.compile("cooking"))).to_contain_text("25.0%")
    page.get_by_label("Memory", exact=True).fill("1KiB")
    page.keyboard.press("Enter")
    refused = httpx.get(f"{site}/v1/plan?memory=1KiB").json()["error"]["message"]
    expect(page.get_by_role("alert").filter(visible=True)).to_have_text(refused)
    expect(fits).to_have_count(0)


def test_no_section_scrolls_sideways_on_a_small_screen(site: str, visit: Visit) -> None:
    page = visit(site, viewport={"width": 360, "height": 640}, has_touch=True)
    ask(page, "a question without an end " + "and" * 30)
    answered(page)
    for name in SECTIONS:
        section(page, name)
        page.wait_for_load_state("networkidle")
        if name == "Tasks":
            page.get_by_role("link", name="cooking").click()
            expect(page.locator("svg.chart")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 360, name


def test_the_theme_is_the_systems_until_one_is_chosen(site: str, visit: Visit) -> None:
    page = visit(site, color_scheme="dark")
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    assert dark != light
    page.get_by_role("button", name="Theme: auto").click()
    page.get_by_role("button", name="Theme: light").click()
    expect(page.get_by_role("button", name="Theme: dark")).to_be_visible()
    assert page.evaluate(ground) == dark
    page.reload()
    assert page.evaluate(ground) == dark


def test_everything_can_be_reached_by_keyboard_alone(site: str, visit: Visit) -> None:
    page = visit(site)
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("main")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Your question")).to_be_focused()
    page.keyboard.type(EGG)
    page.keyboard.press("Enter")
    answered(page)
    for _ in range(40):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.textContent") == "Jobs":
            break
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    expect(page.get_by_role("main")).to_be_focused()
    page.get_by_role("button", name="Key").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.get_by_role("button", name="Key")).to_be_focused()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


@pytest.fixture
def own(parts: Parts, stock: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parts]:
    """The parts over a store and a data folder of the test's own; queries near no task are kept."""
    monkeypatch.setenv("MOEPAGER_HOME", str(tmp_path))
    url = f"sqlite:///{tmp_path / 'store.db'}"
    stock(url)
    update = {"store": url, "reload_seconds": 0.05, "job_memory": 2**30, "keep_unmatched": 30, "threshold": 0.5}
    settings, embedder = parts.settings.model_copy(update=update), parts.retriever.embedder
    with (
        open_store(url) as store,
        Discovery(store, settings, embedder, parts.metrics, parts.catalogue.model) as discovery,
    ):
        yield reread(replace(parts, settings=settings, store=store, discovery=discovery))


@pytest.fixture
def workshop(own: Parts) -> FastAPI:
    return create_app(lambda: nullcontext(own))


def test_a_proposal_becomes_a_task_without_what_was_unticked(
    workshop: FastAPI, own: Parts, live: Live, visit: Visit
) -> None:
    own.store.events.add(Event("drift", own.catalogue.model, "cooking", 0.4, 0.3, HOSTILE, datetime.now(UTC)))
    with live(workshop) as url:
        for text in [*PLANTS, HOSTILE]:
            httpx.post(f"{url}/v1/query", json={"query": text, "max_tokens": 1}, timeout=60).raise_for_status()
        page = visit(url)
        section(page, "Proposals")
        expect(page.get_by_role("table", name="Events")).to_contain_text(HOSTILE)
        expect(page.get_by_text("10 of at most 30 queries are kept")).to_be_visible()
        queries = page.get_by_role("list", name="Queries").get_by_role("checkbox")
        expect(queries).to_have_count(len(PLANTS))
        check_accessible(page)
        page.get_by_label(PLANTS[0]).uncheck()
        page.get_by_label("Name of the task").fill("garden")
        page.get_by_role("button", name="Make it a task").click()
        page.get_by_role("button", name="Cancel the job of garden").click()
        page.get_by_role("dialog").get_by_role("button", name="Cancel the job").click()
        expect(page.get_by_role("table", name="Jobs").locator("tbody tr")).to_contain_text("cancelled")
        assert sorted(own.store.corpora.get("garden").exemplars) == sorted(PLANTS[1:])
        section(page, "Proposals")
        expect(page.get_by_text("Nothing to propose")).to_be_visible()
        page.get_by_role("button", name="Forget all queries").click()
        page.get_by_role("dialog").get_by_role("button", name="Forget them").click()
        expect(page.get_by_role("button", name="Forget all queries")).to_be_disabled()
        assert own.store.unmatched.list() == []
        assert page.evaluate("typeof hacked") == "undefined"


def jsonl(items: list[dict[str, str]]) -> dict[str, Any]:
    text = "\n".join(json.dumps(item) for item in items)
    return {"name": "items.jsonl", "mimeType": "application/jsonl", "buffer": text.encode()}


@pytest.mark.slow
def test_a_task_is_made_profiled_watched_cancelled_and_deleted(workshop: FastAPI, live: Live, visit: Visit) -> None:
    with live(workshop) as url:
        page = visit(url, expected=("status of 409",))
        section(page, "Tasks")
        page.get_by_role("link", name="New task").click()
        page.get_by_label("Name").fill("garden")
        page.get_by_label("Exemplar queries").fill("when do I plant tomatoes\nwhen do I plant beans\n")
        page.get_by_label("Calibration file").set_input_files(
            {"name": "bad.jsonl", "mimeType": "text/plain", "buffer": b'{"prompt": "a"}\nno json\n'}
        )
        page.get_by_role("button", name="Create the task").click()
        expect(page.get_by_text("bad.jsonl, line 2: not JSON")).to_be_visible()
        items = [{"prompt": f"plant {n}", "response": f"in month {n}"} for n in range(4)]
        page.get_by_label("Calibration file").set_input_files(jsonl(items))
        held_out = [{"prompt": f"sow {n}", "response": f"in week {n}"} for n in range(3)]
        page.get_by_label("Evaluation file").set_input_files(jsonl(held_out))
        page.get_by_role("button", name="Create the task").click()
        jobs = page.get_by_role("table", name="Jobs")
        jobs.get_by_role("button", name="Cancel the job of garden").click()
        page.get_by_role("dialog").get_by_role("button", name="Cancel the job").click()
        expect(jobs.locator("tbody tr")).to_contain_text("cancelled")
        jobs.get_by_role("link", name="garden").click()
        page.get_by_role("button", name="Profile it").click()
        expect(jobs.locator("tbody tr").first).to_contain_text("done", timeout=120_000)
        expect(jobs.locator("tbody tr")).to_have_count(2)
        jobs.get_by_role("link", name="garden").first.click()
        expect(page.get_by_role("table", name="Evidence")).to_be_visible()
        page.get_by_role("button", name="Delete").click()
        page.get_by_role("dialog").get_by_role("button", name="Keep it").click()
        page.get_by_role("button", name="Delete").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete it").click()
        expect(page.get_by_role("link", name="garden")).to_have_count(0)
        assert httpx.get(f"{url}/v1/tasks").json()["without_profile"][0]["task"] == "stranger"
