"""Grading: marks and hints, attempts to forge them, and what a class comes to."""

from __future__ import annotations

import csv
import json
import tomllib
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import editions
import pytest
from editions import HERE, Notebook, mark_of
from grade import (
    FULL,
    PARTLY,
    TOO_SLOW,
    UNGRADABLE,
    Report,
    alike,
    assignment,
    fill_gradebook,
    grade,
    main,
    shape_of,
    statistics,
    student_of,
    variant,
    write_csv,
)
from submission import Runner

from gradinv_edu.errors import InvalidArgumentError

SOURCES = editions.sources(HERE)
SOURCE = editions.read(SOURCES[0])
ATTACKS = tomllib.loads((Path(__file__).parent / "attacks.toml").read_text())


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    started = Runner()
    yield started
    started.close()


def _write(notebook: Notebook, path: Path) -> Path:
    editions.put({path: editions.text(notebook)})
    return path


CHECK = """from checks.verdict import ask, compare, normal


def check_f(f, seed=1):
    compare(ask(f, normal(seed, 3)), 2 * normal(seed, 3), "the double")


check_f(f)
### BEGIN HIDDEN TESTS
check_f(f, seed=11)
### END HIDDEN TESTS"""


def _small(tmp_path: Path, answer: str, extra: str = "", twice: bool = False) -> tuple[Path, Path]:
    """A course of one exercise, and a submission to it."""
    card = "## Exercise 1.1. One\n\n*Derive · difficulty 1 of 5 · 1 minutes · objectives 1*\n"
    card += "\n**Objective:** count.\n"
    fill = "def f(x):\n    ### BEGIN SOLUTION\n    return 2 * x\n    ### END SOLUTION"
    marks = {"schema_version": 3, "task": False, "locked": True}
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": card, "id": "a"},
        _code(fill, {"grade_id": "f", "solution": True, "grade": False, **marks}),
        _code(
            CHECK, {"grade_id": "f-check", "grade": True, "points": 2, "solution": False, **marks}
        ),
    ]
    source = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells}
    _write(source, tmp_path / "exercises" / "source" / "01_one" / "01_one.ipynb")
    handed = editions.student(source)
    handed["cells"][1]["source"] = answer
    if extra:
        handed["cells"].insert(1, _code(extra, {}))
    if twice:
        handed["cells"].append(deepcopy(cells[1]))
    return _write(handed, tmp_path / "mine.ipynb"), tmp_path / "exercises"


def _code(source: str, mark: dict[str, object]) -> dict[str, object]:
    metadata = {"nbgrader": mark} if mark else {}
    code = {"cell_type": "code", "outputs": [], "execution_count": None, "id": source[:9].strip()}
    return {**code, "metadata": metadata, "source": source}


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_gains_a_point_and_each_is_told(
    name: str, tmp_path: Path, runner: Runner
) -> None:
    attack, here = ATTACKS[name], str(HERE)
    code, told = (attack[key].replace("EXERCISES", here) for key in ("code", "told"))
    mine, exercises = _small(tmp_path, code, twice=attack.get("twice", False))
    before = (HERE / "checks" / "verdict.py").read_bytes()
    seconds = 3 if told == "Time ran out" else 60  # more than a busy machine needs
    report = grade(mine, exercises, seconds=seconds, gigabytes=2, secret="s", runner=runner)
    assert report.points == 0
    assert told in str(report)
    assert (HERE / "checks" / "verdict.py").read_bytes() == before


@pytest.mark.parametrize("place", ["patched_checks", "import_hook", "threads", "at_exit"])
def test_an_attack_harms_no_honest_answer_beside_it(
    place: str, tmp_path: Path, runner: Runner
) -> None:
    answer = "def f(x):\n    return 2 * x"
    extra = ATTACKS[place]["code"].split("def f(")[0]
    mine, exercises = _small(tmp_path, answer, extra if place != "threads" else "N = 1")
    report = grade(mine, exercises, seconds=60, runner=runner)
    assert report.points == 2
    assert bool(report.notes) == (place != "threads")  # an honest notebook is told nothing


def test_there_are_at_least_twenty_attacks() -> None:
    assert len(ATTACKS) >= 20


@pytest.mark.parametrize("path", [SOURCES[0]], ids=lambda path: path.stem)
def test_all_solutions_earn_full_marks(path: Path, tmp_path: Path, runner: Runner) -> None:
    mine = _write(editions.solutions(editions.read(path)), tmp_path / "renamed (1).ipynb")
    for secret in ("", "a", "b"):
        report = grade(mine, secret=secret, runner=runner)
        assert (report.points, report.notes) == (report.most, ())


