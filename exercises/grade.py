"""Grade notebooks: ``python exercises/grade.py PATH …``, files or folders of a whole class.

A submission's cells run in a process shut in (``answering``, ``sandbox``); the checks run here, on
their own data, and only compare the values that come back. So a submission cannot reach its mark.
``--csv`` writes marks, ``--gradebook`` fills in a gradebook exported from Canvas or Moodle.
Exit status: 0 full marks, 1 points missing, 2 nothing could be graded, 3 the time ran out.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import io
import json
import os
import re
import secrets
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any

import editions
import sandbox
from checks.verdict import Mistakes, WrongAnswerError, pattern
from editions import HERE, Exercise, Notebook, mark_of, source_of
from submission import EndedError, Runner, Session, tidy

from gradinv_edu.engine.files import write_whole
from gradinv_edu.errors import GradientInversionError, InvalidArgumentError

FULL, PARTLY, UNGRADABLE, TOO_SLOW = 0, 1, 2, 3
SECONDS = 60.0  # for one exercise
GIGABYTES = 4.0
MEGABYTES = 50  # of the largest file that is opened
ALIKE = 60  # nodes of a syntax tree from which on equal answers are worth a look
KNOWN = {
    *("torch", "math", "gradinv_edu", "checks", "numpy", "itertools", "functools", "statistics"),
    *("collections", "dataclasses", "typing", "matplotlib", "__future__", "random", "copy"),
}


@dataclass(frozen=True)
class Mark:
    """What one exercise earned, what to say about it, and the name of the known mistake."""

    exercise: Exercise
    points: float
    hint: str = ""
    mistake: str = ""


@dataclass(frozen=True)
class Report:
    """What a submission earned.

    Attributes
    ----------
    student, assignment : str
        Whose it is, by the file's place; and of which assignment.
    marks : tuple of Mark
        One for each exercise, in order.
    notes : tuple of str
        What a lecturer should look at: what the submission tried, cells that are missing.
    shapes : dict of str
        From an exercise's number to the shape of its answer, names left out, where it is long.
    """

    student: str
    assignment: str
    marks: tuple[Mark, ...]
    notes: tuple[str, ...] = ()
    shapes: tuple[tuple[str, str], ...] = ()

    @property
    def points(self) -> float:
        """Points earned."""
        return sum(mark.points for mark in self.marks)

    @property
    def most(self) -> int:
        """Points to be had."""
        return sum(mark.exercise.points for mark in self.marks)

    def __str__(self) -> str:
        lines = [f"{self.assignment}, {self.student}: {self.points:g} of {self.most} points"]
        for mark in self.marks:
            e = mark.exercise
            lines.append(f"  {e.number} {e.title:<44} {mark.points:g} of {e.points}")
            lines += [f"      {mark.hint}"] if mark.hint else []
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])


def student_of(path: Path) -> str:
    """Whose notebook it is: by folder, as nbgrader and Moodle have it, or by Canvas's file name."""
    folder = path.resolve().parent
    if folder.name.endswith("_assignsubmission_file") or "_assignsubmission_" in folder.name:
        return folder.name.split("_")[0]
    canvas = re.match(r"([^_]+)_(?:LATE_)?\d+_\d+_", path.name)
    if canvas:
        return canvas[1]
    stems = {source.stem for source in editions.sources(HERE)}
    if folder.name in stems:
        return folder.parent.name
    return folder.name if path.stem in stems else path.stem


def variant(student: str, secret: str) -> int:
    """The seed of a student's own data: the same for the same name and secret, and no other."""
    return int.from_bytes(hashlib.sha256(f"{secret}|{student}".encode()).digest()[:4], "big") % 9973


