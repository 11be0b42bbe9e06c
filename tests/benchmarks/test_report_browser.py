"""report.html in Chromium: as wide as a desktop and a phone, light and dark, printed; axe-core looks for faults."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cusprun.benchmarks.report_page import read_experts, write_page, write_pages
from tests.benchmarks.reports_made import frontier, make_expert, make_report
from tests.chromium import open_chromium

pytestmark = pytest.mark.browser
LONG = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 3


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One expert with everything, and a page of two experts of whom one has long names and a hostile answer."""
    folder = tmp_path_factory.mktemp("pages")
    solved = {"name": "refit", "budget": {"size": 91_000_000, "speedup": 1.5}, "solved": {"file_bytes": 90_000_000}}
    one = make_expert(folder / "one", make_report(frontier=frontier(False), method=solved))
    assert "--size 91MB --speedup 1.5" in write_pages(one)[0].read_text()
    evil = "<script>fetch('https://example.org')</script><img src=https://example.org/x.png>"
    answer = {"prompt": LONG, "reference": None, "dense": evil, "expert": LONG}
    two = make_expert(
        folder / "two", make_report(scenario={"language": "de", "domain": LONG, "name": LONG}, samples=[answer])
    )
    return {
        "one": write_pages(one)[0],
        "two": write_page(read_experts([one, two]), folder / "all.html"),
    }


@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_page_in_a_browser(browser: Any, pages: dict[str, Path], name: str, scheme: str, width: int) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[name].as_uri())
    assert asked == [pages[name].as_uri()]
    assert said == []

    figures = page.locator("figure")
    assert figures.count() == {"one": 6, "two": 6 + 4 + 2}[name]
    for number in range(figures.count()):
        box = figures.nth(number).locator("svg[role=img]").bounding_box()
        assert box["width"] >= 300
        assert box["height"] >= 80
        smallest = figures.nth(number).evaluate(
            "f => Math.min(...[...f.querySelectorAll('text')].map(t => t.getBoundingClientRect().height))"
        )
        assert smallest >= 9, "text of a plot is too small to read"
    assert page.evaluate("document.documentElement.scrollWidth") == width

    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 28)"
    assert dark == (scheme == "dark")
    label = page.locator("figure svg text").first.evaluate("t => getComputedStyle(t).fill")
    assert label == ("rgb(232, 235, 238)" if dark else "rgb(27, 33, 39)")

    page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    found = Axe().run(page).response["violations"]
    assert [(fault["id"], fault["impact"], fault["nodes"][0]["html"]) for fault in found] == []
    assert said == []
    page.close()


def test_axe_would_tell(browser: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = browser.new_page()
    page.set_content("<img src='data:,'><p style='color: #ccc; background: #fff'>pale</p>")
    found = {fault["id"] for fault in Axe().run(page).response["violations"]}
    assert {"image-alt", "color-contrast"} <= found
    page.close()


def test_printed_it_is_light_and_shows_the_numbers(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 680, "height": 900}, color_scheme="dark")  # A4 between its margins
    page.goto(pages["one"].as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    hidden = page.locator("details table").evaluate_all(
        "all => all.filter(one => one.getBoundingClientRect().height < 10).length"
    )
    assert hidden == 0
    assert page.locator(".verdict").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 680
    paper = page.pdf(format="A4")
    assert paper.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", paper)) >= 3
    page.close()