def test_stubs_earn_nothing_and_are_told_so(tmp_path: Path, runner: Runner) -> None:
    report = grade(_write(editions.student(SOURCE), tmp_path / "mine.ipynb"), runner=runner)
    assert report.points == 0 < report.most
    assert all("Not done yet" in mark.hint for mark in report.marks)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        ("def f(x):\n    return 3 * x", "right direction, but is 1.5 times"),
        ("def f(x)\n    return 1", "does not run: SyntaxError"),
        ("f = 3", "no function f, but a int"),
        ("raise KeyError('n')", "does not run: KeyError"),
    ],
)
def test_what_a_wrong_answer_is_told(
    answer: str, hint: str, tmp_path: Path, runner: Runner
) -> None:
    mine, exercises = _small(tmp_path, answer)
    report = grade(mine, exercises, runner=runner)
    assert report.points == 0
    assert hint in report.marks[0].hint


def test_own_cells_and_magics_are_welcome(tmp_path: Path, runner: Runner) -> None:
    answer = "%matplotlib inline\ndef f(x):\n    return N * x"
    report = grade(*_small(tmp_path, answer, "N = 2"), runner=runner)
    assert (report.points, report.notes) == (2, ())


def test_what_the_exercise_asks_to_write_earns_nothing_when_called(
    tmp_path: Path, runner: Runner
) -> None:
    stem = "12_design"
    source = editions.read(HERE / "source" / stem / f"{stem}.ipynb")
    handed = editions.student(source)
    for cell in handed["cells"]:
        if mark_of(cell).get("grade_id") == "design-most":
            cell["source"] = "most_filters = gi.design.filter_bound"
    for bound in ("gi.design.filter_bound", "__import__('gradinv_edu').design.filter_bound"):
        for cell in handed["cells"]:
            if mark_of(cell).get("grade_id") == "design-most":
                cell["source"] = f"def most_filters(*a):\n    return {bound}(*a)"
        report = grade(_write(handed, tmp_path / "mine.ipynb"), runner=runner)
        assert report.marks[0].points == 0
        assert "this exercise asks you to do that yourself" in report.marks[0].hint
        assert any("asks to write" in note for note in report.notes)


def test_a_seed_belongs_to_a_name_and_a_secret() -> None:
    seeds = {variant(n, s) for n in ("ada", "bob") for s in ("", "x")}
    assert len(seeds) == 4
    assert variant("ada", "x") == variant("ada", "x")


def test_a_notebook_of_another_course() -> None:
    other = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": []}
    with pytest.raises(InvalidArgumentError, match="no exercise of this course"):
        assignment(other, HERE)


