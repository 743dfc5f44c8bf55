"""A page that runs by-hand cells in the browser: ``make lite PYODIDE=folder`` (JupyterLite).

``lite/by_hand.py`` is the NumPy edition of chapters 0 to 4, as a script; here it becomes a notebook
beside a Python for browsers, served from the book's own files. ``folder`` is an unpacked release of
Pyodide with its NumPy; neither is on a package index.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

SOURCE = Path(__file__).parent / "lite" / "by_hand.py"
OUT = Path(__file__).parents[1] / "_build" / "html" / "lite"
TOOLS = "jupyterlite-core jupyterlite-pyodide-kernel jupyter-server"


def notebook(script: str) -> nbformat.NotebookNode:
    """Cells of a script in the percent format."""
    made = nbformat.v4.new_notebook()
    for kind, text in re.findall(r"# %%( \[markdown\])?\n(.*?)(?=\n*# %%|\s*\Z)", script, re.DOTALL):
        plain = re.sub(r"^# ?", "", text.strip(), flags=re.MULTILINE)
        new = nbformat.v4.new_markdown_cell if kind else nbformat.v4.new_code_cell
        made.cells.append(new(plain if kind else text.strip()))
    return made


def build(pyodide: str, out: Path = OUT) -> None:
    """Build the page, or say what is missing."""
    folder = Path(pyodide or "?")
    if not (folder / "pyodide.mjs").exists() or not list(folder.glob("numpy-*.whl")):
        sys.exit(
            f"No Pyodide in {pyodide or 'PYODIDE'}: unpack a full release (pyodide.mjs and "
            f"numpy-….whl lie in it), then `make lite PYODIDE=folder`."
        )
    if not shutil.which("jupyter-lite", path=str(Path(sys.executable).parent)):
        sys.exit(f"JupyterLite is missing: {sys.executable} -m pip install {TOOLS}")
    work = out.parent.parent / "lite"
    shutil.rmtree(work, ignore_errors=True)
    (work / "contents").mkdir(parents=True)
    nbformat.write(notebook(SOURCE.read_text()), work / "contents" / "by_hand.ipynb")
    shutil.copytree(folder, work / "static" / "pyodide")
    command = [sys.executable, "-m", "jupyterlite_core", "build", "--contents", "contents"]
    subprocess.run([*command, "--output-dir", str(out)], cwd=work, check=True)
    print(f"Built. Serve {out.parent}, and open lite/lab/index.html?path=by_hand.ipynb")


if __name__ == "__main__":
    build(sys.argv[1] if len(sys.argv) > 1 else "")
