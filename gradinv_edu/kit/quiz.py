"""Questions at the end of a chapter, answered by a click: no kernel, no network.

One file a chapter is the source, ``quizzes/NN_stem.toml``. A cell of the chapter shows it as one
piece of HTML that works in the built page, in JupyterLab and on slides alike. Which answer is
right, and what is said of each, is encoded in the page, so that neither a glance at its source
nor the search index gives it away.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tomllib
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ..errors import InvalidArgumentError, UnknownNameError

__all__ = ["Choice", "Question", "Quiz", "as_html", "inline", "load", "names"]

FOLDER = Path(__file__).parent / "quizzes"
HERE = Path(__file__).parent
MARKUP = (
    (re.compile(r"`([^`]+)`"), r"<code>\1</code>"),
    (re.compile(r"\*([^*]+)\*"), r"<i>\1</i>"),
    (re.compile(r"_\{([^}]+)\}"), r"<sub>\1</sub>"),
    (re.compile(r"\^\{([^}]+)\}"), r"<sup>\1</sup>"),
)
HOW = "Choose an answer; each one, right or wrong, says why. Tab and Enter do as well as a click."
NO_SCRIPT = "Answers need JavaScript; in JupyterLab, run this cell once."


@dataclass(frozen=True)
class Choice:
    """One answer to choose.

    Attributes
    ----------
    text : str
        What is offered.
    because : str
        What is said when it is chosen.
    misconception : str
        The mistaken idea behind a wrong answer; empty for the right one.
    """

    text: str
    because: str
    misconception: str = ""

    @property
    def right(self) -> bool:
        """Whether this is the answer."""
        return not self.misconception


@dataclass(frozen=True)
class Question:
    """A question with one right answer.

    Attributes
    ----------
    ask : str
        The question.
    objectives : tuple of int
        Which of the chapter's objectives it tests, counted from 1.
    choices : tuple of Choice
        In the order in which they are shown, which says nothing of which one is right.
    """

    ask: str
    objectives: tuple[int, ...]
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Quiz:
    """The questions of a chapter; as the last value of a cell it shows itself.

    Attributes
    ----------
    stem : str
        The chapter's, such as ``"01_perceptron"``.
    questions : tuple of Question
        In their order.
    """

    stem: str
    questions: tuple[Question, ...]

    def __repr__(self) -> str:
        """Say how many questions there are."""
        return f"{len(self.questions)} questions on chapter {int(self.stem[:2])}"

    def _repr_html_(self) -> str:
        return as_html(self)


def names() -> list[str]:
    """List the chapters that have a quiz."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(stem: str) -> Quiz:
    """Read the quiz of a chapter.

    Parameters
    ----------
    stem : str
        The chapter's stem, such as ``"01_perceptron"``.

    Raises
    ------
    UnknownNameError
        If no chapter of that name has a quiz.
    InvalidArgumentError
        If its file lacks something that a question needs.
    """
    path = FOLDER / f"{stem}.toml"
    if not path.is_file():
        raise UnknownNameError(f"There is no quiz {stem!r}; there are {', '.join(names())}.")
    parts = tomllib.loads(path.read_text(encoding="utf-8"))["question"]
    return Quiz(stem, tuple(_question(part, stem) for part in parts))


def _question(part: dict[str, Any], stem: str) -> Question:
    try:
        right = Choice(part["right"], part["because"])
        wrong = [Choice(w["says"], w["because"], w["misconception"]) for w in part["wrong"]]
        question = Question(part["ask"], tuple(part["objectives"]), tuple(_order(right, wrong)))
    except KeyError as error:
        raise InvalidArgumentError(f"A question of {stem} has no {error}: {part}") from error
    return question


def _order(right: Choice, wrong: list[Choice]) -> list[Choice]:
    """Always the same order, and a different one for every question."""
    return sorted([right, *wrong], key=lambda c: hashlib.sha256(c.text.encode()).hexdigest())


def as_html(quiz: Quiz) -> str:
    """Write a quiz as HTML that needs nothing else."""
    parts = [_question_html(q, f"{quiz.stem}-{n}") for n, q in enumerate(quiz.questions, start=1)]
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("quiz.css", "quiz.js"))
    return (
        f'<div class="gi-quiz" role="group" aria-label="Questions">\n<style>\n{style}</style>\n'
        f'<p class="gi-quiz-how">{HOW}</p>\n<noscript><p>{NO_SCRIPT}</p></noscript>\n<ol>\n'
        + "\n".join(parts)
        + '\n</ol>\n<p class="gi-quiz-score" role="status"></p>\n'
        f"<script>\n{script}</script>\n</div>"
    )


def _question_html(question: Question, name: str) -> str:
    buttons = "\n".join(
        f'<button type="button" aria-pressed="false" data-say="{_hidden(choice)}">'
        f"{inline(choice.text)}</button>"
        for choice in question.choices
    )
    return (
        f'<li class="gi-question"><p id="q-{name}">{inline(question.ask)}</p>\n'
        f'<div role="group" aria-labelledby="q-{name}">\n{buttons}\n</div>\n'
        '<p class="gi-say" role="status"></p></li>'
    )


def _hidden(choice: Choice) -> str:
    said = [inline(choice.because), inline(choice.misconception), int(choice.right)]
    return base64.b64encode(json.dumps(said).encode()).decode()


def inline(text: str) -> str:
    """Turn the few marks that questions use into HTML: ```x```, ``*x*``, ``_{x}``, ``^{x}``."""
    made = escape(" ".join(text.split()), quote=False)
    for pattern, replacement in MARKUP:
        made = pattern.sub(replacement, made)
    return made
