"""Every assignment: its stubs and its known mistakes get their hints; and how editions are made."""

from __future__ import annotations

import importlib.util
import inspect
import io
import json
import re
import sys
from collections import Counter
from contextlib import redirect_stdout, suppress
from copy import deepcopy
from html import unescape
from importlib import import_module
from pathlib import Path
from typing import Any

import editions
import grade
import guide
import matplotlib.pyplot as plt
import pytest
import recording
import torch
from checks import capstone
from checks.batches import fits, plan
from checks.verdict import Mistakes, WrongAnswerError, ask, compare, pair, pattern, tensor
from editions import drifted, made, main, mark_of, source_of

import gradinv_edu as gi
from gradinv_edu.errors import InvalidArgumentError
from gradinv_edu.systems import LayerSystem

EXERCISES = editions.HERE
PATHS = editions.sources(EXERCISES)
SOURCES = {path.stem: editions.read(path) for path in PATHS}
CARDS = {stem: editions.exercises_of(source) for stem, source in SOURCES.items()}
each_assignment = pytest.mark.parametrize("stem", SOURCES)


def _student(stem: str) -> editions.Notebook:
    return editions.read(EXERCISES / "student" / stem / f"{stem}.ipynb")


@each_assignment
def test_the_solutions_are_right_and_the_untouched_stubs_are_told_so(stem: str) -> None:
    room = guide.classroom(SOURCES[stem])
    for card in CARDS[stem]:
        assert guide.verdict_on(room[0][card.target], card, room) == ""
    for cell in SOURCES[stem]["cells"]:
        if cell["cell_type"] == "code" and not mark_of(cell):
            exec(source_of(cell), room[0])  # what the solution does to a photograph
    plt.close("all")
    cells = {mark_of(cell).get("grade_id"): source_of(cell) for cell in _student(stem)["cells"]}
    for card in CARDS[stem]:
        stubs: dict[str, Any] = {}
        exec(cells[card.solution], stubs)
        assert "Not done yet" in guide.verdict_on(stubs[card.target], card, room)


@each_assignment
def test_every_known_mistake_gets_its_own_hint(stem: str) -> None:
    """Word for word; ``{…}`` stands for a figure, and "… words …" for a part of the verdict."""
    tried = guide.verdicts(EXERCISES / "source" / stem / f"{stem}.ipynb")
    for card, mistake, verdict in tried:
        hint = pattern(mistake)
        assert verdict and re.fullmatch(hint, verdict), (card.number, mistake.__name__, verdict)
    planted = Counter(card.number for card, _, _ in tried)
    assert all(planted[card.number] >= 4 for card in CARDS[stem])


@each_assignment
def test_an_assignment_is_whole(stem: str) -> None:
    """It rises from deriving to judging, trains every objective, and holds no outputs."""
    cards, source = CARDS[stem], SOURCES[stem]
    if stem[0].isdigit():
        assert 1 <= len(cards) <= 6
        assert [c.number for c in cards] == [f"{int(stem[:2])}.{n + 1}" for n in range(len(cards))]
        assert {card.kind for card in cards} <= {"Derive", "Implement", "Break", "Judge"}
        levels = [card.difficulty for card in cards]
        assert (levels[0], levels[-1]) == (min(levels), max(levels))
    chapter = guide.chapter_of(EXERCISES / "source" / stem / f"{stem}.ipynb")
    assert chapter.parent.name == ("book" if stem[0].isdigit() else stem)
    objectives = guide.objectives_of(chapter)
    assert {n for card in cards for n in card.objectives} <= set(range(1, len(objectives) + 1))
    code = [cell for cell in source["cells"] if cell["cell_type"] == "code"]
    assert not [cell for cell in code if cell["outputs"] or cell["execution_count"]]
    assert source["metadata"]["kernelspec"]["name"] == "python3"
    assert set(source["metadata"]) == {"kernelspec"}


def _everywhere(case: capstone.Case) -> object:
    """The ratio of the first layer, whatever it is."""
    with suppress(Exception):
        return gi.fully_connected.recover_input(*list(case.sent[0].values())[:2])
    return None


