"""Grade a submission: ``python exercises/grade.py path/to/notebook.ipynb``.

The notebook's answers are put into a fresh copy of the assignment, hidden tests included, and
run in a process of its own, with limits on time, memory, the processes it starts and the files it
writes. Exit status: 0 full marks, 1 points missing,
2 the notebook cannot be graded, 3 the time ran out.

This is no sandbox. It protects honest students from accidents, and not a server from malice:
submissions run with your own rights, so grade strangers' work in a container.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import editions
from editions import HERE, Cell, Exercise, Notebook, mark_of, source_of

from gradinv_edu.errors import GradientInversionError, InvalidArgumentError

FULL, PARTLY, UNGRADABLE, TOO_SLOW = 0, 1, 2, 3
SECONDS = 240.0
GIGABYTES = 4.0
MEGABYTES = 50  # of the largest file that is opened


class AlteredNotebookError(GradientInversionError, ValueError):
    """A submission lacks cells of its assignment, or has them twice or in another order."""


@dataclass(frozen=True)
class Mark:
    """What one exercise earned, and what to say about it."""

    exercise: Exercise
    points: int
    hint: str


@dataclass(frozen=True)
class Report:
    """What a submission earned.

    Attributes
    ----------
    assignment : str
        Stem of the assignment.
    marks : tuple of Mark
        One for each exercise, in order.
    notes : tuple of str
        What else the student should know: cells restored, time run out.
    timed_out : bool
        Whether the time ran out.
    """

    assignment: str
    marks: tuple[Mark, ...]
    notes: tuple[str, ...] = ()
    timed_out: bool = False

    @property
    def points(self) -> int:
        """Points earned."""
        return sum(mark.points for mark in self.marks)

    @property
    def most(self) -> int:
        """Points to be had."""
        return sum(mark.exercise.points for mark in self.marks)

    def __str__(self) -> str:
        lines = [f"{self.assignment}: {self.points} of {self.most} points"]
        for mark in self.marks:
            e = mark.exercise
            lines.append(f"  {e.number} {e.title:<44} {mark.points} of {e.points}")
            lines += [f"      {mark.hint}"] if mark.hint else []
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])


def grade(
    path: Path,
    exercises: Path = HERE,
    seconds: float = SECONDS,
    gigabytes: float = GIGABYTES,
) -> Report:
    """Grade one notebook.

    Parameters
    ----------
    path : Path
        The submission.
    exercises : Path
        The folder that holds ``source``; default: the one of this file.
    seconds : float
        Time limit for the whole notebook.
    gigabytes : float
        Limit on the memory that it may use; heeded on Linux.

    Raises
    ------
    InvalidArgumentError
        If the file is no notebook, none of this course, or far too large.
    AlteredNotebookError
        If cells of the assignment are missing, doubled or out of order.
    """
    _not_too_large(path)
    submission = editions.read(path)
    found = assignment(submission, exercises)
    source = editions.read(found)
    merged, restored = merge(submission, source)
    lines, timed_out = _run(merged, path.resolve().parent, seconds, gigabytes)
    notes = [f"Cells that had been changed were restored: {', '.join(restored)}."] * bool(restored)
    notes += _interruption(lines, merged, seconds, timed_out)
    marks = tuple(_mark(exercise, lines) for exercise in editions.exercises_of(source))
    return Report(found.stem, marks, tuple(notes), timed_out)


def _not_too_large(path: Path) -> None:
    size = path.stat().st_size / 2**20 if path.exists() else 0
    if size > MEGABYTES:
        raise InvalidArgumentError(
            f"{path} has {size:.0f} MB, over {MEGABYTES}: its outputs are too long. Choose “Clear "
            "all outputs” in Jupyter, save, and hand in that file."
        )


def assignment(submission: Notebook, exercises: Path) -> Path:
    """Find the source that a submission belongs to, by the names of its cells.

    Raises
    ------
    InvalidArgumentError
        If it has no cell of any assignment.
    """
    ids = set(_ids(submission))
    common = {
        path: len(ids & set(_ids(editions.read(path)))) for path in editions.sources(exercises)
    }
    best = max(common, key=lambda path: common[path], default=None)
    if best is None or not common[best]:
        raise InvalidArgumentError(
            "This notebook holds no exercise of this course: the names that the cells carry in "
            "their metadata are missing. Hand in a notebook that began as one of "
            "exercises/student/."
        )
    return best


def merge(submission: Notebook, source: Notebook) -> tuple[Notebook, list[str]]:
    """Keep a student's answers and own cells; take everything else from the source.

    Returns
    -------
    Notebook, list of str
        What to run, and the names of the cells that a student had changed.

    Raises
    ------
    AlteredNotebookError
        If cells are missing, doubled or out of order.
    """
    originals = {mark_of(cell)["grade_id"]: cell for cell in source["cells"] if _known(cell)}
    _unaltered(submission, originals)
    issued = _texts(editions.student(source)) | _texts(editions.solutions(source))
    merged = deepcopy(submission)
    restored: list[str] = []
    for cell in merged["cells"]:
        name = str(mark_of(cell).get("grade_id"))
        if name in originals and not mark_of(originals[name]).get("solution"):
            if (name, source_of(cell).strip()) not in issued:
                restored.append(name)
            cell["source"] = originals[name]["source"]
    return merged, restored


def _texts(edition: Notebook) -> set[tuple[str, str]]:
    cells = [cell for cell in edition["cells"] if _known(cell)]
    return {(mark_of(cell)["grade_id"], source_of(cell).strip()) for cell in cells}


def _known(cell: Cell) -> bool:
    return "grade_id" in mark_of(cell)


def _ids(notebook: Notebook) -> list[str]:
    return [mark_of(cell)["grade_id"] for cell in notebook["cells"] if _known(cell)]


def _unaltered(submission: Notebook, originals: dict[str, Cell]) -> None:
    present = [name for name in _ids(submission) if name in originals]
    kinds = {mark_of(c).get("grade_id"): c["cell_type"] for c in submission["cells"]}
    missing = [name for name in originals if name not in present]
    doubled = [name for name, count in Counter(present).items() if count > 1]
    retyped = [n for n in present if kinds[n] != originals[n]["cell_type"]]
    moved = [n for n, m in zip(present, originals, strict=False) if n != m]
    for names, what in (
        (missing, "are missing"),
        (doubled, "are there more than once"),
        (retyped, "are no longer code"),
        (moved, "are in another order"),
    ):
        if names:
            raise AlteredNotebookError(
                f"Cells of the assignment {what}: {', '.join(names)}. Start from a fresh copy in "
                "exercises/student/ and copy your answers into it; nothing was graded."
            )


def _run(
    notebook: Notebook, place: Path, seconds: float, gigabytes: float
) -> tuple[list[dict[str, Any]], bool]:
    """Run a notebook in a fresh process; what it told, and whether the time ran out."""
    with tempfile.TemporaryDirectory() as scratch:
        told, file = Path(scratch, "told.jsonl"), Path(scratch, "notebook.ipynb")
        file.write_text(editions.text(notebook), encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, str(HERE / "runner.py"), str(file), str(told), str(gigabytes)],
            cwd=place,
            env={**os.environ, "MPLBACKEND": "Agg", "IPYTHONDIR": scratch},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
        _end(process)
        return _lines(told), timed_out


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _lines(told: Path) -> list[dict[str, Any]]:
    text = told.read_text(encoding="utf-8") if told.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def _interruption(
    lines: list[dict[str, Any]], notebook: Notebook, seconds: float, timed_out: bool
) -> list[str]:
    if lines and lines[-1]["state"] == "ended":
        return []
    if not lines:
        return ["The notebook did not start within the time limit." if timed_out else _NO_START]
    cell = _name(notebook, lines[-1]["place"])
    if timed_out:
        return [
            f"Time ran out after {seconds:g} s in {cell}: is there a loop without an end? Cells "
            "after it did not run and earned nothing."
        ]
    return [
        f"The notebook ended its own process in {cell} (a call of exit, or out of memory); cells "
        "after it earned nothing."
    ]


_NO_START = "The notebook could not be started: is IPython installed in this environment?"


def _name(notebook: Notebook, place: int) -> str:
    name = mark_of(notebook["cells"][place]).get("grade_id")
    return f"cell {name}" if name else f"cell number {place + 1}"


def _mark(exercise: Exercise, lines: list[dict[str, Any]]) -> Mark:
    last = {line["id"]: line for line in lines if line.get("id")}
    check, solution = last.get(exercise.check, {}), last.get(exercise.solution, {})
    if check.get("state") == "passed":
        return Mark(exercise, exercise.points, "")
    if solution.get("state") == "failed":
        return Mark(exercise, 0, f"Your cell does not run: {solution['message']}")
    return Mark(exercise, 0, check.get("message") or "It did not run.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Grade the notebook that the command line names; return the exit status."""
    parser = argparse.ArgumentParser(prog="grade.py", description=__doc__)
    parser.add_argument("notebook", type=Path, help="the notebook to grade")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit, default 240")
    parser.add_argument("--gigabytes", type=float, default=GIGABYTES, help="of memory, default 4")
    parser.add_argument("--exercises", type=Path, default=HERE, help="folder that holds source")
    options = parser.parse_args(arguments)
    try:
        report = grade(options.notebook, options.exercises, options.seconds, options.gigabytes)
    except GradientInversionError as error:
        print(error, file=sys.stderr)
        return UNGRADABLE
    print(report)
    if report.timed_out:
        return TOO_SLOW
    return FULL if report.points == report.most else PARTLY


if __name__ == "__main__":
    sys.exit(main())
