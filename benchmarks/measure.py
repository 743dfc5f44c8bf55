"""Cells measured each in a process of its own, so that its memory and its threads are its own.

A job names a function of this package and its arguments; the child runs it and prints the cell.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from . import store

ROOT = Path(__file__).parents[1]
LIMIT = 600.0


@dataclass(frozen=True)
class Job:
    """``function(**arguments)`` of ``benchmarks.module``, with so many threads."""

    module: str
    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1
    limit: float = LIMIT  # seconds of wall clock


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    again: bool = False
    only: str = ""


def fill(section: str, jobs: Mapping[str, Job], options: Options) -> None:
    """Measure the cells that are not stored yet, or all ``again``, and show each as it comes.

    A cell that is measured again stands as it was until the new one takes its place.
    """
    wanted = {key: job for key, job in jobs.items() if options.only in key}
    stored = {} if options.again else store.cells(section)
    missing = {key: job for key, job in wanted.items() if key not in stored}
    print(f"{section}: {len(wanted) - len(missing)} stored, {len(missing)} to measure", flush=True)
    for place, (key, job) in enumerate(missing.items(), 1):
        print(f"  [{place}/{len(missing)}] {key} …", end=" ", flush=True)
        cell = run(job)
        if cell is None:
            print("did not come to an end; it will be tried again", flush=True)
            continue
        store.put(section, key, cell)
        print(told(cell), flush=True)


def run(job: Job) -> store.Cell | None:
    """One cell from a child process; ``None`` where the child broke down."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.measure", job.module]
    command += [job.function, json.dumps(job.arguments)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(job.threads), timeout=job.limit,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"over {job.limit:.0f} s", "threads": job.threads}
    except subprocess.CalledProcessError as error:
        print((error.stderr or "killed").strip().splitlines()[-1], end="; ")
        return None
    cell: store.Cell = json.loads(done.stdout.strip().splitlines()[-1])
    return {**cell, "threads": job.threads}


def environment(threads: int) -> dict[str, str]:
    """This process's, with so many threads for every library that starts some."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads))}


def told(cell: store.Cell) -> str:
    """A cell in one line, its plain figures only."""
    flat = {k: v for unit in ("seconds", "mib") if isinstance(cell.get(unit), dict)
            for k, v in cell[unit].items()}  # fmt: skip
    shown = {k: v for k, v in cell.items() if isinstance(v, float | int | str | bool)} | flat
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in
                     shown.items() if k != "threads")  # fmt: skip


# --- in the child -------------------------------------------------------------------------------


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds of one call, over all threads."""
    start = time.process_time()
    call()
    return time.process_time() - start


def typical(call: Callable[[], object], least: int = 3, budget: float = 2.0) -> float:
    """Median CPU seconds of several calls, after one that warms up."""
    call()
    spent = [seconds(call) for _ in range(least)]
    while sum(spent) < budget and len(spent) < 25:
        spent.append(seconds(call))
    return median(spent)


def memory(field: str = "VmHWM") -> float:
    """MiB of this process: ``VmRSS`` now, ``VmHWM`` at its highest.

    Not ``ru_maxrss`` where Linux says better: that survives ``exec``, so that a child of a large
    parent starts at the parent's peak. Elsewhere both are the highest so far.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith(field))
        return round(int(line.split()[1]) / 2**10, 1)
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def forget_peak() -> None:
    """Let the highest memory begin anew, without what is kept for later, where the system can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def rounded(value: float, digits: int = 4) -> float:
    """So many significant digits: what a data file needs of a timing."""
    return float(f"{value:.{digits}g}")


if __name__ == "__main__":
    module, function, arguments = sys.argv[1:]
    call = getattr(import_module(f"benchmarks.{module}"), function)
    print(json.dumps(call(**json.loads(arguments))))
