"""Published systems beside this package: same nets, pictures, gradients and machine.

Usage: python -m benchmarks side-by-side [--rgap DIR] [--breaching DIR] [--dlg DIR]
                                         [--inverting-gradients DIR] [--python FILE]
                                         [--minutes NUMBER] [--fresh]

Where the checkouts come from: benchmarks/adapters/__init__.py. A system without its checkout is
skipped. A cell is one recovery in a process of its own, within 16 GiB and ten minutes of CPU time
per thread; it is stored when it ends, and not run again. First every system at 32×32 with one
thread and with two, then, with one thread, smaller and larger pictures, size by size, each system
up to its first failure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import gradinv_edu as gi
from benchmarks import cases, store
from benchmarks.adapters import SYSTEMS
from benchmarks.cases import System

ROOT = Path(__file__).parents[1]
SECTION, ABOUT = "side_by_side", "side_by_side_systems"
REFERENCE, LADDER = 32, (16, 48, 64, 128, 224)
RECOVERED = 20  # dB; below, a picture counts as not recovered
REPEATS = 4  # of a recovery of less than a second; medians are stored
TOO_LARGE = 77  # exit status of a cell over its memory
Cell = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One cell: what is run, and within which limits."""

    system: str
    net: str
    size: int
    threads: int = 1
    checkout: str = ""
    seconds: int = 600  # of CPU time, per thread
    gib: float = 16

    @property
    def key(self) -> str:
        """Under which the cell is stored."""
        return f"{self.system}/{self.net}/{self.size}/{self.threads}"


def status(field: str) -> float:
    """MiB of this process: ``VmRSS`` now, ``VmHWM`` at its highest."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
    except (OSError, StopIteration):  # not Linux: the highest so far, imports included
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def forget_peak() -> None:
    """Let the highest memory begin anew, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def watch(gib: float) -> None:
    """End this process as soon as it holds more than ``gib``, or nobody waits for it any more."""
    parent = os.getppid()

    def look() -> None:
        while status("VmRSS") < 1024 * gib and os.getppid() == parent:
            time.sleep(0.05)
        os._exit(TOO_LARGE)

    threading.Thread(target=look, daemon=True).start()


