"""Grading without a server: scores, hints, and what cannot be graded."""

from __future__ import annotations

import json
import sys
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
    AlteredNotebookError,
    assignment,
    grade,
    main,
    merge,
)

from gradinv_edu.errors import InvalidArgumentError

SOURCES = editions.sources(HERE)
SOURCE = editions.read(SOURCES[0])


@pytest.fixture(autouse=True, scope="module")
def _compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let the many fresh processes share compiled modules, whatever the environment says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        patch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.mktemp("compiled")))
        yield


@pytest.fixture
def student() -> Notebook:
    return editions.student(deepcopy(SOURCE))


@pytest.fixture
def solved() -> Notebook:
    return editions.solutions(deepcopy(SOURCE))


def _write(notebook: Notebook, path: Path) -> None:
    editions.put({path: editions.text(notebook)})


def _small(tmp_path: Path, answer: str, extra: str = "") -> tuple[Path, Path]:
    """A course of one exercise that starts fast, and a submission to it."""
    card = "## Exercise 1.1. One\n\n*Derive · difficulty 1 of 5 · 1 minutes · objectives 1*\n"
    card += "\n**Objective:** count.\n"
    fill = "def f():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION"
    hidden = "### BEGIN HIDDEN TESTS\nassert f() is not True\n### END HIDDEN TESTS"
    test = f"assert f() == 1, 'one'\n{hidden}"
    marks = {"schema_version": 3, "task": False}
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": card, "id": "a"},
        _code(fill, {"grade_id": "f", "solution": True, "grade": False, **marks}),
        _code(
            test, {"grade_id": "f-check", "grade": True, "points": 2, "solution": False, **marks}
        ),
    ]
    source = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells}
    _write(source, tmp_path / "exercises" / "source" / "01_one" / "01_one.ipynb")
    handed = editions.student(source)
    handed["cells"][1]["source"] = answer
    if extra:
        handed["cells"].insert(1, _code(extra, {}))
    _write(handed, tmp_path / "mine.ipynb")
    return tmp_path / "mine.ipynb", tmp_path / "exercises"


def _code(source: str, mark: dict[str, object]) -> dict[str, object]:
    metadata = {"nbgrader": mark} if mark else {}
    code = {"cell_type": "code", "outputs": [], "execution_count": None, "id": source[:9].strip()}
    return {**code, "metadata": metadata, "source": source}


@pytest.mark.parametrize("path", [SOURCES[0], SOURCES[-1]], ids=lambda path: path.stem)
def test_all_solutions_earn_full_marks(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "renamed (1).ipynb"
    _write(editions.solutions(editions.read(path)), mine)
    assert main([str(mine)]) == FULL
    said = capsys.readouterr().out
    assert said.startswith(f"{path.stem}: ") and "Note" not in said


def test_stubs_earn_nothing_and_are_told_so(tmp_path: Path, student: Notebook) -> None:
    mine = tmp_path / "mine.ipynb"
    _write(student, mine)
    report = grade(mine)
    assert report.points == 0 < report.most
    assert all("Not done yet" in mark.hint for mark in report.marks)


@pytest.mark.parametrize(
    ("answer", "points", "hint"),
    [
        ("def f():\n    return 1", 2, ""),
        ("def f():\n    return 2", 0, "AssertionError: one"),
        ("def f():\n    return True", 0, "AssertionError"),  # the hidden test
        ("def f(:\n    return 1", 0, "does not run: SyntaxError"),
        ("raise SystemExit", 0, "does not run: SystemExit"),
        ("%matplotlib inline\ndef f():\n    return 1", 2, ""),
        ("x = input()\ndef f():\n    return 1", 0, "does not run"),
    ],
)
def test_one_answer(tmp_path: Path, answer: str, points: int, hint: str) -> None:
    report = grade(*_small(tmp_path, answer))
    assert report.points == points
    assert hint in report.marks[0].hint
    assert not report.notes


def test_a_loop_without_an_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, exercises = _small(tmp_path, "while True:\n    pass")
    status = main([str(mine), "--exercises", str(exercises), "--seconds", "8"])
    assert status == TOO_SLOW
    assert "Time ran out after 8 s in cell f:" in capsys.readouterr().out


def test_a_process_that_ends_itself(tmp_path: Path) -> None:
    report = grade(*_small(tmp_path, "def f():\n    return 1", "import os\nos._exit(0)"))
    assert report.points == 0
    assert "ended its own process in cell number 2" in report.notes[0]


GREEDY = "x = [bytearray(2**28) for _ in range(1000)]\ndef f():\n    return 1"
FORKS = "import os\nwhile True:\n    os.fork()"
LONG = "print('a' * 10**8)\ndef f():\n    raise ValueError('b' * 10**6)"
WIDE = "with open('wide', 'wb') as file:\n    file.truncate(2**31)"


@pytest.mark.skipif(sys.platform != "linux", reason="limits are the system's")
@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (GREEDY, "does not run: It ran out of the memory that grading allows"),
        (FORKS, "does not run: RuntimeError: more than 32 processes started"),
        (LONG, "ValueError: bbb"),
        (WIDE, "does not run: OSError: [Errno 27] File too large"),
    ],
    ids=["memory", "forks", "output", "file"],
)
def test_what_takes_too_much_ends_in_a_message(tmp_path: Path, answer: str, hint: str) -> None:
    report = grade(*_small(tmp_path, answer), gigabytes=2)
    assert report.points == 0 and not report.notes
    assert hint in report.marks[0].hint and len(report.marks[0].hint) < 500


