"""Plausible mistakes, planted on purpose: each must be refused, and by the right hint.

``exercises/mistakes/NN_stem.py`` holds them as functions that a student might have written.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .editions import Exercise, Notebook, mark_of, solutions, source_of
from .wrong import WrongAnswerError

Namespace = dict[str, Any]


@dataclass(frozen=True)
class Mistake:
    """A wrong answer to one exercise, and a few words of the hint that it must earn."""

    exercise: str
    name: str
    says: str
    answer: Callable[..., Any]


def planted(exercise: str, says: str) -> Callable[[Callable[..., Any]], Mistake]:
    """Make a function a planted mistake of ``exercise``, refused by a hint that ``says`` so."""

    def plant(answer: Callable[..., Any]) -> Mistake:
        return Mistake(exercise, answer.__name__.replace("_", " "), says, answer)

    return plant


def load(path: Path) -> list[Mistake]:
    """Read the mistakes of one chapter, in the order in which they stand."""
    return [value for value in runpy.run_path(str(path)).values() if isinstance(value, Mistake)]


def classroom(source: Notebook) -> tuple[Namespace, dict[str, str]]:
    """Run everything but the grading cells, with all solutions in place.

    Returns
    -------
    Namespace, dict
        What the cells defined, and the text of each grading cell, hidden tests included.
    """
    namespace: Namespace = {}
    grading = {}
    for cell in solutions(source)["cells"]:
        if cell["cell_type"] == "code" and mark_of(cell).get("grade"):
            grading[mark_of(cell)["grade_id"]] = source_of(cell)
        elif cell["cell_type"] == "code":
            exec(source_of(cell), namespace)
    _close_figures()
    return namespace, grading


def _close_figures() -> None:
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def verdict_on(answer: object, exercise: Exercise, room: tuple[Namespace, dict[str, str]]) -> str:
    """Say what the grading cell of ``exercise`` says about ``answer``; empty if it is right."""
    namespace, grading = room
    try:
        exec(grading[exercise.check], {**namespace, exercise.target: answer})
    except WrongAnswerError as verdict:
        return str(verdict)
    return ""
