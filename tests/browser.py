"""A headless Chromium that is shown the built book from this machine, and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Route

HTML = Path(os.environ.get("BOOK_HTML", Path(__file__).parents[1] / "_build" / "html"))
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
STILL = "*, ::before, ::after { transition: none !important; animation: none !important; }"
MISSING = (
    "no Chromium on this machine: install one (Debian: apt-get install chromium; anywhere: "
    "playwright install chromium) to test the pages in a browser"
)


def leads_on(page: Path) -> bool:
    """Whether a page only leads on to another."""
    return 'http-equiv="refresh"' in page.read_text(encoding="utf-8")[:500].lower()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing: the tests report."""


@dataclass
class Visit:
    """A page as a reader has it open, and what the browser had to say about it."""

    page: Page
    site: str
    outside: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def guard(self, route: Route) -> None:
        url = route.request.url
        if url.startswith((self.site, "data:", "blob:")):
            return route.continue_()
        self.outside.append(url)
        return route.abort()

    def note(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def open(self, path: str) -> Page:
        """Open a page of the book, and wait until its equations are set."""
        self.page.goto(f"{self.site}/{path}", wait_until="load")
        self.page.add_style_tag(content=STILL)
        self.page.evaluate("() => window.MathJax?.startup?.promise?.then(() => true)")
        return self.page

    def resize(self, width: str) -> None:
        across, down = WIDTHS[width]
        self.page.set_viewport_size({"width": across, "height": down})


def _absent() -> None:
    if os.environ.get("NEED_BROWSER"):
        pytest.fail(f"NEED_BROWSER is set, and there is {MISSING}")
    pytest.skip(MISSING)


def _executable(own: str) -> str:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or (own if Path(own).exists() else "")


@pytest.fixture(scope="session")
def site() -> Iterator[str]:
    """The address of the built book, served on this machine alone."""
    if not (HTML / "index.html").exists():
        pytest.skip("the book is not built: run `make book` first")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(HTML)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """A headless Chromium that resolves no name but this machine's own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = _executable(playwright.chromium.executable_path)
        if not path:
            _absent()
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        with suppress(Exception):
            browser.close()


@pytest.fixture
def visit(chromium: Browser, site: str) -> Iterator[Callable[..., Visit]]:
    """Open a window: ``visit(mode="light", width="desktop")``."""
    contexts: list[Any] = []

    def new(mode: str = "light", width: str = "desktop") -> Visit:
        across, down = WIDTHS[width]
        context = chromium.new_context(
            viewport={"width": across, "height": down}, color_scheme=mode, reduced_motion="reduce"
        )
        context.set_default_timeout(300_000)  # a busy machine takes its time
        contexts.append(context)
        seen = Visit(context.new_page(), site)
        context.route("**/*", seen.guard)
        seen.page.on("console", seen.note)
        seen.page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        return seen

    yield new
    for context in contexts:
        context.close()