def grade(
    path: Path,
    exercises: Path = HERE,
    seconds: float = SECONDS,
    gigabytes: float = GIGABYTES,
    secret: str = "",
    runner: Runner | None = None,
) -> Report:
    """Grade one notebook.

    Parameters
    ----------
    path : Path
        The submission.
    exercises : Path
        The folder that holds ``source``; default: the one of this file.
    seconds, gigabytes : float
        Limits of each exercise.
    secret : str
        With the student's name it makes the seed of the data; whoever knows it knows the data.
    runner : Runner, optional
        One that runs already.

    Raises
    ------
    InvalidArgumentError
        If the file is no notebook, none of this course, or far too large.
    """
    size = path.stat().st_size / 2**20 if path.exists() else 0
    if size > MEGABYTES:
        raise InvalidArgumentError(
            f"{path} has {size:.0f} MB, over {MEGABYTES}: its outputs are too long. Choose “Clear "
            "all outputs” in Jupyter, save, and hand in that file."
        )
    submission = editions.read(path)
    found = assignment(submission, exercises)
    source, student = editions.read(found), student_of(path)
    cells = answers(submission, source)
    running = runner or Runner()
    limits = {"seconds": seconds, "gigabytes": gigabytes}
    try:
        graded = [
            _graded(exercise, source, cells, variant(student, secret), running, limits)
            for exercise in editions.exercises_of(source)
        ]
    finally:
        if runner is None:
            running.close()
    notes = [note for _, told in graded for note in told]
    code = "\n".join(text for name, text in cells if name != "set-up")
    notes += suspicions(code, "\n".join(source_of(c) for c in source["cells"]))
    shapes = tuple(_shapes(submission, source))
    marks = tuple(mark for mark, _ in graded)
    return Report(student, found.stem, marks, tuple(dict.fromkeys(notes)), shapes)


def assignment(submission: Notebook, exercises: Path) -> Path:
    """Find the source that a submission belongs to, by the names of its cells.

    Raises
    ------
    InvalidArgumentError
        If it has no cell of any assignment.
    """
    ids = set(_ids(submission))
    sources = editions.sources(exercises)
    common = {path: len(ids & set(_ids(editions.read(path)))) for path in sources}
    best = max(common, key=lambda path: common[path], default=None)
    if best is None or not common[best]:
        raise InvalidArgumentError(
            "This notebook holds no exercise of this course: the names that the cells carry in "
            "their metadata are missing. Hand in a notebook that began as one of "
            "exercises/student/."
        )
    return best


def _ids(notebook: Notebook) -> list[str]:
    return [str(mark_of(c)["grade_id"]) for c in notebook["cells"] if "grade_id" in mark_of(c)]


def answers(submission: Notebook, source: Notebook) -> list[tuple[str, str]]:
    """Take a student's answers and own cells out of a submission; all else is the course's.

    Returns
    -------
    list of (str, str)
        Name of the cell, empty for a student's own, and its code: the set-up first.
    """
    code = [cell for cell in source["cells"] if cell["cell_type"] == "code"]
    fill = {str(mark_of(c)["grade_id"]) for c in code if mark_of(c).get("solution")}
    ours = {source_of(cell).strip() for cell in code if not mark_of(cell)}
    setup = [source_of(c) for c in code if mark_of(c) and not mark_of(c).get("grade")]
    setup = [text for c, text in zip(code, setup, strict=False) if not mark_of(c).get("solution")]
    cells = [("set-up", text) for text in setup]
    for cell in submission["cells"]:
        name = str(mark_of(cell).get("grade_id", ""))
        text = source_of(cell)
        own = cell["cell_type"] == "code" and not name and text.strip() not in ours
        if name in fill or own:
            cells.append((name, text))
    return cells


def _graded(
    exercise: Exercise,
    source: Notebook,
    cells: list[tuple[str, str]],
    seed: int,
    runner: Runner,
    limits: dict[str, float],
) -> tuple[Mark, list[str]]:
    places = [i for i, (name, _) in enumerate(cells) if name == exercise.solution]
    if len(places) != 1:
        what = "is missing" if not places else "is there more than once"
        note = f"The cell {exercise.solution} {what}: start from a fresh copy of the assignment."
        return Mark(exercise, 0, note), [note]
    text = next(source_of(c) for c in source["cells"] if exercise.check in _ids({"cells": [c]}))
    run = [(i, code) for i, (_, code) in enumerate(cells) if i <= places[0]]
    import_module(text.split()[1])  # from checks.… import: the mistakes say what is forbidden
    own = Mistakes.OWN.get(exercise.solution, ())
    session = Session(runner, run, exercise.target, own, **limits)
    points, hint = 0.0, ""
    try:
        with session, _alarm(limits["seconds"] + 30):
            if places[0] in session.failed:
                hint = f"Your cell does not run: {session.failed[places[0]]}"
            elif session.kind != "function":
                hint = f"There is no function {exercise.target}, but a {session.kind}."
            else:
                points, hint = checked(exercise, text, session.answer(), seed)
    except EndedError as error:
        hint = str(error)
    notes = [f"{exercise.number}: the code {note}." for note in session.notes]
    broken = [error for place, error in session.failed.items() if cells[place][0] == "set-up"]
    notes += [f"{exercise.number}: the course's own set-up failed: {e}" for e in broken]
    if session.ended:
        points, hint = 0.0, session.ended
        notes.append(f"{exercise.number}: {session.ended}")
    return Mark(exercise, points, hint, mistake_of(exercise, hint)), notes


