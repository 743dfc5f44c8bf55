"""Every page in a real browser: offline, without complaint, set, readable on a phone, for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from browser import HTML, Visit, leads_on

if TYPE_CHECKING:
    from playwright.sync_api import Page

# What lies under _static is no page.
PAGES = sorted(
    str(path.relative_to(HTML))
    for path in HTML.rglob("*.html")
    if not path.relative_to(HTML).parts[0].startswith("_") and not leads_on(path)
)

# Text outside of code that still shows TeX's own marks, or what MathJax could not set.
UNSET = r"""() => {
  const MARK = /\\\(|\\\[|\\begin\{|\$\$|\{(math|eq|doc|cite|term|numref)[:}]/;
  const errors = document.querySelectorAll('mjx-merror, [data-mjx-error]');
  const bad = [...errors].map(e => e.textContent);
  const walk = document.createTreeWalker(document.querySelector('main') ?? document.body, 4);
  while (walk.nextNode()) {
    const node = walk.currentNode;
    if (node.parentElement.closest('pre, code, script, style, mjx-container')) continue;
    if (MARK.test(node.data)) bad.push(node.data);
  }
  return bad.map(text => text.trim().slice(0, 80));
}"""
PICTURES = """async () => {
  const bad = [];
  for (const image of document.images) {
    image.loading = 'eager';
    await image.decode().catch(() => {});
    if (!image.naturalWidth || !image.alt.trim()) bad.push(image.src.slice(-60));
  }
  return bad;
}"""
# What is wider than the page and does not scroll within itself.
SPILLS = """() => {
  const edge = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= edge) return [];
  const visible = e => getComputedStyle(e).overflowX === 'visible';
  const clipped = e => e && (!visible(e) || clipped(e.parentElement));
  const bad = [...document.querySelectorAll('main *')]
    .filter(e => e.getBoundingClientRect().right > edge + 1 && !clipped(e.parentElement));
  return [`${document.documentElement.scrollWidth} of ${edge}`,
    ...bad.slice(0, 5).map(e => e.outerHTML.slice(0, 90))];
}"""


# MathJax's own elements are MathJax's matter, and there are thousands, as there are of coloured
# words of code: those are looked at on one page.
SCOPE = {"exclude": [["mjx-container"], [".highlight pre"]]}
LISTS = ("definition-list", "dlitem", "list", "listitem")
# The reference has hundreds of entries of one form: for all else, axe looks at the first.
TRIM = "() => [...document.querySelectorAll('section > dl.py')].slice(3).forEach(e => e.remove())"


def _violations(page: Page, *rules: str, scope: object = SCOPE) -> list[str]:
    from axe_playwright_python.sync_playwright import Axe

    # preload would fetch stylesheets again, by addresses of its own
    options: dict[str, Any] = {"resultTypes": ["violations"], "preload": False}
    if rules:
        options["runOnly"] = {"type": "rule", "values": list(rules)}
    found = Axe().run(page, context=scope, options=options).response["violations"]
    return [
        f"{item['id']}: {node['html'][:120]} {node['failureSummary'][-160:]}"
        for item in found
        if item["impact"] in {"serious", "critical"}
        for node in item["nodes"][:4]
    ]


def _by_night(page: Page) -> None:
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("html[data-theme=dark]", state="attached")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_in_a_browser(name: str, visit: Callable[..., Visit]) -> None:
    seen = visit("light", "desktop")
    page = seen.open(name)
    assert not page.evaluate(UNSET), "equations or roles that were not set"
    assert not page.evaluate(PICTURES), "pictures that did not load, or have no text"
    for width in ("desktop", "phone"):
        seen.resize(width)
        assert not page.evaluate(SPILLS), f"wider than a {width}"
    assert not _violations(page, *LISTS), "axe: lists, of all entries"
    page.evaluate(TRIM)
    seen.resize("desktop")
    assert not _violations(page), "axe: serious or critical, by day"
    _by_night(page)
    # colours are all that the mode changes
    assert not _violations(page, "color-contrast"), "axe: contrast by night"
    assert not seen.outside, "requests that leave the machine"
    assert not seen.complaints, "errors in the console"


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_code_has_contrast(mode: str, visit: Callable[..., Visit]) -> None:
    page = visit(mode).open("book/02_fully_connected.html")
    page.evaluate("() => document.querySelectorAll('.cell ~ .cell').forEach(e => e.remove())")
    assert page.locator(".cell_input .highlight pre").count()
    assert not _violations(page, "color-contrast", scope={"include": [["main"]]})


def test_what_is_printed_by_night_is_dark_on_white(visit: Callable[..., Visit]) -> None:
    page = visit("dark").open("book/notation.html")
    page.evaluate("() => window.dispatchEvent(new Event('beforeprint'))")
    assert page.get_attribute("html", "data-theme") == "light", "paper is white"
    page.evaluate("() => window.dispatchEvent(new Event('afterprint'))")
    assert page.get_attribute("html", "data-theme") == "dark"


def test_a_page_opens_by_night_on_a_phone(visit: Callable[..., Visit]) -> None:
    seen = visit("dark", "phone")
    page = seen.open("book/01_perceptron.html")
    assert page.get_attribute("html", "data-theme") == "dark"
    assert not page.evaluate(SPILLS)
    assert not [*seen.outside, *seen.complaints]


def test_the_guard_sees_a_request_that_leaves_the_machine(visit: Callable[..., Visit]) -> None:
    seen = visit()
    page = seen.open("book/notation.html")
    page.evaluate("() => fetch('https://example.org/x.js').catch(() => {})")
    assert seen.outside == ["https://example.org/x.js"]


def test_axe_sees_what_it_should(visit: Callable[..., Visit]) -> None:
    page = visit().open("book/notation.html")
    page.evaluate("() => document.querySelector('main').append(document.createElement('img'))")
    page.evaluate("() => { document.querySelector('main p').style.color = '#eee'; }")
    found = " ".join(_violations(page))
    assert "image-alt" in found and "color-contrast" in found