@pytest.mark.parametrize("content", ["", "{", json.dumps({"nbformat": 4}), None])
def test_an_unreadable_or_missing_file_ends_in_a_message(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.ipynb"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidArgumentError, match=r"mine\.ipynb cannot be read as a notebook"):
        grade(path)


def test_a_file_that_is_far_too_large(tmp_path: Path) -> None:
    path = tmp_path / "mine.ipynb"
    with path.open("wb") as file:
        file.truncate(51 * 2**20)
    with pytest.raises(InvalidArgumentError, match="has 51 MB, over 50: its outputs are too long"):
        grade(path)


# A class.


@pytest.mark.parametrize(
    ("path", "student"),
    [
        ("submitted/ada/01_perceptron/01_perceptron.ipynb", "ada"),
        ("Ada Lovelace_1234_assignsubmission_file_/01_perceptron.ipynb", "Ada Lovelace"),
        ("lovelaceada_LATE_123_456_01_perceptron-1.ipynb", "lovelaceada"),
        ("somewhere/ada/01_perceptron.ipynb", "ada"),
        ("somewhere/ada.ipynb", "ada"),
    ],
)
def test_whose_notebook_it_is(path: str, student: str) -> None:
    assert student_of(Path("/x") / path) == student


@pytest.fixture
def class_(tmp_path: Path, runner: Runner) -> list[Report]:
    answers = {"ada": "return 2 * x", "bob": "return 3 * x", "=eve": "return 3 * x"}
    reports = []
    for student, body in answers.items():
        mine, exercises = _small(tmp_path / student, f"def f(x):\n    {body}")
        reports.append(
            grade(mine.rename(mine.parent / f"{student}.ipynb"), exercises, runner=runner)
        )
    return reports


def test_what_a_class_comes_to(class_: list[Report], tmp_path: Path) -> None:
    said = statistics(class_)
    assert "3 notebooks, mean 0.7, median 0 of 2 points" in said
    assert "1 of 3 solved" in said and "2 × the double has the right direction" in said
    write_csv(class_, tmp_path / "marks.csv")
    with (tmp_path / "marks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["student"], row["points"]) for row in rows][:2] == [("ada", "2"), ("bob", "0")]
    assert rows[2]["student"] == "'=eve"  # no formula for a spreadsheet


def test_gradebooks_of_canvas_and_moodle_are_filled_in(
    class_: list[Report], tmp_path: Path
) -> None:
    canvas = tmp_path / "canvas.csv"
    canvas.write_text(
        "Student,ID,SIS Login ID,Section\n    Points Possible,,,\nAda,1,ada,A\nC,2,c,A\n"
    )
    assert fill_gradebook(class_, canvas) == 1
    rows = list(csv.reader(canvas.open()))
    assert [row[4] for row in rows] == ["01_one", "2", "2", ""]
    moodle = tmp_path / "moodle.csv"
    moodle.write_text("Identifier,Full name,Grade,Feedback comments\nP1,Bob,,\nP2,Ada,,\n")
    assert fill_gradebook(class_, moodle) == 2
    rows = list(csv.reader(moodle.open()))
    assert rows[1][2] == "0" and "1.5 times" in rows[1][3] and rows[2][2:] == ["2", ""]


def test_equal_answers_are_found_under_other_names() -> None:
    long = "def f(a, b):\n    '''Say.'''\n" + "".join(f"    a = a * b + {i}\n" for i in range(9))
    other = long.replace("a", "q").replace("b", "r").replace("'''Sqy.'''", "'x'")
    other = other.replace("    q = q * r + 0", "    q = q * r + 0  # mine").replace("qs", "as")
    assert shape_of("def f(a):\n    return 2 * a") == ""
    assert shape_of(long) and shape_of(long) != shape_of(long.replace("+", "-"))
    report = Report("x", "s", (), (), (("1.1", shape_of(long)),))
    same = Report("y", "s", (), (), (("1.1", shape_of(long.replace("a", "q"))),))
    assert alike([report, same]) == ["1.1: x, y"]
    assert alike([report, report]) == []


def test_a_class_from_the_students_repository_to_the_marks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One rightly, two with the same mistake, one not at all: as a lecturer would, in small."""
    students, staff = editions.repositories(tmp_path, HERE.parent)
    name = SOURCES[0].stem
    issued = editions.read(students / "exercises" / "student" / name / f"{name}.ipynb")
    right = {mark_of(c).get("grade_id"): c for c in editions.solutions(SOURCE)["cells"]}
    wrong = "def gradients(W, b, x, y):\n    k = y - (W @ x + b).sigmoid()\n    return k * x, k"
    for student, answer in {"ada": None, "bob": wrong, "eve": wrong, "kim": ""}.items():
        copy = deepcopy(issued)
        for cell in copy["cells"] if answer != "" else ():
            place = mark_of(cell).get("grade_id")
            if mark_of(cell).get("solution"):
                mine = answer if place == "perceptron-gradients" else None
                cell["source"] = mine or right[place]["source"]
        _write(copy, tmp_path / "handed in" / student / name / f"{name}.ipynb")
    files = ["--csv", str(tmp_path / "m.csv"), "--results", str(tmp_path / "results.json")]
    options = ["--exercises", str(staff / "exercises"), "--jobs", "2", *files]
    assert main([str(tmp_path / "handed in"), *options]) == PARTLY
    said = capsys.readouterr().out
    assert "hardest exercise: 1.1 Slopes by hand" in said
    assert "commonest mistake: 1.1 label minus prediction, 2 times" in said
    with (tmp_path / "m.csv").open(newline="") as file:
        marks = [(row["student"], row["points"]) for row in csv.DictReader(file)]
    assert marks == [("ada", "12"), ("bob", "10"), ("eve", "10"), ("kim", "0")]
    tests = json.loads((tmp_path / "results.json").read_text())["tests"]
    assert sum(test["score"] for test in tests) == 12 == sum(t["max_score"] for t in tests)


def test_the_command_grades_a_folder_and_says_how_it_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, exercises = _small(tmp_path, "def f(x):\n    return 3 * x")
    folder = tmp_path / "handed in"
    folder.mkdir()
    mine.rename(folder / "ada.ipynb")
    options = ["--exercises", str(exercises), "--jobs", "1"]
    assert main([str(folder), *options, "--csv", str(tmp_path / "m.csv")]) == PARTLY
    assert "01_one, ada: 0 of 2 points" in capsys.readouterr().out
    _small(tmp_path, "def f(x):\n    return 2 * x")
    assert main([str(tmp_path / "mine.ipynb"), *options]) == FULL
    _small(tmp_path, "def f(x):\n    while True: pass")
    assert main([str(tmp_path / "mine.ipynb"), *options, "--seconds", "1"]) == TOO_SLOW
    (folder / "bob.ipynb").write_text("{")
    assert main([str(folder), *options]) == UNGRADABLE
    assert "bob.ipynb cannot be read" in capsys.readouterr().err
