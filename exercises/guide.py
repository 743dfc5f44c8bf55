"""The tables behind the instructor's guide, made from the notebooks and the known mistakes."""

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

KINDS = ("syllabi", "exercises", "objectives", "mistakes")
SPINE = ("00", "01", "02", "03", "04", "05", "10", "11", "12", "13", "14", "15", "17", "18")
WEEKS = {
    4: ("00", "01", "02", "03", "04", "05"),
    8: SPINE,
    14: (),
}  # chapters of each plan; none is all
MINUTES = re.compile(r"[Aa]bout (\d+) minutes")
STEP = 5  # minutes by which a week grows
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
    """Make every table, a page each.

    Returns
    -------
    dict of str
        Markdown: ``"syllabi"`` shares the chapters out over weeks, ``"exercises"`` lists the
        exercises, ``"objectives"`` is the matrix of objectives and exercises, ``"mistakes"`` that
        of exercises and planted mistakes with their hints.
    """
    makers = (syllabi, exercise_table, objective_table, mistake_table)
    return {
        kind: f"# {make.__doc__.splitlines()[0].rstrip('.')}\n\n{make(exercises)}\n"  # type: ignore[union-attr]
        for kind, make in zip(KINDS, makers, strict=True)
    }


def syllabi(exercises: Path) -> str:
    """Chapters and exercises by week, from the chapters' own minutes."""
    return "\n\n".join(syllabus(exercises, weeks) for weeks in WEEKS)


def syllabus(exercises: Path, weeks: int) -> str:
    """Share chapters out over weeks: in order, whole, each week about as long as the others."""
    every = chapters(exercises)
    chosen = [c for c in every if c.stem[:2] in WEEKS[weeks] or not WEEKS[weeks]]
    minutes = {chapter: minutes_of(chapter) for chapter in chosen}
    plan = _weeks(chosen, minutes, weeks)
    lines = [
        f"## {weeks} weeks\n",
        "| Week | Chapters | To read | Exercises | To solve |",
        "|---|---|---|---|---|",
    ]
    for number, group in enumerate(plan, start=1):
        cards = [e for c in group for e in _cards(exercises, c)]
        names = "; ".join(f"{c.stem[:2].lstrip('0') or '0'} {title_of(c)}" for c in group)
        read_, solve = sum(minutes[c] for c in group), sum(e.minutes for e in cards)
        each = [_cards(exercises, c) for c in group]
        told = ", ".join(f"{part[0].number} to {part[-1].number}" for part in each if part)
        lines.append(f"| {number} | {names} | {read_} min | {told} | {solve} min |")
    for number in range(len(plan) + 1, weeks + 1):
        last = "the capstone | | C.1 | 135 min" if number == len(plan) + 1 else "a project | | |"
        lines.append(f"| {number} | {last} |")
    left = [c.stem[:2].lstrip("0") or "0" for c in every if c not in chosen]
    lines.append(f"\nLeft out: chapters {', '.join(left)}." if left else "\nNothing is left out.")
    return "\n".join(lines)


def _cards(exercises: Path, chapter: Path) -> list[Exercise]:
    source = exercises / "source" / chapter.stem / chapter.name
    return exercises_of(read(source)) if source.exists() else []


def _weeks(chosen: list[Path], minutes: dict[Path, int], weeks: int) -> list[list[Path]]:
    """Cut a sequence into as many parts, so that the longest is as short as can be."""
    parts = weeks if weeks <= 4 else weeks - 1  # the last is the capstone's
    longest = max(minutes.values())
    while len(plan := _filled(chosen, minutes, longest)) > parts:
        longest += STEP
    return plan


def _filled(chosen: list[Path], minutes: dict[Path, int], longest: int) -> list[list[Path]]:
    plan: list[list[Path]] = [[]]
    for chapter in chosen:
        if plan[-1] and sum(minutes[c] for c in plan[-1]) + minutes[chapter] > longest:
            plan.append([])
        plan[-1].append(chapter)
    return plan


def minutes_of(chapter: Path) -> int:
    """Return the minutes that a chapter states; 60 where it states none."""
    found = MINUTES.search(_opening(read(chapter)))
    return int(found[1]) if found else 60


def exercise_table(exercises: Path) -> str:
    """Every exercise with what its card says."""
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
    """Objectives, with the exercises that train them and the questions that test them."""
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
    """Typical mistakes, with the hint that each earns."""
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
