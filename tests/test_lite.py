"""The NumPy edition of the first chapters prints their figures; its build says what it lacks."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
from scripts import load

BOOK = Path(__file__).parents[1] / "book"
lite = load("lite")


def _printed(stem: str) -> str:
    cells = json.loads((BOOK / f"{stem}.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "\n".join("".join(output.get("text", "")) for output in outputs)


def test_the_numpy_edition_prints_what_the_chapters_print() -> None:
    stream, names = io.StringIO(), {}
    made = lite.notebook(lite.SOURCE.read_text())
    with contextlib.redirect_stdout(stream):
        for cell in made.cells:
            if cell.cell_type == "code":
                exec(cell.source, names)
    told = stream.getvalue()
    for stem, begins in {
        "01_perceptron": "sent for the weights:",
        "02_fully_connected": "k: [",
        "03_convolution": "matrix:",
    }.items():
        line = next(line for line in told.splitlines() if line.startswith(begins))
        assert line in _printed(stem)
    picture = _printed("04_systems").split("tensor([[1, 5, 6, 2]")[1].split(", dtype")[0]
    rows = "".join(c for c in "[[1562]" + picture if c.isdigit())
    assert told.count("[[1 5 6 2]") == 2 and rows == "1562700860072851"
    assert "label: 2  x: [0.5, 0.25, 1.0]" in told
    a, b = (s.split("]")[0] for s in told.split("sent: [")[1].split("weighted sum: [")[:2])
    assert a == b and "torch" not in lite.SOURCE.read_text().replace("PyTorch", "")


def test_without_pyodide_the_build_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="make lite PYODIDE=folder"):
        lite.build(str(tmp_path), tmp_path / "out")
