"""The built book asks nothing of the network, and shows what the sources hold."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from browser import leads_on

ROOT = Path(__file__).parents[1]
HTML = ROOT / "_build" / "html"
BUILT = sorted([*(HTML / "book").glob("*.html"), *(HTML / "exercises").rglob("*.html")])
PAGES = [page for page in BUILT if not leads_on(page)]
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "embed": "src"}
REMOTE = re.compile(r"^(https?:)?//")
STYLE = re.compile(r"""(?:@import|url\()\s*(?:url\()?["']?(?:https?:)?//""")
SCRIPT = re.compile(r"""(?:src\s*=|import|fetch\(|URL\s*=)[^;\n]*["'](?:https?:)?//""")

needs_book = pytest.mark.skipif(not PAGES, reason="the book is not built: run `make book` first")


class Requests(HTMLParser):
    """Collects what a browser loads on opening a page; links that a reader clicks are not that."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.pictures_without_alt: list[str] = []
        self._inside = ""
        self.scripts: list[str] = []
        self.styles: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self._inside = tag
        loaded = values.get(LOADS.get(tag, ""), "")
        if tag == "link" and values.get("rel") not in {"canonical", "next", "prev", "author"}:
            loaded = values.get("href", "")
        if loaded:
            self.urls.append(loaded)
        if tag == "img" and not values.get("alt"):
            self.pictures_without_alt.append(values.get("src", ""))
        self.styles.append(values.get("style", ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        if self._inside == "style":
            self.styles.append(data)


def _read(page: Path) -> Requests:
    requests = Requests()
    requests.feed(page.read_text())
    return requests


@needs_book
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_page_loads_only_files_of_the_book(page: Path) -> None:
    found = _read(page)
    assert found.urls
    assert not [url for url in found.urls if REMOTE.match(url)]
    assert not [text for text in found.scripts if SCRIPT.search(text)]
    assert not [text for text in found.styles if STYLE.search(text)]


@needs_book
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_what_a_page_loads_is_there(page: Path) -> None:
    for url in _read(page).urls:
        if not url.startswith(("data:", "#")):
            assert (page.parent / re.split("[?#]", url)[0]).exists(), url


@needs_book
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_picture_has_a_text(page: Path) -> None:
    assert not _read(page).pictures_without_alt


@needs_book
def test_stylesheets_load_nothing_from_elsewhere() -> None:
    for sheet in HTML.rglob("*.css"):
        assert not STYLE.search(sheet.read_text()), sheet.name


@needs_book
def test_old_addresses_of_chapters_lead_to_the_new_ones() -> None:
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    moved = config["sphinx"]["config"]["moved_chapters"]
    old = {page.stem: page for page in BUILT if leads_on(page) and page.parent.name == "book"}
    assert set(old) == set(moved)
    for page in filter(leads_on, BUILT):
        (target,) = set(re.findall(r'(?:url=|href=")([^"]+)"', page.read_text()))
        assert (page.parent / target).resolve() in PAGES
        assert Path(target).stem == moved[page.stem]


@needs_book
def test_every_source_became_a_page() -> None:
    sources = {
        path.stem for path in (ROOT / "book").glob("*.*") if path.suffix in {".ipynb", ".md"}
    }
    assert sources <= {page.stem for page in PAGES}
