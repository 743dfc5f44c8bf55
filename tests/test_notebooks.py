"""The form of the chapters, so that the run that compares outputs cannot be vacuous."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

import pytest

BOOK = Path(__file__).parents[1] / "book"
PAGES = tuple(BOOK / f"{name}.ipynb" for name in ("benchmarks", "zoo", "trust"))
CHAPTERS = [*sorted(BOOK.glob("[0-9]*.ipynb")), *PAGES]
IGNORING = re.compile(r"nbval|skip|raises-exception", re.IGNORECASE)
LONGEST, LONGEST_FOLDED, MEDIAN = 30, 40, 12

Cell = dict[str, Any]


def _source(cell: Cell) -> str:
    return "".join(cell["source"])


def _lines(cell: Cell) -> list[str]:
    return [line for line in _source(cell).splitlines() if line.strip()]


def _folded(cell: Cell) -> bool:
    return "hide-input" in cell["metadata"].get("tags", [])


def _draws(cell: Cell) -> bool:
    kinds = {kind for output in cell["outputs"] for kind in output.get("data", {})}
    return bool(kinds & {"image/png", "image/jpeg", "image/svg+xml"})


@pytest.fixture(params=CHAPTERS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(request.param.read_text())


@pytest.fixture
def code(notebook: dict[str, Any]) -> list[Cell]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_there_are_chapters() -> None:
    assert CHAPTERS


def test_it_opens_with_a_title_and_runs_on_python3(notebook: dict[str, Any]) -> None:
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown" and _source(first).startswith("# ")
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


def test_every_code_cell_was_executed_in_order(code: list[Cell]) -> None:
    assert code
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))


def test_every_code_cell_shows_or_asserts_something(code: list[Cell]) -> None:
    silent = [
        _source(cell) for cell in code if not cell["outputs"] and "assert" not in _source(cell)
    ]
    assert not silent


def test_no_cell_failed_or_warned(code: list[Cell]) -> None:
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert not ["".join(o["text"]) for o in outputs if o.get("name") == "stderr"]


def test_no_magics_and_nothing_ignored(code: list[Cell]) -> None:
    for cell in code:
        assert not re.search(r"^\s*[%!]", _source(cell), re.MULTILINE), _source(cell)
        assert not IGNORING.search(" ".join(cell["metadata"].get("tags", [])))
        assert not re.search(r"#\s*NBVAL", _source(cell))


def test_cells_are_short(code: list[Cell]) -> None:
    lengths = [len(_lines(cell)) for cell in code]
    shown = [n for n, cell in zip(lengths, code, strict=True) if not _folded(cell)]
    assert median(shown) <= MEDIAN
    assert max(shown) <= LONGEST
    assert max(lengths) <= LONGEST_FOLDED


def test_every_figure_says_what_it_shows(code: list[Cell]) -> None:
    for cell in filter(_draws, code):
        alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
        assert len(alt.split()) >= 4, _source(cell)


def test_nothing_volatile_is_stored(notebook: dict[str, Any]) -> None:
    assert "language_info" not in notebook["metadata"] or (
        "version" not in notebook["metadata"]["language_info"]
    )
    assert not [cell for cell in notebook["cells"] if "execution" in cell["metadata"]]
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(names) == len(set(names))