def test_a_child_that_a_cell_leaves_behind_grades_nothing(tmp_path: Path) -> None:
    report = grade(*_small(tmp_path, "def f():\n    return 1", "import os\nos.fork()"))
    assert report.points == 2 and not report.notes


def test_a_file_that_is_far_too_large(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.ipynb"
    with path.open("wb") as file:
        file.truncate(51 * 2**20)
    assert main([str(path)]) == UNGRADABLE
    assert "has 51 MB, over 50: its outputs are too long" in capsys.readouterr().err


def test_own_cells_are_welcome(tmp_path: Path) -> None:
    assert grade(*_small(tmp_path, "def f():\n    return N", "N = 1")).points == 2


def test_what_is_locked_is_restored(student: Notebook) -> None:
    for cell in student["cells"]:
        if mark_of(cell).get("grade"):
            cell["source"] = "pass"
    merged, restored = merge(student, SOURCE)
    assert restored == [card.check for card in editions.exercises_of(SOURCE)]
    checks = [cell for cell in merged["cells"] if mark_of(cell).get("grade")]
    assert all("HIDDEN TESTS" in editions.source_of(cell) for cell in checks)


def test_answers_stay_as_they_are(solved: Notebook) -> None:
    merged, restored = merge(solved, SOURCE)
    mine = [editions.source_of(c) for c in solved["cells"] if mark_of(c).get("solution")]
    kept = [editions.source_of(c) for c in merged["cells"] if mark_of(c).get("solution")]
    assert mine == kept and not restored


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda cells: cells.pop(_place(cells, "perceptron-recover")),
            "are missing: perceptron-recover",
        ),
        (lambda cells: cells.reverse(), "in another order"),
        (lambda cells: cells.append(cells[_place(cells, "perceptron-recover")]), "more than once"),
        (
            lambda cells: cells[_place(cells, "perceptron-recover")].update(cell_type="markdown"),
            "no longer code: perceptron-recover",
        ),
    ],
)
def test_an_altered_notebook_is_refused(
    student: Notebook, change: object, message: str, tmp_path: Path
) -> None:
    change(student["cells"])  # type: ignore[operator]
    _write(student, tmp_path / "mine.ipynb")
    with pytest.raises(AlteredNotebookError, match=message):
        grade(tmp_path / "mine.ipynb")


def _place(cells: list[editions.Cell], name: str) -> int:
    return [mark_of(cell).get("grade_id") for cell in cells].index(name)


def test_a_notebook_of_another_course(tmp_path: Path) -> None:
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
    assert main([str(path)]) == UNGRADABLE
    said = capsys.readouterr().err
    assert "cannot be read as a notebook" in said and "mine.ipynb" in said


def test_points_missing_is_another_status(tmp_path: Path) -> None:
    mine, exercises = _small(tmp_path, "def f():\n    return 2")
    assert main([str(mine), "--exercises", str(exercises)]) == PARTLY
