"""Writes the editions of the chapters and exercises that open in Binder and Colab.

An edition is a notebook without outputs whose first cell installs the course where it is missing
and goes to the folder that the notebook reads its data from. Editions need the repository's
public address: ``repository.url`` in ``_config.yml`` is the one place for it. While that is
empty there are no editions, and pages have no launch buttons. Let it be the address of the
*student* repository (``exercises/editions.py --repositories``): what the first cell clones holds
no solution then.

    python book/launch.py
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
# what a notebook's code names, and what it asks pip for beyond the package
EXTRAS = {
    r"\bdp_sgd\b": "opacus",
    r"\bscoreboard\b": "./course[scoreboard]",
    r"(?<!drawings\.)\bfederation\b": "./course[federation]",
}
SETUP = """\
# Set-up: does nothing where the course is installed.
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("gradinv_edu") is None:
    clone = ["git", "clone", "--quiet", "--depth", "1", "--branch", "{branch}", "{url}", "course"]
    subprocess.run(clone, check=True)
    packages = ["./course"{packages}]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)
    importlib.invalidate_caches()
for folder in (Path("course") / "{folder}", Path("{up}") / "{folder}"):
    if folder.is_dir():
        os.chdir(folder)
        break
print("ready")
"""


def address() -> tuple[str, str, str]:
    """Read the repository's public address, its branch, and the folder of the editions."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    place = config.get("repository") or {}
    return (
        place.get("url") or "",
        place.get("branch") or "main",
        place.get("path_to_book") or "",
    )


def notebooks() -> list[Path]:
    """List the notebooks of the table of contents, relative to the repository."""
    files = re.findall(
        r"(?:file|root): (\S+)", (ROOT / "_toc.yml").read_text(encoding="utf-8")
    )
    found = [Path(f"{file}.ipynb") for file in files]
    return [path for path in found if (ROOT / path).is_file()]


def setup(path: Path, code: str, url: str, branch: str) -> str:
    """Write the first cell of an edition."""
    extras = [name for word, name in EXTRAS.items() if re.search(word, code)]
    packages = "".join(f', "{name}"' for name in extras)
    up = "/".join([".."] * len(path.parts))
    return SETUP.format(
        branch=branch, url=url, packages=packages, folder=path.parent.as_posix(), up=up
    )


def edition(path: Path, url: str, branch: str) -> dict[str, Any]:
    """Make the edition of one notebook: its cells without outputs, after a cell that sets up."""
    notebook = json.loads((ROOT / path).read_text(encoding="utf-8"))
    cells = notebook["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    code = "\n".join(
        "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"
    )
    first = {
        "cell_type": "code",
        "id": "set-up",
        "metadata": {},
        "source": setup(path, code, url, branch).splitlines(keepends=True),
        "outputs": [],
        "execution_count": None,
    }
    return {**notebook, "cells": [first, *cells]}


def main() -> None:
    """Write every edition, or say why there are none."""
    url, branch, folder = address()
    if not (url and folder):
        sys.exit(
            "no editions: repository.url and path_to_book in _config.yml are not both set"
        )
    shutil.rmtree(ROOT / folder, ignore_errors=True)
    for path in notebooks():
        target = ROOT / folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(edition(path, url, branch), indent=1, ensure_ascii=False) + "\n"
        target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
