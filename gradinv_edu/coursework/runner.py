"""Run the cells of a notebook in this process, and tell after each what became of it.

Started by :mod:`gradinv_edu.grade` as a process of its own, so that nothing a submission does
reaches the grader except these lines.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TextIO

from .editions import Cell, Notebook, mark_of, read, source_of
from .wrong import WrongAnswerError

LONGEST = 400


def run(notebook: Notebook, told: TextIO) -> None:
    """Run every code cell in order, whether or not those before it failed."""
    shell = _shell()
    for place, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            _tell(told, place, cell, "began", "")
            result = shell.run_cell(source_of(cell), store_history=False, silent=True)
            error = result.error_before_exec or result.error_in_exec
            _tell(told, place, cell, "failed" if error else "passed", _message(error))
    print(json.dumps({"state": "ended"}), file=told, flush=True)


def _shell() -> Any:
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    class Shell(InteractiveShell):
        """There is no screen to draw on; ``%matplotlib inline`` has nothing to do."""

        def enable_gui(self, gui: object = None) -> None:
            """Do nothing."""

    config = Config()
    config.HistoryManager.enabled = False
    return Shell.instance(config=config)


def _tell(told: TextIO, place: int, cell: Cell, state: str, message: str) -> None:
    line = {"place": place, "id": mark_of(cell).get("grade_id", ""), "state": state}
    print(json.dumps({**line, "message": message}), file=told, flush=True)


def _message(error: BaseException | None) -> str:
    if error is None:
        return ""
    if isinstance(error, WrongAnswerError):
        return str(error)
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return words if len(words) <= LONGEST else words[:LONGEST] + " …"


if __name__ == "__main__":
    with Path(sys.argv[2]).open("w", encoding="utf-8") as lines:
        run(read(Path(sys.argv[1])), lines)
