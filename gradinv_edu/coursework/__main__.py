"""Write the editions and the guide's tables: ``python -m gradinv_edu.coursework [--check]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import editions, guide


def made(exercises: Path) -> dict[Path, str]:
    """Make the text of every committed file that is generated from the sources."""
    files = {}
    for path in editions.sources(exercises):
        place = exercises / "student" / path.stem / path.name
        files[place] = editions.text(editions.student(editions.read(path)))
    readme = exercises / "README.md"
    if readme.exists():
        files[readme] = guide.renewed(readme.read_text(encoding="utf-8"), guide.tables(exercises))
    return files


def solved(exercises: Path) -> dict[Path, str]:
    """Make the solutions, which are written where git does not look."""
    place = exercises.parent / "_build" / "exercises" / "solutions"
    return {
        place / path.stem / path.name: editions.text(editions.solutions(editions.read(path)))
        for path in editions.sources(exercises)
    }


def drifted(files: dict[Path, str]) -> list[Path]:
    """Name the files that are not what the sources make."""
    return [p for p, t in files.items() if not p.exists() or p.read_text(encoding="utf-8") != t]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write what drifted, or with ``--check`` only say so; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gradinv_edu.coursework", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if any drifted")
    parser.add_argument("--exercises", type=Path, help="the folder exercises of a checkout")
    options = parser.parse_args(arguments)
    exercises = options.exercises or editions.folder()
    files = made(exercises)
    wrong = drifted(files)
    for path in wrong:
        print("drifted:" if options.check else "writing:", path)
    if options.check:
        return int(bool(wrong))
    for path, content in {**{p: files[p] for p in wrong}, **solved(exercises)}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    print("solutions:", exercises.parent / "_build" / "exercises" / "solutions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