SHORTCUTS = {
    "one call, sure where it is exact": capstone.Investigate.one_call_for_everything,
    "one call, always sure": capstone.Investigate.sure_of_everything,
    "one call, half sure": lambda case: (capstone.Investigate._walk(case)[0], 0.5),
    "nothing, and sure of that": lambda case: (None, 0.0),
    "the ratio, half sure": lambda case: (_everywhere(case), 0.5),
    "the mean digit": lambda case: (MEAN, 0.3),
    "right, and nothing dared": capstone.Investigate.nothing_dared,
}
MEAN = gi.data.digits(range(50), dtype=torch.float64)[0].mean(0)


@pytest.mark.parametrize("name", SHORTCUTS)
def test_no_shortcut_earns_a_third_of_the_capstone(name: str) -> None:
    assert capstone.share(capstone.answers(SHORTCUTS[name], seed=3)) < 1 / 3


SLOW = {"federation-guarded", "rank-misjudged", "capstone-investigate", "recursion-trust"}


@each_assignment
def test_the_checks_take_any_seed(stem: str) -> None:
    """Each student has data of their own, and the solution is right for all of it."""
    room, texts = guide.classroom(SOURCES[stem])[0], _texts(SOURCES[stem])
    for card in CARDS[stem]:
        for seed in (137, 5023) if card.solution not in SLOW else ():
            points, hint = grade.checked(card, texts[card.check], room[card.target], seed)
            assert (points, hint) == (card.points, ""), (card.number, seed)


def _texts(source: editions.Notebook) -> dict[str, str]:
    return {mark_of(c).get("grade_id", ""): source_of(c) for c in source["cells"]}


def test_names_are_unique_in_the_course() -> None:
    """A renamed notebook is known by the names of its cells."""
    marks = [mark_of(cell) for source in SOURCES.values() for cell in source["cells"]]
    names = Counter(mark["grade_id"] for mark in marks if mark)
    assert max(names.values()) == 1
    for path in (EXERCISES / "checks").glob("[a-z]*.py"):
        import_module(f"checks.{path.stem}")
    assert set(Mistakes.KNOWN) == {card.solution for cards in CARDS.values() for card in cards}


def test_nothing_generated_has_drifted() -> None:
    """If this fails: python exercises/editions.py."""
    files = made(EXERCISES)
    assert not drifted(files)
    students = (EXERCISES / "student").rglob("*.*")
    kept = {path for path in students if "__pycache__" not in path.parts and path.is_file()}
    assert {path for path in kept if path.suffix in {".py", ".ipynb"}} <= set(files)
    text = (EXERCISES / "README.md").read_text()
    assert all(f"(tables/{kind}.md)" in text for kind in guide.KINDS)
    assert len(text) < 12_000  # two screens; the tables are behind links


def _students_checks(stem: str) -> Any:
    """The checks of the student edition, as a package of a name of its own."""
    folder = EXERCISES / "student" / stem / "checks"
    name = f"students_{stem}"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return import_module(f"{name}.{recording.module_of(SOURCES[stem])}")


@each_assignment
def test_students_get_checks_that_hint_as_well_and_know_no_solution(stem: str) -> None:
    """Right answers pass and known mistakes get their hints, by records alone."""
    module, room = _students_checks(stem), guide.classroom(SOURCES[stem])[0]
    folder = EXERCISES / "student" / stem / "checks"
    cases = json.loads((folder / "cases.json").read_text())
    for exercise, name in recording._checks(SOURCES[stem]):
        check = getattr(module, name)
        assert _said(check, room[exercise.target]) == "", (exercise.number, name)
        if recording.is_open(exercise, name):
            continue
        by_name = {f.__name__: f for f in Mistakes.KNOWN[exercise.solution]}
        for mistake in cases[name]["mistakes"]:
            told = _said(check, by_name[mistake["name"]])
            if "dataclass instances" not in told:  # a mistake that needs the real class
                part = re.fullmatch(pattern(by_name[mistake["name"]]), told)
                assert part or told == mistake["hint"], (exercise.number, mistake["name"])
    code = "\n".join(p.read_text() for p in folder.glob("*.py"))
    for found in Mistakes.KNOWN.values():
        for function in found:
            body = inspect.getsource(function).split('"""')[-1]
            lines = [line.strip() for line in body.splitlines() if len(line.strip()) > 25]
            known = [line for line in lines if line in code and "raise" not in line]
            assert not known, function.__name__


