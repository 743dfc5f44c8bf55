"""Launch buttons, and the editions they open, come with a public address and not before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import load

ROOT = Path(__file__).parents[1]
URL = "https://example.org/someone/course"


launch = load("launch")
NOTEBOOKS = launch.notebooks()


def _first(path: Path) -> str:
    return "".join(launch.edition(path, URL, "main")["cells"][0]["source"])


def test_the_editions_are_there_and_up_to_date_or_there_is_no_address() -> None:
    url, branch, folder = launch.address()
    assert folder == "launch"
    stored = sorted((ROOT / folder).rglob("*.ipynb"))
    expected = sorted(ROOT / folder / path for path in NOTEBOOKS) if url else []
    assert stored == expected, "run python book/launch.py"
    for path in NOTEBOOKS if url else []:
        assert json.loads((ROOT / folder / path).read_text()) == launch.edition(path, url, branch)


def test_pages_have_buttons_exactly_where_there_is_an_address() -> None:
    page = ROOT / "_build" / "html" / "book" / "01_perceptron.html"
    if not page.exists():
        pytest.skip("the book is not built: run `make book` first")
    url, _, _ = launch.address()
    for place in ("mybinder.org", "colab.research.google.com"):
        assert (place in page.read_text()) == bool(url)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=str)
def test_an_edition_is_the_notebook_after_a_cell_that_sets_up(path: Path) -> None:
    first, *rest = launch.edition(path, URL, "main")["cells"]
    source = json.loads((ROOT / path).read_text())["cells"]
    assert [cell["source"] for cell in rest] == [cell["source"] for cell in source]
    assert not any(cell.get("outputs") for cell in rest)
    compile("".join(first["source"]), str(path), "exec")
    assert f'"{URL}"' in "".join(first["source"])


def test_an_edition_asks_for_what_its_notebook_imports() -> None:
    noise = next(path for path in NOTEBOOKS if path.stem == "15_noise")
    assert '"opacus"' in _first(noise)
    assert '"./course"]' in _first(NOTEBOOKS[0])


def test_setting_up_where_the_course_is_installed_only_goes_to_the_folder(tmp_path: Path) -> None:
    """As on Binder: nothing is installed, and the chapter finds its data."""
    here = tmp_path / "launch" / "book"
    here.mkdir(parents=True)
    (tmp_path / "book" / "data").mkdir(parents=True)
    code = _first(Path("book/12_design.ipynb")) + "\nassert Path('data').is_dir()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "ready\n", done.stderr


def test_setting_up_elsewhere_clones_and_installs(tmp_path: Path) -> None:
    """As on Colab: with a git and a pip that only write down how they were called."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "git").write_text(
        f'#!/bin/sh\necho git "$@" >> {tmp_path}/log\nmkdir -p course/book\n'
    )
    (tools / "git").chmod(0o755)
    (tools / "pip.py").write_text(
        f"import sys\nopen('{tmp_path}/log', 'a').write(' '.join(sys.argv[1:]))"
    )
    code = _first(Path("book/15_noise.ipynb"))
    code = "import importlib.util as u\nu.find_spec = lambda name: None\n" + code
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "PYTHONPATH": str(tools)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    cloned, installed = (tmp_path / "log").read_text().splitlines()
    assert cloned.startswith("git clone") and cloned.endswith(f"--branch main {URL} course")
    assert installed == "install --quiet ./course opacus"
