"""One symbol, one meaning: the page that defines them, and what chapters and docstrings write."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "book").glob("[0-9]*.ipynb"))
EXERCISES = sorted((ROOT / "exercises" / "source").glob("*/*.ipynb"))
PAGE = (ROOT / "book" / "notation.md").read_text()
MATH = re.compile(
    r"`{3}\{math\}(.*?)`{3}|:::\{math\}(.*?):::|\$\$(.*?)\$\$|\$([^$\n]+)\$", re.DOTALL
)
IN_DOCSTRING = re.compile(r":math:`([^`]+)`")

# What a letter meant in some place before it had one meaning, by what it is called now.
FORMER = {
    r"\phi: an activation": r"\\sigma('|\^\{-1\}|\(z|\(W|\(-)",
    r"\ell: a position of the kernel": r"patch\}_p|_f\(p\)|_c\(p\b|k_p\b",
    r"\mathbf W: a convolution as a matrix": r"\bT ?x\b|\bT_\{\(",
    r"k: output gradients of a batch": r"\bK(\\,)? ?X\b|\bK\^\\top X|\bK S_t",
    r"U, R, Q: factors of a batch": r"\bL ?R\b|\bL(\\,)? ?Q\b|\bl_j\b",
    r"C': filters, F: side of a kernel": r"\bF P\b|- F\^2|c f\^2",
    r"p_drop: rate of dropout": r"\{1 ?- ?p\}|/ ?\(1 ?- ?p\)|\bp\^T",
    r"g_max: clipping norm": r"C ?/ ?\\lVert g|\bC\^2 *\)|\b2C\b",
    r"\Sigma: covariance": r"C A\^\\top|A\\?,? ?C A",
    r"|\theta|: number of parameters": r"\bp ?[<>] ?n\b|\bn ?[<>] ?p\b",
    r"A^+: projections": r"P_\{\\ker",
    r"B: basis of a null space": r"x_\{\\min\} \+ N",
    r"\lambda: weight of a penalty": r"\\alpha ?(\\,)?\\mathrm\{TV\}",
}


def _told(path: Path) -> list[str]:
    if path.suffix == ".py":
        return IN_DOCSTRING.findall(path.read_text(encoding="utf-8"))
    cells = json.loads(path.read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    return ["".join(found) for text in texts for found in MATH.findall(text)]


def _defined() -> list[str]:
    """Symbols of the first column of each table, before what an equals sign says of them."""
    rows = PAGE.split("(their-letters)=")[0].splitlines()
    first = [row.split("|")[1] for row in rows if row.startswith("| $")]
    return [
        re.split(r" = ", name)[0].strip()
        for cell in first
        for name in re.findall(r"\$([^$]+)\$", cell)
    ]


def test_a_symbol_is_defined_once() -> None:
    twice = {name: n for name, n in Counter(_defined()).items() if n > 1}
    assert len(_defined()) > 60 and not twice


@pytest.mark.parametrize("now", FORMER)
def test_no_letter_has_its_former_meaning(now: str) -> None:
    former = re.compile(FORMER[now])
    sources = [*CHAPTERS, *EXERCISES, *sorted((ROOT / "gradinv_edu").rglob("*.py"))]
    found = [
        f"{path.name}: {math}" for path in sources for math in _told(path) if former.search(math)
    ]
    assert not found


def test_a_former_meaning_would_be_seen() -> None:
    old = r"z = T x + b$ $\sigma'(z)$ $G = K X = L R$ $F P + F c f^2 - F^2$ $k_f(p)"
    assert sum(bool(re.search(former, old)) for former in FORMER.values()) >= 6
