"""The editions of an assignment, all made from its one source.

``python exercises/editions.py [--check]`` writes what drifted: the student editions, each with
its checks beside it, the tables of the guide, and the solutions. With ``--check`` it only says
what drifted.

The source is nbgrader's own format: its cell metadata, and its markers around solutions and
hidden tests, which its preprocessors take out. ``editions.py --repositories FOLDER`` makes two
repositories: one for students, without sources, mistakes and solutions, and one for staff.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradinv_edu.errors import InvalidArgumentError

HERE = Path(__file__).resolve().parent
STUB = "# Your code here.\nraise NotImplementedError"
TEXT_STUB = "*Your answer here.*"
SOLUTION = ("### BEGIN SOLUTION", "### END SOLUTION")
HIDDEN = ("### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS")
CARD = re.compile(
    r"^## Exercise (?P<number>(?:\d+|C)\.\d+)\. (?P<title>.+)\n+"
    r"\*(?P<kind>Derive|Implement|Break|Judge) · difficulty (?P<difficulty>[1-5]) of 5 · "
    r"(?P<minutes>\d+) minutes · objectives? (?P<objectives>\d(?:, \d)*)\*\n+"
    r"\*\*Objective:\*\* (?P<goal>.+)\.\n"
)

Notebook = dict[str, Any]
Cell = dict[str, Any]


@dataclass(frozen=True)
class Exercise:
    """One exercise: its card, and the cells that belong to it.

    Attributes
    ----------
    number, title, kind : str
        As its card says; ``kind`` is Derive, Implement, Break or Judge.
    goal : str
        What a student can do after it.
    difficulty, minutes : int
        From 1 to 5, and how long it takes.
    objectives : tuple of int
        Which of the chapter's objectives it trains, counted from 1.
    solution, check : str
        ``grade_id`` of the cell that a student fills in, and of the one that grades it.
    points : int
        What it is worth.
    target : str
        Name of the function that a student writes.
    """

    number: str
    title: str
    kind: str
    goal: str
    difficulty: int
    minutes: int
    objectives: tuple[int, ...]
    solution: str
    check: str
    points: int
    target: str


def sources(exercises: Path) -> list[Path]:
    """All source notebooks: in the order of the chapters, then the capstone.

    They bear their folders' names; others are copies that editors leave behind.
    """
    found = (exercises / "source").glob("*/*.ipynb")
    return sorted(path for path in found if path.stem == path.parent.name)


def checks_of(stem: str, folder: Path) -> dict[Path, str]:
    """Give the files that grade an assignment, as they stand in its own ``folder``."""
    name = stem.split("_", 1)[1] if stem[0].isdigit() else stem
    files = [HERE / "checks" / f"{part}.py" for part in ("__init__", "verdict", name)]
    return {folder / "checks" / f.name: f.read_text("utf-8") for f in files if f.exists()}


def made(exercises: Path) -> dict[Path, str]:
    """Make the text of every committed file that is generated from the sources."""
    import guide  # which reads the editions
    import recording

    files = {}
    for path in sources(exercises):
        folder, source = exercises / "student" / path.stem, read(path)
        files[folder / path.name] = text(student(source))
        checks = recording.checks_for_students(source, folder / "checks")
        files |= {folder / "checks" / name: content for name, content in checks.items()}
    if (exercises / "README.md").exists():
        tables = guide.tables(exercises)
        files |= {exercises / "tables" / f"{kind}.md": table for kind, table in tables.items()}
    return files


def unseen(exercises: Path) -> dict[Path, str]:
    """Make what git does not look at: the solutions, with the whole checks beside them."""
    files = {}
    place = exercises.parent / "_build" / "exercises" / "solutions"
    for path in sources(exercises):
        files |= checks_of(path.stem, place / path.stem)
        files[place / path.stem / path.name] = text(solutions(read(path)))
    return files


def drifted(files: dict[Path, str]) -> list[Path]:
    """Name the files that are not what the sources make."""
    return [p for p, t in files.items() if not p.exists() or p.read_text("utf-8") != t]


def put(files: dict[Path, str]) -> None:
    """Write those files that drifted."""
    for path in drifted(files):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[path], encoding="utf-8")


def read(path: Path) -> Notebook:
    """Read a notebook.

    Raises
    ------
    InvalidArgumentError
        If the file is missing, is no notebook, or is in a format before 4.
    """
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        version, cells = notebook["nbformat"], notebook["cells"]
        shaped = all(isinstance(cell["metadata"], dict) and "source" in cell for cell in cells)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidArgumentError(
            f"{path} cannot be read as a notebook ({type(error).__name__}: {error}). Save it "
            "again from Jupyter, or download it again, and hand in that file."
        ) from error
    if version != 4 or not shaped:
        raise InvalidArgumentError(f"{path} is not a notebook in format 4: open and save it again.")
    return dict(notebook)


def text(notebook: Notebook) -> str:
    """Return the notebook as the text of its file."""
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def source_of(cell: Cell) -> str:
    """Return the text of a cell, however it is stored."""
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)


def mark_of(cell: Cell) -> dict[str, Any]:
    """Return nbgrader's metadata of a cell; empty where it has none."""
    mark = cell["metadata"].get("nbgrader", {})
    return mark if isinstance(mark, dict) else {}