def limit_time(seconds: int) -> None:
    """Let the system end this process after so much CPU time from now."""
    spent = time.process_time()
    end = int(spent) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (end, end + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def measure(recover: Callable[[], Tensor], x: Tensor) -> Cell:
    """Time, memory above what is there already, and exactness; short recoveries are repeated."""
    forget_peak()
    base = status("VmRSS")
    found, *spent = timed(recover)
    mib = status("VmHWM") - base
    again = [timed(recover)[1:] for _ in range(REPEATS if spent[0] < 1 else 0)]
    cpu, wall = (median(column) for column in zip(spent, *again, strict=True))
    return {
        "cpu_seconds": float(f"{cpu:.3g}"),
        "wall_seconds": float(f"{wall:.3g}"),
        "mib": round(mib, 1),
        "psnr": round(gi.metrics.psnr(found.double(), x.double()), 1),
        "runs": 1 + len(again),
    }


def timed(recover: Callable[[], Tensor]) -> tuple[Tensor, float, float]:
    """One recovery, its CPU seconds and its seconds by the clock."""
    start, clock = time.process_time(), time.perf_counter()
    found = recover()
    return found, time.process_time() - start, time.perf_counter() - clock


def run(job: Job) -> Cell:
    """One cell, in this process."""
    torch.set_num_threads(job.threads)
    system = SYSTEMS[job.system]
    case = cases.case(job.net, job.size, system.dtype)
    with contextlib.redirect_stdout(sys.stderr):
        recover = system.prepare(case, job.checkout)
        limit_time(job.seconds * job.threads)
        watch(job.gib)
        return measure(recover, case.x)


def child(description: str) -> None:
    """Run one cell and print it: what :func:`apart` starts."""
    print(json.dumps(run(Job(**json.loads(description)))))


def environment(threads: int) -> dict[str, str]:
    """Threads of every library, and no GPU: all systems run where R-GAP can."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads)), "CUDA_VISIBLE_DEVICES": ""}


def apart(job: Job, python: str = sys.executable) -> Cell:
    """One cell, in a process of its own; why it gave nothing where it did not."""
    code = "import sys; from benchmarks import side_by_side; side_by_side.child(sys.argv[1])"
    command = [python, "-W", "ignore", "-c", code, json.dumps(asdict(job))]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(job.threads), capture_output=True, text=True
    )
    if done.returncode:
        return {"failed": reason(done.returncode, done.stderr, job)}
    result: Cell = json.loads(done.stdout.splitlines()[-1])
    return result


def reason(code: int, output: str, job: Job) -> str:
    """Say in words why a process ended early."""
    if code == TOO_LARGE:
        return f"over {job.gib:g} GiB"
    if code == -signal.SIGXCPU:
        return f"over {job.seconds} s of CPU time per thread"
    if code == -signal.SIGKILL:
        return "killed by the system, for want of memory as a rule"
    lines = output.strip().splitlines()
    return lines[-1] if lines else f"ended with {code}"


def unavailable(system: System, checkout: str, python: str) -> str | None:
    """Why a system cannot run here, and what to do; ``None`` where it can."""
    if not system.option:
        return None
    if not checkout:
        return f"no checkout given (--{system.option} DIR)"
    if not (Path(checkout) / system.holds).exists():
        return f"{checkout} has no {system.holds}: not a checkout of {system.source}"
    missing = [package for module, package in system.needs if not importable(module, python)]
    if missing:
        return f"install {', '.join(missing)} for {python}, or name another Python by --python"
    return None


def importable(module: str, python: str) -> bool:
    """Whether a Python has a module."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code]).returncode == 0


def commit(checkout: str) -> str:
    """Of a checkout; empty where git does not know the folder."""
    command = ["git", "-C", checkout or ".", "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if checkout and done.returncode == 0 else ""


def recovered(cell: Cell) -> bool:
    """Whether a cell holds a picture that can be told."""
    return cell.get("psnr", -1) >= RECOVERED


class Run:
    """All cells of one call, with the stored ones left as they are."""

    def __init__(self, wanted: argparse.Namespace) -> None:
        self.wanted, self.begun = wanted, time.perf_counter()
        given = {
            s.option: getattr(wanted, s.option.replace("-", "_"), "") for s in SYSTEMS.values()
        }
        self.checkouts = {
            name: str(Path(folder).resolve()) if (folder := given[system.option]) else ""
            for name, system in SYSTEMS.items()
        }

    def pairs(self) -> list[tuple[str, str]]:
        """Systems that can run, with each of their nets; the others' lack is told."""
        found: list[tuple[str, str]] = []
        for name, system in SYSTEMS.items():
            why = unavailable(system, self.checkouts[name], self.wanted.python)
            if why:
                print(f"{name}: skipped, {why}", flush=True)
                continue
            self._describe(name, system)
            found += [(name, net) for net in system.nets if net in self.wanted.nets]
        return found

    def _describe(self, name: str, system: System) -> None:
        revision = commit(self.checkouts[name])
        about = {"given": system.given, "source": system.source, "commit": revision}
        stored = store.cells(ABOUT).get(name, {})
        if about.items() - stored.items():
            store.put(ABOUT, name, about)

    def cell(self, name: str, net: str, size: int, threads: int) -> Cell | None:
        """Take the stored cell, or measure and store it; ``None`` once the time is up."""
        job = Job(name, net, size, threads, self.checkouts[name])
        stored = store.cells(SECTION).get(job.key)
        if stored is None:
            if self._seconds() > 60 * self.wanted.minutes:
                self._say(job.key, "left for another call: the time is up")
                return None
            self._say(job.key, "…")
            stored = {**apart(job, self.wanted.python), "threads": threads}
            store.put(SECTION, job.key, stored)
        self._say(job.key, summary(stored))
        return stored

    def climb(self, pairs: list[tuple[str, str]]) -> None:
        """Size by size; whoever fails at one, 32×32 among them, is not asked for the next."""
        for size in self.wanted.sizes:
            cells = [(pair, self.cell(*pair, size, 1)) for pair in pairs]
            pairs = [pair for pair, cell in cells if cell and recovered(cell)]

    def _seconds(self) -> float:
        return time.perf_counter() - self.begun

    def _say(self, key: str, what: str) -> None:
        print(f"{self._seconds():7.0f} s  {key:<36} {what}", flush=True)


def summary(cell: Cell) -> str:
    """One line for the reader who waits."""
    if "failed" in cell:
        return f"failed: {cell['failed']}"
    return f"{cell['cpu_seconds']:.2f} CPU s, {cell['mib']:.0f} MiB, {cell['psnr']} dB"


def parser() -> argparse.ArgumentParser:
    """Options of the command line."""
    options = argparse.ArgumentParser(prog="python -m benchmarks side-by-side")
    for option in dict.fromkeys(s.option for s in SYSTEMS.values() if s.option):
        options.add_argument(f"--{option}", metavar="DIR", help="a checkout of its published code")
    options.add_argument("--python", default=sys.executable, help="runs all cells")
    options.add_argument("--nets", nargs="+", choices=list(cases.NETS), default=list(cases.NETS))
    options.add_argument("--sizes", type=int, nargs="+", default=[REFERENCE, *LADDER])
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="at 32×32")
    options.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after them")
    options.add_argument("--fresh", action="store_true", help="forget the cells that are stored")
    return options


def main(arguments: list[str]) -> None:
    """Measure every cell that the data file lacks."""
    wanted = parser().parse_args(arguments)
    if wanted.fresh:
        store.drop(SECTION)
        store.drop(ABOUT)
    measuring = Run(wanted)
    pairs = measuring.pairs()
    if REFERENCE in wanted.sizes:
        for threads in wanted.threads:
            for name, net in pairs:
                if threads == 1 or SYSTEMS[name].climbs:
                    measuring.cell(name, net, REFERENCE, threads)
    measuring.climb([pair for pair in pairs if SYSTEMS[pair[0]].climbs])
