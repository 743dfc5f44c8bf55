"""The tables of the instructor's guide, made from the notebooks and the known mistakes."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from checks.verdict import Mistakes, Student, WrongAnswerError
from editions import Exercise, Notebook, exercises_of, mark_of, read, solutions, source_of, sources

from gradinv_edu.kit import quiz

Room = tuple[dict[str, Any], dict[str, str]]

KINDS = ("sections", "exercises", "objectives", "mistakes")
MINUTES = re.compile(r"[Aa]bout (\d+) minutes")
CODE_WORDS = 40  # reading and running a cell takes about as long as reading so many words
QUESTION_WORDS = 80  # a question of the quiz likewise, with what its answers say
STEP = 5  # minutes to which sections are rounded
OBJECTIVE = re.compile(r"^- (.+)$", re.MULTILINE)


def objectives_of(chapter: Path) -> list[str]:
    """Read what a chapter says its reader will be able to do: the list in its first cell."""
    return [
        line[0].upper() + line[1:].rstrip(".;")
        for line in OBJECTIVE.findall(_opening(read(chapter)))
    ]


def _opening(notebook: Notebook) -> str:
    """Return the cell that states minutes and objectives: the first, or the first that does."""
    texts = [source_of(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    return next((text for text in texts if MINUTES.search(text)), texts[0])


def chapters(exercises: Path) -> list[Path]:
    """List the chapters of the book that the folder ``exercises`` belongs to."""
    return sorted((exercises.parent / "book").glob("[0-9]*.ipynb"))


def title_of(chapter: Path) -> str:
    """Read the title of a notebook."""
    return source_of(read(chapter)["cells"][0]).splitlines()[0].removeprefix("# ")


def tables(exercises: Path) -> dict[str, str]:
    """Make every generated table of the guide.

    Returns
    -------
    dict of str
        Markdown: ``"sections"`` shares out each chapter's minutes, ``"exercises"`` lists the
        exercises, ``"objectives"`` is the matrix of objectives and exercises, ``"mistakes"``
        that of exercises and planted mistakes with the hints they earn.
    """
    makers = (section_table, exercise_table, objective_table, mistake_table)
    return {kind: make(exercises) for kind, make in zip(KINDS, makers, strict=True)}


def section_table(exercises: Path) -> str:
    """Share the minutes that a chapter states out among its sections, by their length."""
    lines = ["| Chapter | Section | Minutes |", "|---|---|---|"]
    for chapter in chapters(exercises):
        stated, shares = minutes_of(chapter)
        lines.append(f"| **{title_of(chapter)}** | | **{stated}** |")
        lines += [f"| | {section} | {minutes or 'under 5'} |" for section, minutes in shares]
    return "\n".join(lines)


def minutes_of(chapter: Path) -> tuple[int, list[tuple[str, int]]]:
    """Return the minutes that a chapter states, and those of each section, in steps of five."""
    cells = read(chapter)["cells"]
    found = MINUTES.search(_opening({"cells": cells}))
    stated = int(found[1]) if found else 60
    lengths: dict[str, int] = {}
    section = "Introduction"
    for cell in cells:
        if cell["cell_type"] == "code":
            lengths[section] = lengths.get(section, 0) + _words(source_of(cell), chapter.stem)
            continue
        for line in source_of(cell).splitlines():
            section = line.removeprefix("## ") if line.startswith("## ") else section
            lengths[section] = lengths.get(section, 0) + len(line.split())
    return stated, _shared_out(stated, lengths)


def _words(code: str, stem: str) -> int:
    return QUESTION_WORDS * len(quiz.load(stem).questions) if "quiz.load" in code else CODE_WORDS


def _shared_out(stated: int, lengths: dict[str, int]) -> list[tuple[str, int]]:
    """Largest remainders: steps that add up to the whole."""
    exact = {name: n * stated / sum(lengths.values()) / STEP for name, n in lengths.items()}
    steps = {name: int(share) for name, share in exact.items()}
    left = stated // STEP - sum(steps.values())
    for name in sorted(exact, key=lambda name: steps[name] - exact[name])[:left]:
        steps[name] += 1
    return [(name, STEP * count) for name, count in steps.items()]


def exercise_table(exercises: Path) -> str:
    """List every exercise with what its card says."""
    lines = [
        "| | Exercise | To | Kind | Difficulty | Minutes | Points |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sources(exercises):
        cards = exercises_of(read(path))
        lines += [
            f"| {e.number} | {e.title} | {e.goal} | {e.kind} | {'●' * e.difficulty} | {e.minutes} "
            f"| {e.points} |"
            for e in cards
        ]
        lines.append(
            f"| | **{_chapter_title(path)}, in all** | | | | **{sum(e.minutes for e in cards)}** "
            f"| **{sum(e.points for e in cards)}** |"
        )
    return "\n".join(lines)


def objective_table(exercises: Path) -> str:
    """List every objective with the exercises that train it and the questions that test it."""
    lines = ["| Chapter | Objective | Exercises | Questions |", "|---|---|---|---|"]
    for chapter in [*chapters(exercises), *_without_a_chapter(exercises)]:
        lines.append(f"| **{title_of(chapter)}** | | | |")
        for objective, trained, tested in coverage(chapter, exercises):
            cells = (objective, ", ".join(trained), ", ".join(tested))
            lines.append(f"| | {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(lines)


def coverage(chapter: Path, exercises: Path) -> list[tuple[str, list[str], list[str]]]:
    """Return each objective of a chapter, its exercises and its questions in the quiz."""
    source = exercises / "source" / chapter.stem / chapter.name
    cards = exercises_of(read(source)) if source.exists() else []
    return [
        (objective, trains(cards, number), tests(chapter.stem, number))
        for number, objective in enumerate(objectives_of(chapter), start=1)
    ]


def _without_a_chapter(exercises: Path) -> list[Path]:
    return [path for path in sources(exercises) if chapter_of(path) == path]


def tests(stem: str, objective: int) -> list[str]:
    """Name the questions of a chapter's quiz that test an objective."""
    questions = quiz.load(stem).questions if stem in quiz.names() else ()
    numbered = enumerate(questions, start=1)
    return [f"Q{number}" for number, question in numbered if objective in question.objectives]