def student(source: Notebook) -> Notebook:
    """Make the student edition: stubs for solutions, no hidden tests, no outputs."""
    return _edition(source, _to_student)


def solutions(source: Notebook) -> Notebook:
    """Make the solutions: the source without its markers."""
    return _edition(source, _to_solution)


def _edition(source: Notebook, change: Callable[[str, Cell], str]) -> Notebook:
    edition = deepcopy(source)
    edition["metadata"].pop("celltoolbar", None)
    for cell in edition["cells"]:
        cell["source"] = change(source_of(cell), cell).splitlines(keepends=True)
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    return edition


def _to_student(source: str, cell: Cell) -> str:
    """What nbgrader's own preprocessors leave."""
    from nbformat import NotebookNode, from_dict
    from nbgrader.preprocessors import ClearHiddenTests, ClearSolutions

    clear = ClearSolutions(code_stub={"python": STUB}, text_stub=TEXT_STUB)
    cleared: NotebookNode = from_dict({**cell, "source": source})
    replaced = clear._replace_solution_region(cleared, "python")
    if mark_of(cell).get("solution") and not replaced:
        return STUB if cell["cell_type"] == "code" else TEXT_STUB
    ClearHiddenTests()._remove_hidden_test_region(cleared)
    return str(cleared.source)


def _to_solution(source: str, cell: Cell) -> str:
    marks = {*SOLUTION, *HIDDEN}
    return "\n".join(line for line in source.split("\n") if line.strip() not in marks)


def exercises_of(notebook: Notebook) -> list[Exercise]:
    """Read the cards of a source, with the cells that follow each.

    Raises
    ------
    InvalidArgumentError
        If a card is not followed by one cell to fill in and one that grades it.
    """
    return [_exercise(card, cells) for card, cells in _groups(notebook)]


def _groups(notebook: Notebook) -> Iterator[tuple[re.Match[str], list[Cell]]]:
    group: list[Cell] = []
    card: re.Match[str] | None = None
    for cell in notebook["cells"]:
        found = CARD.match(source_of(cell)) if cell["cell_type"] == "markdown" else None
        if found and card:
            yield card, group
        if found:
            card, group = found, []
        group.append(cell)
    if card:
        yield card, group


def _exercise(card: re.Match[str], cells: list[Cell]) -> Exercise:
    fill = [cell for cell in cells if mark_of(cell).get("solution")]
    grade = [cell for cell in cells if mark_of(cell).get("grade")]
    if len(fill) != 1 or len(grade) != 1:
        raise InvalidArgumentError(
            f"Exercise {card['number']} has {len(fill)} cells to fill in and {len(grade)} that "
            "grade: it needs one of each."
        )
    functions = [n.name for n in ast.parse(source_of(fill[0])).body if hasattr(n, "args")]
    said = card.groupdict()
    return Exercise(
        **{part: said[part] for part in ("number", "title", "kind", "goal")},
        **{part: int(said[part]) for part in ("difficulty", "minutes")},
        objectives=tuple(int(n) for n in said["objectives"].split(", ")),
        solution=mark_of(fill[0])["grade_id"],
        check=mark_of(grade[0])["grade_id"],
        points=int(mark_of(grade[0])["points"]),
        target=functions[0],
    )


_TESTS = ("exercises", "grade", "exam", "nbgrader", "house", "launch", "quizzes")
STAFF = ("exercises", "tests/attacks.toml", ".ci", *(f"tests/test_{name}.py" for name in _TESTS))
FOR_STUDENTS = "exercises/student"


def repositories(folder: Path, root: Path) -> tuple[Path, Path]:
    """Make a repository for students and a private one for staff, each with one commit.

    Raises
    ------
    InvalidArgumentError
        If one of them exists already.
    """
    both = folder / "course", folder / "course-staff"
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True)
    for place in both:
        if place.exists():
            raise InvalidArgumentError(f"{place} exists already: choose an empty folder.")
        for name in listed.stdout.splitlines():
            private = name.startswith(STAFF) and not name.startswith(FOR_STUDENTS)
            if (place == both[0] and private) or not (root / name).is_file():
                continue
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, place / name)
        if place == both[0] and (place / "README.md").exists():  # the guide stays with staff
            page = (place / "README.md").read_text("utf-8")
            page = page.replace("(exercises/README.md)", "(exercises/student)")
            (place / "README.md").write_text(page, "utf-8")
        who = ["-c", "user.name=course", "-c", "user.email=course@localhost"]
        for arguments in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "The course"]):
            subprocess.run(["git", *arguments], cwd=place, check=True)
    return both


def main(arguments: Sequence[str] | None = None, exercises: Path = HERE) -> int:
    """Write what drifted, or with ``--check`` only say so; return the exit status."""
    parser = argparse.ArgumentParser(prog="editions.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if any drifted")
    parser.add_argument("--repositories", type=Path, help="make both repositories in this folder")
    options = parser.parse_args(arguments)
    if options.repositories:
        students, staff = repositories(options.repositories, exercises.parent)
        print(f"for students: {students}\nprivate, for staff: {staff}")
        return 0
    files = made(exercises)
    wrong = drifted(files)
    for path in wrong:
        print("drifted:" if options.check else "writing:", path)
    if options.check:
        return int(bool(wrong))
    put(files | unseen(exercises))
    print("solutions:", exercises.parent / "_build" / "exercises" / "solutions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