def checked(exercise: Exercise, text: str, answer: Any, seed: int = 0) -> tuple[float, str]:
    """Run a grading cell, its hidden tests with seeds moved on by ``seed``; points and hint."""
    before, _, after = text.partition(editions.HIDDEN[0])
    moved = re.sub(r"seed=(\d+)", lambda m: f"seed={int(m[1]) + seed}", after)
    again = set(re.findall(r"^(\w+)\(", moved, re.MULTILINE))
    steps = ast.parse(before).body  # what the hidden tests ask again need not be asked twice
    first = [n for n in steps if ast.unparse(n).split("(")[0] not in again]
    names, share, hint = {exercise.target: answer}, 1.0, ""
    for part in ("\n".join(map(ast.unparse, first)), moved):
        try:
            with redirect_stdout(io.StringIO()):
                exec(compile(part, exercise.check, "exec"), names)
        except WrongAnswerError as verdict:
            share, hint = min(share, verdict.share), hint or tidy(verdict, 1000)
        except EndedError as error:
            share, hint = 0.0, str(error)
        except Exception as error:  # a value that no check foresaw
            share = 0.0
            hint = f"The check stopped at your answer: {type(error).__name__}: {tidy(error)}"
        if not share:
            break
    return round(2 * share * exercise.points) / 2, hint


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Let no answer keep a check busy for ever: one that is huge, say."""

    def late(*_: object) -> None:
        raise EndedError(f"Its answer kept the check busy for over {seconds:g} s.")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def suspicions(code: str, issued: str) -> list[str]:
    """Tell what code does that no exercise needs: it earns nothing, and is worth a look."""
    lines = [line for line in code.splitlines() if line.lstrip()[:1] not in ("%", "!", "?")]
    try:
        nodes = list(ast.walk(ast.parse("\n".join(lines))))
    except SyntaxError:
        return []
    modules, found = {"torch", "gi", "nn"}, []
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            aliases = [a.asname or a.name.split(".")[0] for a in node.names]
            modules |= set(aliases)
            outer = getattr(node, "module", None) or node.names[0].name
            if outer.split(".")[0] not in KNOWN and f"import {outer}" not in issued:
                found.append(f"imports {outer}")
    for node in nodes:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        for target in targets if isinstance(node, ast.Assign | ast.AugAssign) else ():
            if isinstance(target, ast.Attribute | ast.Subscript) and _base(target) in modules:
                found.append(f"changes {ast.unparse(target)}")
            if isinstance(target, ast.Name) and target.id.startswith("check_"):
                found.append(f"puts something in the place of {target.id}")
        name = getattr(node, "name", "") if isinstance(node, ast.FunctionDef) else ""
        if name.startswith(("check_", "__")) and name != "__init__":
            found.append(f"defines {name}")
        called = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
        if called in ("exec", "eval", "exit", "quit", "open", "__import__", "setattr"):
            found.append(f"calls {called}")
        if isinstance(node, ast.Attribute) and node.attr.startswith("__"):
            found.append(f"reaches for {node.attr}")
        if isinstance(node, ast.Name) and node.id in ("__builtins__", "globals", "vars"):
            found.append(f"reaches for {node.id}")
    return [f"The notebook {what}." for what in dict.fromkeys(found)]


def _base(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _shapes(submission: Notebook, source: Notebook) -> Iterator[tuple[str, str]]:
    cells = {str(mark_of(c).get("grade_id")): source_of(c) for c in submission["cells"]}
    for exercise in editions.exercises_of(source):
        shape = shape_of(cells.get(exercise.solution, ""))
        if shape:
            yield exercise.number, shape


def shape_of(code: str) -> str:
    """Give code without its names, comments and docstrings; empty if it is short or no code."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return ""
    if sum(1 for _ in ast.walk(tree)) < ALIKE:
        return ""
    for node in ast.walk(tree):
        for name in ("id", "arg", "name"):
            if isinstance(getattr(node, name, None), str):
                setattr(node, name, "_")
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            node.body = body[1:]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


