"""What the course costs: seconds of its chapters, tests and build, weight of its pages.

Every run measures afresh and compares with ``budgets.toml``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import unquote

from . import store
from .measure import ROOT, Job, Options, fill, rounded

SECTION = "budgets"
BOOK, PACKAGE = ROOT / "book", ROOT / "gradinv_edu"
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


def main(options: Options) -> int:
    """Measure, store and compare; 1 where something is over its budget."""
    fill(SECTION, jobs(), replace(options, again=True))
    measured = {k: c for k, c in store.cells(SECTION).items() if options.only in k}
    over = list(exceeded(measured))
    for key, what, value, budget in over:
        print(f"over budget: {key}: {what} {value:.1f}, allowed {budget:g}")
    return 1 if over else 0


def jobs() -> dict[str, Job]:
    """Cheap ones first."""
    chapters = sorted(path.stem for path in BOOK.glob("[0-9]*.ipynb"))
    return {
        "import": Job("budgets", "import_time"),
        "files": Job("budgets", "files"),
        "book": Job("budgets", "book", limit=1800),
        **{f"chapter/{c}": Job("budgets", "chapter", {"stem": c}) for c in chapters},
        "tests": Job("budgets", "tests", limit=7200),
    }


def allowed() -> dict[str, dict[str, float]]:
    """Read the budgets: of seconds, of MiB, and of lines."""
    return tomllib.loads((ROOT / "benchmarks" / "budgets.toml").read_text(encoding="utf-8"))


def exceeded(cells: dict[str, store.Cell]) -> Iterator[tuple[str, str, float, float]]:
    """Cells over a budget: key, what of it, how much, how much is allowed."""
    for key, cell in cells.items():
        for unit, budgets in allowed().items():
            for what, value in cell.get(unit, {}).items():
                if value > budgets[what]:
                    yield key, f"{what}, {unit}", value, budgets[what]


# --- in the child -------------------------------------------------------------------------------


def import_time(runs: int = 5) -> dict[str, Any]:
    """What ``import gradinv_edu`` adds to ``import torch``, in fresh processes."""
    code = (
        "import time, torch; t = time.perf_counter(); import gradinv_edu as gi; gi.recover; "
        "print(time.perf_counter() - t)"
    )
    spent = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(runs)]
    return {"seconds": {"import": rounded(median(spent), 3)}}


def chapter(stem: str) -> dict[str, Any]:
    """Run a chapter in a fresh kernel; nothing is written."""
    import nbformat
    from nbconvert.preprocessors import ExecutePreprocessor

    notebook = nbformat.read(BOOK / f"{stem}.ipynb", as_version=4)
    runner = ExecutePreprocessor(timeout=600, kernel_name="python3")
    start = time.perf_counter()
    runner.preprocess(notebook, {"metadata": {"path": str(BOOK)}})
    return {"seconds": {"chapter": rounded(time.perf_counter() - start, 3)}}


def tests() -> dict[str, Any]:
    """Run the whole suite as ``make test`` does."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "tests"]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    spent = rounded(time.perf_counter() - start, 3)
    return {"seconds": {"tests": spent}, "passed": done.returncode == 0}


def book() -> dict[str, Any]:
    """Build from clean into a folder of its own, and weigh the pages."""
    builder = Path(sys.executable).with_name("jupyter-book")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [str(builder), "build", ".", "--path-output", folder, "-n", "--all"]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        spent = rounded(time.perf_counter() - start, 3)
        html = Path(folder) / "_build" / "html"
        weights = {page.stem: weight(page) for page in pages(html)}
        site = sum(path.stat().st_size for path in html.rglob("*") if path.is_file())
    heaviest = max(weights, key=weights.__getitem__)
    sizes = {"page": mib(weights[heaviest]), "site": mib(site)}
    return {"seconds": {"book": spent}, "mib": sizes, "heaviest": heaviest, "pages": len(weights)}


def files() -> dict[str, Any]:
    """Largest notebook and data file; longest module of a chapter and file of the engine."""
    chapters = [PACKAGE / f"{path.stem.split('_', 1)[1]}.py" for path in BOOK.glob("[0-9]*.ipynb")]
    return {
        "mib": {"notebook": largest("*.ipynb"), "data": largest("data/*")},
        "lines": {"chapter": longest(chapters), "engine": longest(PACKAGE.rglob("engine/**/*.py"))},
    }


# --- weights, for `make test` as well -----------------------------------------------------------


def largest(pattern: str) -> float:
    """MiB of the largest such file of the book."""
    return mib(max(path.stat().st_size for path in BOOK.glob(pattern)))


def longest(files: Iterable[Path]) -> int:
    """Lines of the longest file."""
    return max(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


def pages(html: Path) -> list[Path]:
    """Of the chapters, of what is to look up, and of the exercises."""
    return sorted([*(html / "book").glob("*.html"), *(html / "exercises").rglob("*.html")])


def weight(page: Path) -> int:
    """Bytes of a page and of the scripts, style sheets and pictures that it loads."""
    reader = _Loads()
    reader.feed(page.read_text(encoding="utf-8"))
    loaded = {Path(os.path.normpath(page.parent / unquote(url))) for url in reader.urls}
    return page.stat().st_size + sum(path.stat().st_size for path in loaded if path.is_file())


def mib(size: int) -> float:
    return round(size / 2**20, 2)


class _Loads(HTMLParser):
    """Collects what a browser fetches on opening a page."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "link" and values.get("rel") != "stylesheet":
            return
        url = values.get(LOADS.get(tag, ""), "").split("?")[0].split("#")[0]
        if url and not url.startswith("data:"):
            self.urls.append(url)