def _said(check: Any, answer: Any) -> str:
    try:
        with redirect_stdout(io.StringIO()):
            check(answer)
    except Exception as verdict:
        return " ".join(str(verdict).split())
    return ""


def test_two_repositories_and_the_students_holds_no_secret(tmp_path: Path) -> None:
    students, staff = editions.repositories(tmp_path, EXERCISES.parent)
    names = {str(p.relative_to(students)) for p in students.rglob("*") if p.is_file()}
    assert "exercises/student/01_perceptron/01_perceptron.ipynb" in names
    assert "gradinv_edu/__init__.py" in names and "book/01_perceptron.ipynb" in names
    private = [n for n in names if n.startswith("exercises/") and "/student/" not in n]
    assert not private
    assert (staff / "exercises" / "source" / "01_perceptron" / "01_perceptron.ipynb").exists()
    with pytest.raises(InvalidArgumentError, match="exists already"):
        editions.repositories(tmp_path, EXERCISES.parent)


@pytest.mark.parametrize("weeks", guide.WEEKS)
def test_a_syllabus_holds_each_chapter_once_and_no_week_is_long(weeks: int) -> None:
    plan = guide.syllabus(EXERCISES, weeks)
    assert len(re.findall(r"^\| \d+ \|", plan, re.MULTILINE)) <= weeks
    for chapter in guide.chapters(EXERCISES):
        told = plan.count(guide.title_of(chapter))
        assert told == (chapter.stem[:2] in guide.WEEKS[weeks] or not guide.WEEKS[weeks])


def _secrets(stem: str) -> list[str]:
    """Every line of the solutions and hidden tests that is long enough to be told."""
    text = "\n".join(source_of(cell) for cell in SOURCES[stem]["cells"])
    parts = re.findall(r"### BEGIN.*?\n(.*?)\s*### END", text, re.DOTALL)
    lines = [line.strip() for part in parts for line in part.splitlines()]
    return [line for line in lines if len(line) > 12]


@each_assignment
def test_no_solution_is_in_the_student_edition_or_its_page(stem: str) -> None:
    issued = "\n".join(source_of(cell) for cell in _student(stem)["cells"])
    assert "BEGIN" not in issued and "END" not in issued and _secrets(stem)
    pages = [unescape(TAG.sub("", p.read_text())) for p in BUILT.rglob(f"exercises/**/{stem}.html")]
    assert all("NotImplementedError" in page for page in pages)
    assert not [line for line in _secrets(stem) for page in [issued, *pages] if line in page]


BUILT = EXERCISES.parent / "_build" / "html"
TAG = re.compile(r"<[^>]+>")


def test_the_built_book_holds_no_mark_of_a_solution() -> None:
    """Pages, search index, sources and downloads, if the book is built."""
    secrets = ["BEGIN SOLUTION", "BEGIN HIDDEN", "END SOLUTION", "END HIDDEN"]
    kinds = {".html", ".js", ".ipynb", ".txt", ".json", ".md"}
    for path in (p for p in BUILT.rglob("*") if p.suffix in kinds):
        content = TAG.sub("", path.read_text(errors="ignore"))
        assert not [secret for secret in secrets if secret in content], path


@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (3, 5, 5, 3), (3, 5, 7, 3), (3, 6, 3, 2)])
def test_the_count_of_how_many_fit_is_the_rank(shape: tuple[int, int, int, int]) -> None:
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


# What a check says.

TRUTH = torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64)
ROUND = "it runs the other way round"