# A class.


@dataclass(frozen=True)
class _Job:
    exercises: Path
    seconds: float
    gigabytes: float
    secret: str


_RUNNER: list[Runner] = []


def _one(path: Path, job: _Job) -> Report | str:
    if not _RUNNER or _RUNNER[0].process.poll() is not None:
        _RUNNER[:] = [Runner()]
    try:
        return grade(path, job.exercises, job.seconds, job.gigabytes, job.secret, _RUNNER[0])
    except GradientInversionError as error:
        return tidy(f"{path}: {error}", 1000)


def grade_all(paths: Sequence[Path], job: _Job, jobs: int) -> list[Report | str]:
    """Grade many notebooks, ``jobs`` at a time; a report of each, or why there is none."""
    if jobs == 1 or len(paths) == 1:
        return [_one(path, job) for path in paths]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_quiet) as pool:
        return list(pool.map(_one, paths, [job] * len(paths)))


def _quiet() -> None:
    import torch

    sandbox.hide_memory()
    torch.set_num_threads(1)


def notebooks(paths: Sequence[Path]) -> list[Path]:
    """Every notebook among these files and folders."""
    found = [
        nested
        for path in paths
        for nested in (sorted(path.rglob("*.ipynb")) if path.is_dir() else [path])
    ]
    return [p for p in found if ".ipynb_checkpoints" not in p.parts]


def alike(reports: Sequence[Report]) -> list[str]:
    """Name those whose long answers to an exercise are the same but for names and comments."""
    found: dict[tuple[str, str], list[str]] = {}
    for report in reports:
        for number, shape in report.shapes:
            found.setdefault((number, shape), []).append(report.student)
    groups = [(number, sorted({*who})) for (number, _), who in found.items()]
    return [f"{number}: {', '.join(who)}" for number, who in groups if len(who) > 1]


def statistics(reports: Sequence[Report]) -> str:
    """Say of a class which exercises are hard, and which mistakes are common."""
    lines = []
    for stem in dict.fromkeys(report.assignment for report in reports):
        group = [report for report in reports if report.assignment == stem]
        points = [report.points for report in group]
        rows = list(zip(*(report.marks for report in group), strict=True))
        rows.sort(key=lambda row: mean(m.points for m in row) / row[0].exercise.points)
        made = Counter(f"{m.exercise.number} {m.mistake}" for row in rows for m in row if m.mistake)
        hardest = rows[0][0].exercise
        lines += [
            f"{stem}: {len(group)} notebooks, mean {mean(points):.1f}, median "
            f"{median(points):g} of {group[0].most} points",
            f"  hardest exercise: {hardest.number} {hardest.title}",
            *(f"  commonest mistake: {name}, {n} times" for name, n in made.most_common(1)),
        ]
        for row in rows:
            exercise, solved = row[0].exercise, sum(m.points == m.exercise.points for m in row)
            lines.append(f"  {exercise.number} {exercise.title}: {solved} of {len(row)} solved")
            common = Counter(m.mistake or tidy(m.hint, 80) for m in row if m.hint).most_common(3)
            lines += [f"      {count} × {name}" for name, count in common]
    return "\n".join([*lines, *(f"Equal but for names, {who}" for who in alike(reports))])


def mistake_of(exercise: Exercise, hint: str) -> str:
    """Name the known mistake that a hint belongs to; empty if it is none's."""
    for mistake in Mistakes.KNOWN.get(exercise.solution, ()):
        if hint and re.fullmatch(pattern(mistake), hint):
            return mistake.__name__.replace("_", " ")
    return ""


def write_csv(reports: Sequence[Report], path: Path) -> None:
    """Write marks, a row a notebook: points by exercise, in all, and what to look at."""
    numbers = list(dict.fromkeys(m.exercise.number for r in reports for m in r.marks))
    file = io.StringIO(newline="")
    rows = csv.writer(file)
    rows.writerow(["student", "assignment", *numbers, "points", "of", "hints", "look at"])
    for report in reports:
        earned = {m.exercise.number: f"{m.points:g}" for m in report.marks}
        hints = " | ".join(f"{m.exercise.number}: {m.hint}" for m in report.marks if m.hint)
        row = [report.student, report.assignment, *(earned.get(n, "") for n in numbers)]
        row += [f"{report.points:g}", str(report.most), hints, " | ".join(report.notes)]
        rows.writerow([_harmless(cell) for cell in row])
    write_whole(path, file.getvalue())