def trains(cards: list[Exercise], objective: int) -> list[str]:
    """Name the exercises that train an objective."""
    return [e.number for e in cards if objective in e.objectives]


def chapter_of(source: Path) -> Path:
    """Return the chapter that an assignment belongs to; the capstone is its own."""
    chapter = source.parents[3] / "book" / source.name
    return chapter if chapter.exists() else source


def _chapter_title(source: Path) -> str:
    return title_of(chapter_of(source))


def mistake_table(exercises: Path) -> str:
    """List every known mistake with the hint that it earns."""
    lines = ["| Exercise | Mistake | What the student is told |", "|---|---|---|"]
    for path in sources(exercises):
        for card, mistake, hint in verdicts(path):
            name = mistake.__name__.replace("_", " ")
            lines.append(
                f"| {card.number} {card.title} | {name} | {hint.replace('|', chr(92) + '|')} |"
            )
    return "\n".join(lines)


@cache
def verdicts(path: Path) -> list[tuple[Exercise, Student, str]]:
    """Try every known mistake of an assignment; what each is told."""
    source = read(path)
    room = classroom(source)
    return [
        (card, mistake, verdict_on(mistake, card, room))
        for card in exercises_of(source)
        for mistake in Mistakes.KNOWN[card.solution]
    ]


def classroom(source: Notebook) -> Room:
    """Run the set-up and the solutions of an assignment.

    Returns what they defined, and the text of each grading cell, hidden tests included.
    """
    namespace: dict[str, Any] = {}
    grading = {}
    with redirect_stdout(io.StringIO()):
        for cell in solutions(source)["cells"]:
            if cell["cell_type"] == "code" and mark_of(cell).get("grade"):
                grading[mark_of(cell)["grade_id"]] = source_of(cell)
                import_module(source_of(cell).split()[1])  # from checks.… import
            elif cell["cell_type"] == "code" and mark_of(cell):
                exec(source_of(cell), namespace)
    return namespace, grading


def verdict_on(answer: object, exercise: Exercise, room: Room) -> str:
    """Say what the grading cell of ``exercise`` says about ``answer``; empty if it is right."""
    namespace, grading = room
    try:
        with redirect_stdout(io.StringIO()):
            exec(grading[exercise.check], {**namespace, exercise.target: answer})
    except WrongAnswerError as verdict:
        return " ".join(str(verdict).split())
    return ""


def renewed(guide: str, made: dict[str, str]) -> str:
    """Put tables between their marks in the text of the guide."""
    for kind, table in made.items():
        begin, end = f"<!-- generated: {kind} -->", f"<!-- end of {kind} -->"
        pattern = re.compile(f"{begin}.*?{end}", re.DOTALL)
        guide = pattern.sub(lambda _, t=table, b=begin, e=end: f"{b}\n{t}\n{e}", guide)  # type: ignore[misc]
    return guide