@pytest.mark.parametrize("answer", [TRUTH.clone(), TRUTH * (1 + 1e-12)])
def test_the_right_answer_is_accepted_in_silence(
    answer: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(answer, TRUTH, "x")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("answer", "known", "hint"),
    [
        (TRUTH.float() * (1 + 1e-7), TRUTH.flip(0), "float32"),
        (2 * TRUTH, TRUTH.flip(0), "right direction, but is 2 times"),
        (-TRUTH, TRUTH.flip(0), "right direction, but is -1 times"),
        (TRUTH[None], TRUTH.flip(0), r"shape \(1, 3\), and should have \(3,\)"),
        (TRUTH / 0, TRUTH.flip(0), "divided by zero"),
        (torch.tensor([0.5, 0.25, 0.0]), TRUTH.flip(0), "wrong in 1 of 3 entries"),
        ([0.5, 0.25, 1.0], TRUTH.flip(0), "yours is a list"),
        (TRUTH.flip(0), TRUTH.flip(0), ROUND),
        (TRUTH.float() * (1 + 2e-7), TRUTH * (1 + 1e-7), "float32"),  # a mistake, right here
        (torch.tensor([torch.nan, 1, 1]), torch.tensor([torch.nan, 0, 0]), ROUND),  # by its holes
    ],
)
def test_a_wrong_answer_is_told_what_kind_of_wrong_it_is(
    answer: object, known: torch.Tensor, hint: str
) -> None:
    with pytest.raises(WrongAnswerError, match=hint):
        compare(answer, TRUTH, "x", [(ROUND, known)])


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
    ask(torch.Tensor.zero_, TRUTH)
    assert TRUTH[2] == 1.0  # a student's function gets copies
    assert WrongAnswerError("Look.")._render_traceback_() == ["Not right yet. Look."]


# How editions are made.


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
IMPORT = "from checks.verdict import demand\n\n"
GRADE = "demand(f(1) == 1, 'one stays')\n### BEGIN HIDDEN TESTS\nassert f(2)\n### END HIDDEN TESTS"
SOURCE = {
    "nbformat": 4,
    "nbformat_minor": 5,
    "metadata": {"celltoolbar": "Create Assignment"},
    "cells": [
        _cell(CARD, "markdown"),
        _cell(FILL, solution=True, grade_id="f"),
        _cell(IMPORT + GRADE, grade=True, grade_id="f-check", points=2),
    ],
}


def test_editions_are_the_source_without_what_they_must_not_hold() -> None:
    before = deepcopy(SOURCE)
    student, solutions = editions.student(SOURCE), editions.solutions(SOURCE)
    assert before == SOURCE
    fill, grade = (source_of(cell) for cell in student["cells"][1:])
    assert fill == "def f(x):\n    # Your code here.\n    raise NotImplementedError\n"
    assert grade == IMPORT + "demand(f(1) == 1, 'one stays')"
    assert all(not cell["outputs"] for cell in student["cells"][1:])
    assert "celltoolbar" not in student["metadata"]
    fill, grade = (source_of(cell) for cell in solutions["cells"][1:])
    assert fill == "def f(x):\n    return x\n"
    assert grade == IMPORT + "demand(f(1) == 1, 'one stays')\nassert f(2)"


def test_a_card_says_what_an_exercise_is_and_needs_its_cells() -> None:
    (exercise,) = editions.exercises_of(SOURCE)
    assert (exercise.number, exercise.kind, exercise.goal) == ("1.1", "Derive", "do it")
    assert (exercise.objectives, exercise.minutes, exercise.difficulty) == ((1, 3), 10, 1)
    assert (exercise.solution, exercise.check, exercise.points) == ("f", "f-check", 2)
    room = guide.classroom(SOURCE)
    assert guide.verdict_on(room[0]["f"], exercise, room) == ""
    assert guide.verdict_on(lambda x: 2, exercise, room) == "one stays"
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


def test_drift_is_found_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exercises = tmp_path / "exercises"
    stem = "01_perceptron"
    source = exercises / "source" / stem / f"{stem}.ipynb"
    editions.put({source: editions.text(SOURCES[stem])})
    assert [main([*check], exercises) for check in (["--check"], [], ["--check"])] == [1, 0, 0]
    edition = exercises / "student" / stem / f"{stem}.ipynb"
    solved = tmp_path / "_build" / "exercises" / "solutions" / stem
    assert "NotImplementedError" in edition.read_text()
    assert "bias_gradient" in (solved / f"{stem}.ipynb").read_text()
    assert (solved / "checks" / "perceptron.py").exists()
    check = edition.parent / "checks" / "verdict.py"
    check.write_text("right = print")
    assert drifted(made(exercises)) == [check]
    assert main(["--check"], exercises) == 1
    assert f"drifted: {check}" in capsys.readouterr().out
