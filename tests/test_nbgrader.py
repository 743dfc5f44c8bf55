"""The folder of exercises is an nbgrader course, as far as handing out goes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import editions
from editions import HERE, mark_of, source_of

STEM = "01_perceptron"


def test_what_nbgrader_hands_out_is_our_student_edition(tmp_path: Path) -> None:
    course = tmp_path / "exercises"
    for part in (f"source/{STEM}", f"student/{STEM}", "checks"):
        shutil.copytree(HERE / part, course / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("nbgrader_config.py", "editions.py"):
        shutil.copy(HERE / name, course)
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # alembic, jupyter
    done = subprocess.run(
        [sys.executable, "-m", "nbgrader", "generate_assignment", STEM],
        cwd=course,
        env={**os.environ, "PATH": beside, "JUPYTER_CONFIG_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    released = course / "release" / STEM
    ours = HERE / "student" / STEM
    for file in (p for p in (ours / "checks").iterdir() if p.is_file()):
        assert (released / "checks" / file.name).read_bytes() == file.read_bytes()
    theirs, mine = (editions.read(f / f"{STEM}.ipynb") for f in (released, ours))
    assert [source_of(c) for c in theirs["cells"]] == [source_of(c) for c in mine["cells"]]
    for one, two in zip(theirs["cells"], mine["cells"], strict=True):
        kept = {k: v for k, v in mark_of(one).items() if k not in {"checksum", "cell_type"}}
        assert kept == mark_of(two)
