"""The decks of slides: made by rule from the chapters, and at home without a network."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from scripts import load

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "book").glob("[0-9]*.ipynb"))
CHAPTER = ROOT / "book" / "01_perceptron.ipynb"
MYST = re.compile(r"\{(math|figure|admonition|note|eq|func|class|meth|doc|numref|cite:\w)\}")


slides = load("slides")


def _deck(chapter: Path) -> Any:
    return slides.deck(nbformat.read(chapter, as_version=4))


def _kind(cell: Any) -> str:
    return cell.metadata.slideshow.slide_type


def _headings(path: Path) -> list[str]:
    cells = nbformat.read(path, as_version=4).cells
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    text = re.sub(r"^```.*?^```$", "", "\n".join(texts), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#{1,2} .*$", text, re.MULTILINE)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_every_heading_begins_a_slide_and_nothing_else_does(chapter: Path) -> None:
    begun = [cell.source for cell in _deck(chapter).cells if _kind(cell) == "slide"]
    assert begun == [slides.plain(heading) for heading in _headings(chapter)]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_no_directive_or_role_is_left(chapter: Path) -> None:
    cells = [cell for cell in _deck(chapter).cells if cell.cell_type == "markdown"]
    assert not [cell.source for cell in cells if MYST.search(cell.source)]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_every_picture_and_equation_is_shown_and_long_prose_is_not(chapter: Path) -> None:
    original, made = nbformat.read(chapter, as_version=4), _deck(chapter)
    drawn = [_pictures(cells) for cells in (original.cells, made.cells)]
    assert drawn[0] == drawn[1]
    shown = [c for c in made.cells if c.cell_type == "markdown" and _kind(c) != "notes"]
    equations = sum(cell.source.startswith("$$") for cell in shown)
    stated = "\n".join(c.source for c in original.cells if c.cell_type == "markdown")
    assert equations >= stated.count("{math}")
    prose = [c.source for c in shown if re.match(r"[A-Za-z]", c.source) and "\n- " not in c.source]
    assert max(len(text.split()) for text in prose) <= slides.SHORT
    assert any(_kind(cell) == "notes" for cell in made.cells)


def _pictures(cells: list[Any]) -> int:
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_marks_become_plain_markdown() -> None:
    text = "See {eq}`bias-ratio`, {func}`~gradinv_edu.rank.audit`, {doc}`05_recursion`, "
    text += "{doc}`Chapter 1 <01_perceptron>` {cite:p}`a1999,b2000x`."
    assert slides.plain(text) == "See *bias ratio*, `audit`, chapter 5, Chapter 1 (A 1999; B 2000)."
    block = "```{math}\n:label: x\nx = 1\n```"
    assert slides.blocks(f"# T\ntext\n\n{block}\nmore") == ["# T", "text", block, "more"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sphinx_revealjs")
    return slides.export(CHAPTER, tmp_path_factory.mktemp("slides"))


def test_a_deck_asks_nothing_of_the_network_and_brings_its_files(page: Path) -> None:
    content = page.read_text()
    asked = re.findall(r'<(?:script|link|img|iframe)[^>]*?(?:src|href)="([^"]+)"', content)
    local = [name for name in asked if not name.startswith("data:")]
    assert local and all((page.parent / name).is_file() for name in local)
    styles = [*page.parent.rglob("*.css")]
    imported = re.compile(r"@import[^;]*//|url\([\"']?(https?:)?//")
    assert not [style for style in styles if imported.search(style.read_text(errors="ignore"))]
    assert not imported.search(content)


def test_every_picture_of_a_deck_says_what_it_shows(page: Path) -> None:
    texts = re.findall(r'<img[^>]*?alt="([^"]*)"', page.read_text())
    assert texts and all(len(text.split()) >= 4 for text in texts)
    assert not [text for text in texts if text.startswith("No description")]


def test_a_deck_runs_in_a_browser(page: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    playwright = pytest.importorskip("playwright.sync_api")
    if not chromium:
        pytest.skip("this machine has no Chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab, asked, failed = browser.new_page(), [], []
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda error: failed.append(str(error)))
        tab.goto(page.as_uri())
        tab.wait_for_function(
            "window.Reveal && Reveal.isReady() && document.querySelector('mjx-math')"
        )
        assert tab.evaluate("Reveal.getTotalSlides()") > 20
        assert not failed
        assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
        browser.close()
