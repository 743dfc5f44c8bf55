"""Widgets in the built pages, in a browser, by keyboard: no kernel, no network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import HTML, Visit

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

STATE = "application/vnd.jupyter.widget-state+json"


def _shows(path: Path) -> bool:
    return STATE in path.read_text()


PAGES = sorted(str(p.relative_to(HTML)) for p in (HTML / "book").glob("[0-9]*.html") if _shows(p))
PAD = "book/01_perceptron.html"


def _open(seen: Visit, path: str) -> Page:
    page = seen.open(path)
    page.wait_for_function(
        """() => document.querySelectorAll('.gi-widget').length ===
          document.querySelectorAll('script[type*="widget-view"]').length"""
    )
    return page


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("mode", "width"), [("light", "desktop"), ("dark", "phone")])
def test_every_slider_moves_by_keyboard(
    name: str, mode: str, width: str, visit: Callable[..., Visit]
) -> None:
    seen = visit(mode, width)
    page = _open(seen, name)
    sliders = page.locator(".gi-slider")
    for i in range(sliders.count()):
        _walk(sliders.nth(i))
    assert not seen.outside
    assert not seen.complaints


def _walk(slider: Locator) -> None:
    range_, picture = slider.locator("input[type=range]"), slider.locator("img")
    last = int(range_.get_attribute("max"))
    range_.focus()
    range_.press("Home")
    sources, texts = set(), set()
    for _ in range(last + 1):
        sources.add(picture.get_attribute("src"))
        texts.add(range_.get_attribute("aria-valuetext"))
        assert picture.get_attribute("alt")
        range_.press("ArrowRight")
    assert len(sources) == len(texts) == last + 1
    assert slider.locator("tbody tr").count() == last + 1
    assert slider.locator(".gi-live").is_hidden(), "no kernel, so nothing to ask it"
    assert picture.evaluate("async i => { await i.decode(); return i.naturalWidth; }") > 300


def test_the_table_unfolds_by_keyboard(visit: Callable[..., Visit]) -> None:
    page = _open(visit(), PAD)
    slider = page.locator(".gi-slider").first
    table = slider.locator("table")
    assert not table.is_visible()
    slider.locator("summary").press("Enter")
    assert table.is_visible()


def _error(page: Page) -> float:
    return float(page.locator(".gi-pad .gi-numbers").get_attribute("data-error") or "nan")


def _ink(page: Page, which: int) -> list[int]:
    return (
        page.locator(".gi-pad canvas")
        .nth(which)
        .evaluate("c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]")
    )


def test_the_pad_recovers_what_is_drawn(visit: Callable[..., Visit]) -> None:
    seen = visit()
    page = _open(seen, PAD)
    page.get_by_role("button", name="Clear").click()
    assert max(_ink(page, 2)[::4]) == 0
    box = page.locator(".gi-draw").bounding_box()
    across = [(0.3, 0.2), (0.7, 0.2), (0.4, 0.8)]  # a seven
    points = [(box["x"] + u * box["width"], box["y"] + v * box["height"]) for u, v in across]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=8)
    page.mouse.up()
    assert sum(value > 128 for value in _ink(page, 0)[::4]) > 20
    assert _ink(page, 0) == _ink(page, 2), "drawn and recovered, to the pixel"
    assert _error(page) < 1e-15
    assert not [*seen.outside, *seen.complaints]


def test_the_pad_draws_by_keyboard(visit: Callable[..., Visit]) -> None:
    page = _open(visit(), PAD)
    page.get_by_role("button", name="Clear").click()
    pad = page.locator(".gi-draw")
    for key in ("ArrowUp", " ", "ArrowRight", " "):
        pad.press(key)
    page.get_by_label("Format of the numbers sent").focus()  # the pen's mark goes
    inked = [value for value in _ink(page, 2)[::4] if value]
    assert len(inked) >= 6 and max(inked) == 255
    assert _error(page) < 1e-15


def test_noise_and_formats_do_to_the_pad_what_the_chapter_says(
    visit: Callable[..., Visit],
) -> None:
    page = _open(visit(), PAD)
    noise, sure = page.get_by_label("Noise σ"), page.get_by_label("Bias b of the neuron")
    noise.press("ArrowRight")
    noise.press("ArrowRight")
    little = _error(page)
    for _ in range(3):
        sure.press("ArrowRight")
    assert 1e-4 < little < _error(page) / 5
    noise.press("Home")
    page.get_by_label("Format of the numbers sent").select_option("float16")
    assert 1e-5 < _error(page) < 1e-2
    sure.press("End")
    assert "nothing to divide by" in page.locator(".gi-pad .gi-numbers").inner_text()


def test_the_pad_takes_a_picture(visit: Callable[..., Visit], tmp_path: Path) -> None:
    from PIL import Image

    page = _open(visit(), PAD)
    Image.new("RGB", (60, 40), (255, 255, 255)).save(tmp_path / "white.png")
    page.get_by_label("A picture of yours", exact=True).last.set_input_files(tmp_path / "white.png")
    page.wait_for_function("() => document.querySelector('.gi-draw').getContext('2d')"
                           ".getImageData(0, 0, 1, 1).data[0] === 255")  # fmt: skip
    assert min(_ink(page, 2)[::4]) == 255


def test_a_page_stores_no_other_kind_of_widget() -> None:
    for name in PAGES:
        text = (HTML / name).read_text()
        body = text.split(f'<script type="{STATE}">')[1].split("</script>")[0]
        kinds = {model["model_name"] for model in json.loads(body)["state"].values()}
        assert kinds == {"AnyModel", "LayoutModel"}
