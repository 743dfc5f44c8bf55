"""Every assignment: its solutions pass, its stubs fail, its planted mistakes get their hints."""

from __future__ import annotations

import re
from collections import Counter
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from gradinv_edu.coursework import editions, guide, mistakes
from gradinv_edu.coursework.__main__ import drifted, made
from gradinv_edu.coursework.editions import Exercise, mark_of, source_of

EXERCISES = Path(__file__).parents[1] / "exercises"
SOURCES = editions.sources(EXERCISES)
NAMES = [path.stem for path in SOURCES]
NUMBERED = [name for name in NAMES if name[0].isdigit()]
ROOMS: dict[str, tuple[mistakes.Namespace, dict[str, str]]] = {}


def _source(stem: str) -> editions.Notebook:
    return editions.read(EXERCISES / "source" / stem / f"{stem}.ipynb")


def _student(stem: str) -> editions.Notebook:
    return editions.read(EXERCISES / "student" / stem / f"{stem}.ipynb")


def _room(stem: str) -> tuple[mistakes.Namespace, dict[str, str]]:
    if stem not in ROOMS:
        ROOMS[stem] = mistakes.classroom(_source(stem))
    return ROOMS[stem]


def _planted(stem: str) -> list[mistakes.Mistake]:
    return mistakes.load(EXERCISES / "mistakes" / f"{stem}.py")


CARDS = [(stem, card) for stem in NAMES for card in editions.exercises_of(_source(stem))]
PLANTED = [(stem, mistake) for stem in NAMES for mistake in _planted(stem)]


def _named(case: tuple[str, Any]) -> str:
    what = case[1]
    return f"{case[0]}-{what.number if isinstance(what, Exercise) else what.answer.__name__}"


@pytest.mark.parametrize("case", CARDS, ids=_named)
def test_the_solution_is_right(case: tuple[str, Exercise]) -> None:
    stem, card = case
    room = _room(stem)
    assert mistakes.verdict_on(room[0][card.target], card, room) == ""


@pytest.mark.parametrize("case", CARDS, ids=_named)
def test_the_untouched_stub_is_told_so(case: tuple[str, Exercise]) -> None:
    stem, card = case
    cells = {mark_of(cell).get("grade_id"): source_of(cell) for cell in _student(stem)["cells"]}
    stubs: dict[str, Any] = {}
    exec(cells[card.solution], stubs)
    assert "Not done yet" in mistakes.verdict_on(stubs[card.target], card, _room(stem))


@pytest.mark.parametrize("case", PLANTED, ids=_named)
def test_a_planted_mistake_gets_its_hint(case: tuple[str, mistakes.Mistake]) -> None:
    stem, mistake = case
    cards = {card.solution: card for name, card in CARDS if name == stem}
    hint = mistakes.verdict_on(mistake.answer, cards[mistake.exercise], _room(stem))
    assert hint and mistake.says in hint


@pytest.mark.parametrize("case", CARDS, ids=_named)
def test_at_least_four_mistakes_are_planted_in_each(case: tuple[str, Exercise]) -> None:
    stem, card = case
    assert sum(mistake.exercise == card.solution for mistake in _planted(stem)) >= 4


@pytest.mark.parametrize("stem", NUMBERED)
def test_an_assignment_rises_from_deriving_to_judging(stem: str) -> None:
    cards = [card for name, card in CARDS if name == stem]
    assert 3 <= len(cards) <= 5
    assert [card.number for card in cards] == [
        f"{int(stem[:2])}.{place}" for place in range(1, len(cards) + 1)
    ]
    assert {card.kind for card in cards} == {"Derive", "Implement", "Break", "Judge"}
    assert cards[0].difficulty == min(card.difficulty for card in cards)
    assert cards[-1].difficulty == max(card.difficulty for card in cards)


@pytest.mark.parametrize("stem", NAMES)
def test_every_objective_of_the_chapter_is_trained(stem: str) -> None:
    cards = [card for name, card in CARDS if name == stem]
    chapter = guide.chapter_of(EXERCISES / "source" / stem / f"{stem}.ipynb")
    assert chapter.parent.name == ("book" if stem in NUMBERED else stem)
    objectives = guide.objectives_of(chapter)
    assert {n for card in cards for n in card.objectives} == set(range(1, len(objectives) + 1))


@pytest.mark.parametrize("stem", NAMES)
def test_a_source_holds_no_outputs_and_asks_for_python3(stem: str) -> None:
    source = _source(stem)
    code = [cell for cell in source["cells"] if cell["cell_type"] == "code"]
    assert not [cell for cell in code if cell["outputs"] or cell["execution_count"]]
    assert source["metadata"]["kernelspec"]["name"] == "python3"
    assert set(source["metadata"]) == {"kernelspec"}


def test_names_are_unique_in_the_course() -> None:
    """A renamed notebook is known by the names of its cells."""
    names = [
        mark_of(cell)["grade_id"]
        for stem in NAMES
        for cell in _source(stem)["cells"]
        if mark_of(cell)
    ]
    assert not [name for name, count in Counter(names).items() if count > 1]


def test_nothing_generated_has_drifted() -> None:
    """If this fails: python -m gradinv_edu.coursework."""
    assert not drifted(made(EXERCISES))
    students = {path.stem for path in (EXERCISES / "student").glob("*/*.ipynb")}
    assert students == set(NAMES)


@pytest.mark.parametrize("stem", NAMES)
def test_no_solution_is_in_the_student_edition(stem: str) -> None:
    issued = "\n".join(source_of(cell) for cell in _student(stem)["cells"])
    assert "BEGIN" not in issued and "END" not in issued
    assert _secrets(stem)
    assert not [line for line in _secrets(stem) if line in issued]


def _secrets(stem: str) -> list[str]:
    """Every line of the solutions and hidden tests that is long enough to be told."""
    text = "\n".join(source_of(cell) for cell in _source(stem)["cells"])
    parts = re.findall(r"### BEGIN.*?\n(.*?)\s*### END", text, re.DOTALL)
    lines = [line.strip() for part in parts for line in part.splitlines()]
    return [line for line in lines if len(line) > 12]


def test_the_guide_has_every_table() -> None:
    text = (EXERCISES / "README.md").read_text()
    assert all(f"<!-- generated: {kind} -->" in text for kind in guide.KINDS)
    assert "not caught" not in text


BUILT = EXERCISES.parent / "_build" / "html"
TAG = re.compile(r"<[^>]+>")


def test_the_built_book_holds_no_mark_of_a_solution() -> None:
    """Pages, search index, sources and downloads, if the book is built."""
    secrets = ["BEGIN SOLUTION", "BEGIN HIDDEN", "END SOLUTION", "END HIDDEN"]
    kinds = {".html", ".js", ".ipynb", ".txt", ".json", ".md"}
    for path in (p for p in BUILT.rglob("*") if p.suffix in kinds):
        content = TAG.sub("", path.read_text(errors="ignore"))
        assert not [secret for secret in secrets if secret in content], path


@pytest.mark.parametrize("stem", NAMES)
def test_a_page_of_exercises_holds_no_solution(stem: str) -> None:
    for page in BUILT.rglob(f"exercises/**/{stem}.html"):
        shown = unescape(TAG.sub("", page.read_text()))
        assert "NotImplementedError" in shown
        assert not [line for line in _secrets(stem) if line in shown], page
