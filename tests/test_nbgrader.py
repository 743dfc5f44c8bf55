"""The folder of exercises is an nbgrader course."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import editions
from editions import HERE, mark_of, source_of

STEM = "01_perceptron"


def _nbgrader(course: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "nbgrader", *arguments]
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # alembic, jupyter
    environment = {
        **os.environ,
        "PATH": beside,
        "JUPYTER_CONFIG_DIR": str(course.parent),
        "PYTHONPYCACHEPREFIX": str(course.parent / "compiled"),  # shared by all the kernels
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(command, cwd=course, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def _hand_in(course: Path, student: str, notebook: editions.Notebook, stem: str) -> None:
    folder = course / "submitted" / student / stem
    cheat = {folder / "checks" / "perceptron.py": "def __getattr__(name): return print"}
    editions.put({folder / f"{stem}.ipynb": editions.text(notebook), **cheat})


def test_the_folder_is_an_nbgrader_course(tmp_path: Path) -> None:
    """Generate, autograde two submissions, feedback; and its release is our student edition."""
    from nbgrader.api import Gradebook

    stem, course = STEM, tmp_path / "exercises"
    source = editions.read(HERE / "source" / stem / f"{stem}.ipynb")
    (course / "source" / stem).mkdir(parents=True)
    shutil.copy(HERE / "source" / stem / f"{stem}.ipynb", course / "source" / stem)
    shutil.copytree(HERE / "checks", course / "checks")
    for name in ("nbgrader_config.py", "editions.py"):
        shutil.copy(HERE / name, course)
    _nbgrader(course, "generate_assignment", stem)
    released = editions.read(course / "release" / stem / f"{stem}.ipynb")
    ours = editions.read(HERE / "student" / stem / f"{stem}.ipynb")
    assert not editions.drifted(editions.checks_of(stem, course / "release" / stem))
    assert [source_of(c) for c in released["cells"]] == [source_of(c) for c in ours["cells"]]
    for theirs, mine in zip(released["cells"], ours["cells"], strict=True):
        kept = {k: v for k, v in mark_of(theirs).items() if k not in {"checksum", "cell_type"}}
        assert kept == mark_of(mine)
    _hand_in(course, "ada", editions.solutions(source), stem)
    _hand_in(course, "bob", ours, stem)
    _nbgrader(course, "autograde", stem)
    _nbgrader(course, "generate_feedback", stem)
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as book:
        ada, bob = (book.find_submission(stem, student) for student in ("ada", "bob"))
        assert ada.score == ada.max_score > 0
        assert bob.score == 0
    told = (course / "feedback" / "bob" / stem / f"{stem}.html").read_text()
    assert "Not done yet" in told
