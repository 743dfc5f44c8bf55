"""Run the cells of a notebook in this process, and tell after each what became of it.

Started by ``grade.py`` as a process of its own, so that nothing a submission does reaches the
grader except these lines. The checks that cells import are those beside this file.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from editions import Cell, Notebook, mark_of, read, source_of

LONGEST, LONGEST_HINT = 400, 1000
PROCESSES = 32  # that a submission may start
FILE = 2**30  # bytes of the largest file it may write
STARTS = {"os.fork", "os.forkpty", "os.posix_spawn", "os.system", "subprocess.Popen"}
OUT_OF_MEMORY = "It ran out of the memory that grading allows: is something far too large?"


def limit(gigabytes: float) -> None:
    """Limit what this process and its children may take, where the system lets one.

    Against accidents: a submission that means harm can get round it.
    """
    _limit_starts()
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource

        memory = int(gigabytes * 2**30)
        for kind, most in (("DATA", memory), ("FSIZE", FILE), ("CORE", 0)):
            with contextlib.suppress(AttributeError, ValueError, OSError):
                resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (most, most))


def _limit_starts() -> None:
    started = mmap.mmap(-1, 8)  # shared with all children, so that theirs count as well

    def count(event: str, _: object) -> None:
        if event in STARTS:
            number = int.from_bytes(started[:8], "big") + 1
            started[:8] = number.to_bytes(8, "big")
            if number > PROCESSES:
                raise RuntimeError(f"more than {PROCESSES} processes started")

    sys.addaudithook(count)


def run(notebook: Notebook, told: TextIO) -> None:
    """Run every code cell in order, whether or not those before it failed."""
    shell, mine = _shell(), os.getpid()
    for place, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            _tell(told, place, cell, "began", "")
            result = shell.run_cell(source_of(cell), store_history=False, silent=True)
            if os.getpid() != mine:  # a child that a cell left behind
                os._exit(0)
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
    if type(error).__name__ == "WrongAnswerError":  # by name: its module imports torch
        return _short(str(error), LONGEST_HINT)
    words = " ".join(f"{type(error).__name__}: {error}".split())
    lacking = isinstance(error, MemoryError) or "allocate memory" in words
    return OUT_OF_MEMORY if lacking else _short(words, LONGEST)


def _short(words: str, most: int) -> str:
    return words if len(words) <= most else words[:most] + " …"


if __name__ == "__main__":
    with Path(sys.argv[2]).open("w", encoding="utf-8") as lines:
        limit(float(sys.argv[3]))
        run(read(Path(sys.argv[1])), lines)