def write_results(report: Report, path: Path) -> None:
    """Write what Gradescope reads: ``results.json``, a test for each exercise."""
    tests = [
        {"name": f"{m.exercise.number} {m.exercise.title}", "score": m.points,
         "max_score": m.exercise.points, "output": m.hint}
        for m in report.marks
    ]  # fmt: skip
    write_whole(path, json.dumps({"tests": tests}, ensure_ascii=False))


def _harmless(cell: str) -> str:
    """No spreadsheet takes it for a formula."""
    return f"'{cell}" if cell[:1] in ("=", "+", "-", "@") else cell


def fill_gradebook(reports: Sequence[Report], path: Path) -> int:
    """Fill points into a gradebook as Canvas or Moodle exported it; how many rows were found.

    A row belongs to a student if one of its cells is the student's name as the reports have it,
    in any order of words and letters' case. Moodle's "Grade" and "Feedback comments" are filled
    in; for Canvas, a column is named as the assignment.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))
    header, filled = rows[0], 0
    for stem in dict.fromkeys(report.assignment for report in reports):
        group = {_key(r.student): r for r in reports if r.assignment == stem}
        name = "Grade" if "Grade" in header else stem
        if name not in header:
            header.append(name)
        for row in rows[1:]:
            row += [""] * (len(header) - len(row))
            report = next((group[k] for k in map(_key, row) if k in group), None)
            if "Points Possible" in row[0]:
                row[header.index(name)] = str(next(iter(group.values())).most)
            if report is None:
                continue
            filled += 1
            row[header.index(name)] = f"{report.points:g}"
            if "Feedback comments" in header:
                hints = [f"{m.exercise.number}: {m.hint}" for m in report.marks if m.hint]
                row[header.index("Feedback comments")] = _harmless(" ".join(hints))
    file = io.StringIO(newline="")
    csv.writer(file).writerows(rows)
    write_whole(path, file.getvalue())
    return filled


def _key(name: str) -> str:
    return "".join(sorted(re.findall(r"\w+", name.lower())))


def main(arguments: Sequence[str] | None = None) -> int:
    """Grade what the command line names; return the exit status."""
    parser = argparse.ArgumentParser(prog="grade.py", description=__doc__)
    parser.add_argument("paths", type=Path, nargs="+", help="notebooks, or folders of them")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--csv", type=Path, help="write the marks here")
    parser.add_argument("--gradebook", type=Path, help="fill in this export of Canvas or Moodle")
    parser.add_argument("--results", type=Path, help="write one notebook's for Gradescope")
    parser.add_argument("--secret", default="", help="seed of the students' data, with their names")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for an exercise")
    parser.add_argument("--gigabytes", type=float, default=GIGABYTES, help="of memory, default 4")
    parser.add_argument("--exercises", type=Path, default=HERE, help="folder that holds source")
    options = parser.parse_args(arguments)
    sandbox.hide_memory()
    secret = options.secret or secrets.token_hex(4)
    job = _Job(options.exercises, options.seconds, options.gigabytes, secret)
    told = grade_all(notebooks(options.paths), job, options.jobs)
    reports = [report for report in told if isinstance(report, Report)]
    for report in told:
        print(report, file=sys.stdout if isinstance(report, Report) else sys.stderr)
    if len(reports) > 1:
        print(statistics(reports))
    if reports:
        print(f"(the students' data once more: --secret {secret})")
    if options.csv:
        write_csv(reports, options.csv)
    if options.results and reports:
        write_results(reports[0], options.results)
    if options.gradebook:
        print(f"{fill_gradebook(reports, options.gradebook)} rows filled in")
    if len(reports) < len(told) or not told:
        return UNGRADABLE
    if any("Time ran out" in mark.hint for report in reports for mark in report.marks):
        return TOO_SLOW
    return FULL if all(r.points == r.most for r in reports) else PARTLY


if __name__ == "__main__":
    sys.exit(main())
