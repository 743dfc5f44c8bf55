"""What checks say, and how editions are made."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch

from gradinv_edu.coursework import editions, guide, mistakes
from gradinv_edu.coursework.__main__ import drifted, made, main
from gradinv_edu.coursework.recursion import fits, plan
from gradinv_edu.coursework.verdict import ask, compare, pair, tensor
from gradinv_edu.coursework.wrong import WrongAnswerError
from gradinv_edu.errors import InvalidArgumentError
from gradinv_edu.systems import LayerSystem

TRUTH = torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64)
EXERCISES = Path(__file__).parents[1] / "exercises"


def _cell(source: str, kind: str = "code", **mark: object) -> dict[str, object]:
    metadata = {"nbgrader": mark} if mark else {}
    extra = {"outputs": [{"data": {}}], "execution_count": 3} if kind == "code" else {}
    return {"cell_type": kind, "metadata": metadata, "source": source, "id": "a", **extra}


CARD = """## Exercise 1.1. Title

*Derive · difficulty 1 of 5 · 10 minutes · objectives 1, 3*

**Objective:** do it.

Do.
"""
FILL = "def f(x):\n    ### BEGIN SOLUTION\n    return x\n    ### END SOLUTION\n"
GRADE = "assert f(1) == 1\n### BEGIN HIDDEN TESTS\nassert f(2) == 2\n### END HIDDEN TESTS"
SOURCE = {
    "nbformat": 4,
    "nbformat_minor": 5,
    "metadata": {"celltoolbar": "Create Assignment"},
    "cells": [
        _cell(CARD, "markdown"),
        _cell(FILL, solution=True, grade_id="f"),
        _cell(GRADE, grade=True, grade_id="f-check", points=2),
    ],
}


def test_the_right_answer_is_accepted_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    compare(TRUTH.clone(), TRUTH, "x")
    compare((TRUTH * (1 + 1e-12)), TRUTH, "x")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (TRUTH.float() * (1 + 1e-7), "float32"),
        (2 * TRUTH, "right direction, but is 2 times"),
        (-TRUTH, "right direction, but is -1 times"),
        (TRUTH[None], r"shape \(1, 3\), and should have \(3,\)"),
        (TRUTH / 0, "divided by zero"),
        (torch.tensor([0.5, 0.25, 0.0]), "wrong in 1 of 3 entries"),
        ([0.5, 0.25, 1.0], "yours is a list"),
        (TRUTH.flip(0), "the other way round"),
    ],
)
def test_a_wrong_answer_is_told_what_kind_of_wrong_it_is(answer: object, hint: str) -> None:
    known = [("it runs the other way round", TRUTH.flip(0))]
    with pytest.raises(WrongAnswerError, match=hint):
        compare(answer, TRUTH, "x", known)


def test_a_mistake_that_happens_to_be_right_here_is_not_told() -> None:
    known = [("not this", TRUTH * (1 + 1e-7))]
    with pytest.raises(WrongAnswerError, match="float32"):
        compare(TRUTH.float() * (1 + 2e-7), TRUTH, "x", known)


def test_a_mistake_that_gives_nan_is_known_by_where_it_does() -> None:
    known = [("dead rows", torch.tensor([torch.nan, 0.0, 0.0]))]
    with pytest.raises(WrongAnswerError, match="dead rows"):
        compare(torch.tensor([torch.nan, 1.0, 1.0]), TRUTH, "x", known)


def test_what_a_students_function_does_wrong_by_itself() -> None:
    def stub(x: object) -> object:
        raise NotImplementedError

    def returns_nothing(x: object) -> None:
        return None

    def breaks(x: object) -> object:
        raise KeyError("k")

    for function, hint in (
        (stub, "Not done yet"),
        (returns_nothing, "return statement"),
        (breaks, "breaks stopped for label 1 with KeyError"),
        (3, "int; define a function"),
    ):
        with pytest.raises(WrongAnswerError, match=hint):
            ask(function, 1, case="for label 1")  # type: ignore[arg-type]
    with pytest.raises(WrongAnswerError, match="two things"):
        pair(TRUTH, "f")
    assert tensor(2, "x").dtype == torch.float64


def test_a_verdict_is_one_line_in_a_notebook() -> None:
    assert WrongAnswerError("Look.")._render_traceback_() == ["Not right yet. Look."]


def test_the_student_edition_has_stubs_and_neither_solutions_nor_hidden_tests() -> None:
    made = editions.student(SOURCE)
    fill, grade = (editions.source_of(cell) for cell in made["cells"][1:])
    assert fill == "def f(x):\n    # Your code here.\n    raise NotImplementedError\n"
    assert grade == "assert f(1) == 1"
    assert all(not cell["outputs"] for cell in made["cells"][1:])
    assert "celltoolbar" not in made["metadata"]


def test_the_solutions_lack_only_the_marks() -> None:
    fill, grade = (editions.source_of(cell) for cell in editions.solutions(SOURCE)["cells"][1:])
    assert fill == "def f(x):\n    return x\n"
    assert grade == "assert f(1) == 1\nassert f(2) == 2"


def test_making_an_edition_leaves_the_source_alone() -> None:
    before = deepcopy(SOURCE)
    editions.student(SOURCE)
    editions.solutions(SOURCE)
    assert before == SOURCE


def test_a_card_says_what_an_exercise_is() -> None:
    (exercise,) = editions.exercises_of(SOURCE)
    assert (exercise.number, exercise.kind, exercise.goal) == ("1.1", "Derive", "do it")
    assert exercise.objectives == (1, 3)
    assert (exercise.solution, exercise.check, exercise.points) == ("f", "f-check", 2)
    assert exercise.target == "f"


def test_a_card_without_its_cells_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"1\.1 has 1 cells to fill in and 0 that"):
        editions.exercises_of({**SOURCE, "cells": SOURCE["cells"][:2]})


@pytest.mark.parametrize(
    "content", ["", "[1]", "{}", '{"nbformat": 3, "cells": []}', '{"nbformat": 4, "cells": [1]}']
)
def test_what_is_no_notebook_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.ipynb"
    path.write_text(content)
    with pytest.raises(InvalidArgumentError, match="notebook"):
        editions.read(path)


def test_a_course_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editions, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    with pytest.raises(InvalidArgumentError, match="--exercises"):
        editions.folder(tmp_path / "x.ipynb")
    assert editions.folder(EXERCISES / "x.ipynb") == EXERCISES


def test_a_planted_mistake_is_tried_in_place_of_the_answer() -> None:
    source = deepcopy(SOURCE)
    grade = (
        "from gradinv_edu.coursework.verdict import demand\ndemand(f(1) == 1, 'one must stay one')"
    )
    source["cells"][2]["source"] = grade
    (exercise,) = editions.exercises_of(source)
    room = mistakes.classroom(source)
    assert mistakes.verdict_on(room[0]["f"], exercise, room) == ""
    assert mistakes.verdict_on(lambda x: 2, exercise, room) == "one must stay one"


def test_a_table_is_put_between_its_marks() -> None:
    text = "a\n<!-- generated: t -->\nold\n<!-- end of t -->\nb"
    new = guide.renewed(text, {"t": "| \\1 |"})
    assert new == "a\n<!-- generated: t -->\n| \\1 |\n<!-- end of t -->\nb"


def test_drift_is_found_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exercises = tmp_path / "exercises"
    place = exercises / "source" / "01_a" / "01_a.ipynb"
    editions.write(SOURCE, place)
    assert main(["--check", "--exercises", str(exercises)]) == 1
    assert main(["--exercises", str(exercises)]) == 0
    assert main(["--check", "--exercises", str(exercises)]) == 0
    edition = exercises / "student" / "01_a" / "01_a.ipynb"
    assert "NotImplementedError" in edition.read_text()
    assert "return x" in (tmp_path / "_build/exercises/solutions/01_a/01_a.ipynb").read_text()
    edition.write_text(edition.read_text().replace("Exercise 1.1", "Exercise 1.9"))
    assert drifted(made(exercises)) == [edition]
    assert main(["--check", "--exercises", str(exercises)]) == 1
    assert f"drifted: {edition}" in capsys.readouterr().out


@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (3, 5, 5, 3), (3, 5, 7, 3), (3, 6, 3, 2)])
def test_the_count_of_exercise_6_5_is_the_rank(shape: tuple[int, int, int, int]) -> None:
    channels, size, filters, kernel = shape
    g = torch.Generator().manual_seed(0)
    conv = torch.nn.Conv2d(channels, filters, kernel, bias=False).double()
    side, most = size - kernel + 1, fits(plan("a", *shape))
    with torch.no_grad():
        conv.weight.copy_(torch.randn(conv.weight.shape, generator=g, dtype=torch.float64))
    for samples in filter(None, (most, most + 1)):
        k = torch.randn(samples, filters, side, side, generator=g, dtype=torch.float64)
        A = LayerSystem(conv, k, (channels, size, size)).to_dense(scaled=True)
        full = int(torch.linalg.matrix_rank(A)) == A.shape[1] == samples * channels * size**2
        assert full == (samples <= most)
