"""The dashboard in a real browser, at the widths of a phone and a desk, in light and in dark."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from coordinator.web.app import make_app
from coordinator.web.server import WebServer

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
PLAYWRIGHT = importlib.util.find_spec("playwright") and importlib.util.find_spec(
    "axe_playwright_python"
)
pytestmark = [
    pytest.mark.skipif(not Path(CHROMIUM).exists(),
                       reason="Chromium is not installed (Debian: apt install chromium)"),
    pytest.mark.skipif(not PLAYWRIGHT,
                       reason="playwright and axe-playwright-python are not installed"),
]  # fmt: skip
PAGES = ("/", "/devices/laptop", "/rounds", "/rounds/5", "/fairness", "/compression", "/screening")
PHONE, DESK = (390, 844), (1280, 800)
VIOLATIONS = {"resultTypes": ["violations"]}
NEXT_REFRESH_MS = 3100
# Counts shifts whatever caused them; installed before the page's first line.
WATCH_SHIFTS = """
window.shifted = 0;
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) window.shifted += entry.value;
}).observe({ type: "layout-shift", buffered: true });
"""


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def site(make_run):
    """A served run whose clock and progress a test may move."""
    run = make_run()
    facts = SimpleNamespace(now=run.read())
    server = WebServer(make_app(lambda: facts.now), "127.0.0.1:0")
    yield SimpleNamespace(address=server.start(), facts=facts)
    server.stop()


def open_page(browser, site, size, scheme="light", script=""):
    """A page that notes complaints of the console, failures, and requests to elsewhere."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce"
    )
    context.set_default_timeout(10_000)
    if script:
        context.add_init_script(script)
    page, wrong = context.new_page(), []
    page.on("console", lambda m: m.type in ("error", "warning") and wrong.append(m.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "requestfailed",
        lambda r: wrong.append(f"{r.url} {r.failure}") if r.failure != "net::ERR_ABORTED" else None,
    )  # by leaving the page
    page.on("request", lambda r: r.url.startswith(site.address) or wrong.append(f"{r.url} asked"))
    page.on("response", lambda r: r.status >= 400 and wrong.append(f"{r.url} {r.status}"))
    return page, wrong


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("size", "scheme", "looked_at"),
    [
        pytest.param(PHONE, "light", ("/", "/devices/laptop", "/fairness"), id="phone-light"),
        pytest.param(DESK, "dark", PAGES[:1], id="desk-dark"),
        pytest.param(PHONE, "light", PAGES, id="phone-light-thoroughly", marks=slow),
        pytest.param(PHONE, "dark", PAGES, id="phone-dark", marks=slow),
        pytest.param(DESK, "light", PAGES, id="desk-light", marks=slow),
        pytest.param(DESK, "dark", PAGES, id="desk-dark-thoroughly", marks=slow),
    ],
)
def test_every_page_is_sound(browser, site, size, scheme, looked_at):
    """looked_at: pages that axe examines, which takes a second each."""
    from axe_playwright_python.sync_playwright import Axe

    axe, found = Axe(), []
    page, wrong = open_page(browser, site, size, scheme)
    for path in PAGES:
        page.goto(site.address + path)
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        if wide > 0:
            found.append(f"{path}: {wide} px wider than the screen")
        if path not in looked_at:
            continue
        for violation in axe.run(page, options=VIOLATIONS).response["violations"]:
            where = [node["html"][:120] for node in violation["nodes"][:2]]
            found.append(f"{path}: {violation['id']}: {where}")
    page.context.close()
    assert not found + wrong, "\n".join(found + wrong)


def test_a_refresh_shows_what_is_new_and_moves_nothing(browser, site):
    page, wrong = open_page(browser, site, DESK, script=WATCH_SHIFTS)
    page.clock.install()
    page.goto(site.address)
    page.locator("tbody a").nth(3).focus()
    page.evaluate("scrollTo(0, 200)")
    page.evaluate("document.getElementById('main').kept = true")
    live, now = site.facts.now.live, site.facts.now
    state = replace(live.state, arrived=live.state.arrived | {"laptop"})
    site.facts.now = replace(now, at=now.at + 7, live=replace(live, state=state))
    page.clock.run_for(NEXT_REFRESH_MS)
    page.get_by_text("2 of 6 devices done, 1 failed; it closes in 28 s").wait_for()
    assert page.evaluate("document.getElementById('main').kept") is True
    assert page.evaluate("document.activeElement.textContent") == "lab-board"
    assert page.evaluate("scrollY") == 200
    assert page.evaluate("window.shifted") < 0.001
    assert page.locator("#said").text_content() == ""  # a step forward is not spoken
    merging = replace(state, phase="merging")
    site.facts.now = replace(site.facts.now, live=replace(live, state=merging))
    page.clock.run_for(NEXT_REFRESH_MS)
    page.locator("#said").get_by_text("Merging round 6.").wait_for(state="attached")
    assert not wrong
    page.context.close()


def test_a_coordinator_that_is_gone_is_said_and_the_page_stays(browser, make_run):
    run = make_run()
    server = WebServer(make_app(run.read), "127.0.0.1:0")
    address = server.start()
    page, _ = open_page(browser, SimpleNamespace(address=address), DESK)
    page.clock.install()
    page.goto(address)
    server.stop()
    page.clock.run_for(NEXT_REFRESH_MS)
    page.get_by_text("no longer up to date").wait_for()
    assert page.get_by_role("link", name="laptop").is_visible()
    page.context.close()


def test_every_link_is_reached_by_keyboard_in_the_order_of_the_page(browser, site):
    page, _ = open_page(browser, site, PHONE)
    page.goto(site.address)
    wanted = page.eval_on_selector_all("a", "all => all.map((a) => a.textContent.trim())")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = []
    for _ in range(len(wanted) + 10):
        tag, words, outline = page.evaluate(
            "(() => { const e = document.activeElement, s = getComputedStyle(e);"
            " return [e.tagName, e.textContent.trim(), s.outlineStyle]; })()"
        )
        if tag == "BODY":
            break
        assert outline != "none", words  # focus can be seen
        if tag == "A":
            reached.append(words)
        page.keyboard.press("Tab")
    assert reached == wanted
    page.goto(site.address)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.context.close()


def test_pages_are_complete_without_javascript(browser, site):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(site.address)
    assert page.get_by_role("row").count() == 9
    page.get_by_role("link", name="Fairness", exact=True).click()
    assert page.get_by_role("heading", name="Fairness", level=1).is_visible()
    context.close()


def test_a_page_asks_again_only_while_it_is_to_be_kept_up_to_date(browser, site):
    page, _ = open_page(browser, site, DESK)
    asked = []
    page.clock.install()
    page.goto(site.address)
    page.on("request", lambda r: r.url.endswith("/") and asked.append(r.url))
    with page.expect_response(site.address + "/"):
        page.clock.run_for(NEXT_REFRESH_MS)
    assert len(asked) == 1
    page.locator("#live").uncheck()
    page.clock.run_for(10 * NEXT_REFRESH_MS)
    page.wait_for_timeout(50)
    assert len(asked) == 1
    page.context.close()
