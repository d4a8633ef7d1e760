"""Pages of `gpmetric report` in a headless Chromium, if the machine has one: no request, no error, and for everyone."""

from __future__ import annotations

import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gpmetric import report
from gpmetric.reporting.live import LiveServer, Served
from tests.report_inputs import HOSTILE, RESULTS, changed, make_ledger

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
]
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the dev extra has it)")
Show = Callable[..., Any]
CASES = ["ledger", "hostile", *RESULTS]
PAGES = 6  # that a print may have


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of every kind of result, of a campaign of 5,000 candidates, and of one with hostile names."""
    folder = tmp_path_factory.mktemp("pages")
    sources = dict(RESULTS)
    sources["ledger"] = make_ledger(folder / "a.sqlite", 5000)
    sources["hostile"] = changed(RESULTS["tune"], folder / "hostile.json", HOSTILE)
    for name, source in sources.items():
        report(source, output=folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in sources}


@pytest.fixture
def show(browser: Any, made: dict[str, Path]) -> Iterator[Show]:
    """Opens a page; at the end, nothing but the file was asked for, and nothing was wrong."""
    asked: list[str] = []
    wrong: list[str] = []
    contexts = []

    def opened(name: str, width: int = 1280, theme: str = "light", **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto(made[name].as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []
    assert {one for one in asked if not one.startswith("data:")} <= {path.as_uri() for path in made.values()}
    assert len([one for one in asked if not one.startswith("data:")]) == len(contexts)


@pytest.mark.every(2)
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_asked_for_and_nothing_is_wrong(name: str, show: Show) -> None:
    page = show(name)
    assert page.locator("h1").inner_text()
    page.wait_for_timeout(50)


@pytest.mark.every(2)
@pytest.mark.parametrize("name", CASES)
def test_a_phone_scrolls_down_only(name: str, show: Show) -> None:
    page = show(name, width=375)
    assert page.evaluate("document.documentElement.scrollWidth") == 375


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("name", "theme"),
    [*((name, "light") for name in CASES), *((name, "dark") for name in ("ledger", "slim", "allocate"))],
)
def test_no_serious_finding_of_axe(name: str, theme: str, show: Show) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = show(name, theme=theme, bypass_csp=True)  # axe is another script than the page's own
    found = axe.Axe().run(page).response["violations"]
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    assert not serious, [(one["id"], [node["html"][:200] for node in one["nodes"][:3]]) for one in serious]


@pytest.mark.every(2)
@pytest.mark.parametrize("name", CASES)
def test_a_print_has_few_pages(name: str, show: Show) -> None:
    page = show(name, width=688)  # the width of A4 between its margins, in pixels
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= 688
    printed = page.pdf(format="A4")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= PAGES


def test_the_theme_is_switched_and_kept(show: Show) -> None:
    page = show("discover", theme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.locator("#theme").press("Enter")
    light = page.evaluate(ground)
    assert light != dark
    assert page.locator("#theme").inner_text() == "Dark"


def test_search_and_sort_by_keyboard(show: Show) -> None:
    page = show("ledger")
    rows = page.locator("#candidate-rows tbody tr")
    assert rows.count() == 20  # of 5,000
    assert page.locator("#found").inner_text() == "5,000 of 5,000 candidates"
    page.locator("#search").focus()
    page.keyboard.type("layer:abs(W)")
    assert rows.count() == 1
    assert page.locator("#found").inner_text() == "1 of 5,000 candidates"
    page.locator("#search").fill("")
    page.keyboard.press("Tab")  # the region that scrolls
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "formula"
    for _ in range(3):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    head = page.locator("#candidate-rows th[aria-sort]")
    assert (head.inner_text().strip(), head.get_attribute("aria-sort")) == ("nodes", "ascending")
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    page.locator("#more").press("Enter")
    assert rows.count() == 220


def test_points_are_selected_by_keyboard_and_by_mouse(show: Show) -> None:
    page = show("ledger")
    shown = page.locator(".panel:visible")
    first = shown.locator("h3").inner_text()
    assert shown.count() == 1
    point = page.locator('.live-figures svg .point[tabindex="0"]').first
    point.focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    second = shown.locator("h3").inner_text()
    assert second != first
    current = page.evaluate("document.activeElement.getAttribute('aria-current')")
    assert current == "true"
    page.locator("#said", has_text=f"{second} is shown below").wait_for(state="attached")
    page.locator(".live-figures svg .point").first.click()
    assert shown.count() == 1
    assert shown.locator("h3").inner_text() not in ("", second)


def test_what_is_copied_is_said(show: Show) -> None:
    page = show("discover", permissions=["clipboard-read", "clipboard-write"])
    button = page.locator("#winner .copy").nth(1)
    button.press("Enter")
    page.locator("#said", has_text="LaTeX copied").wait_for(state="attached")
    assert page.evaluate("navigator.clipboard.readText()") == button.get_attribute("data-copy")


def test_the_first_focus_is_the_way_to_the_content(show: Show) -> None:
    page = show("bench")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_without_a_script_everything_but_search_is_there(show: Show) -> None:
    page = show("ledger", java_script_enabled=False)
    assert page.locator("#candidate-rows tbody tr").count() == 20
    assert page.locator(".panel:visible").count() == 1
    assert page.locator("button:visible").count() == 7  # the headings of the candidates


def test_a_live_page_goes_on_with_what_is_selected(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpmetric.reporting.live._SECONDS", 0.3)
    path, wrong = make_ledger(tmp_path / "a.sqlite", 80, finished=False), []
    with served(path) as address, browser.new_context() as context:
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.goto(address)
        page.locator(".live-figures svg .point").first.click()
        chosen = page.locator(".panel:visible h3").inner_text()
        page.locator("#search").fill("rowsum")
        page.locator("#search").blur()
        found = page.locator("#found").inner_text()
        path.unlink()
        make_ledger(path, 120, finished=False)
        page.locator(".verdict", has_text=" 3 generations").wait_for()
        assert page.locator(".panel:visible h3").inner_text() == chosen
        assert page.locator("#search").input_value() == "rowsum"
        assert page.locator("#found").inner_text() != found
    assert wrong == []


def test_a_live_page_says_that_its_campaign_is_gone(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpmetric.reporting.live._SECONDS", 0.3)
    with browser.new_context() as context:
        page = context.new_page()
        with served(make_ledger(tmp_path / "a.sqlite", 10, finished=False)) as address:
            page.goto(address)
        page.locator("#live", has_text="does not answer any more").wait_for()
        assert page.locator("h1").inner_text() == "Campaign a.sqlite"


@contextmanager
def served(path: Path) -> Iterator[str]:
    """The address of a ledger's live page."""
    with LiveServer(socket.create_server(("127.0.0.1", 0)), Served(path)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()
