"""One data file for all measurements, ``book/data/benchmarks.json``: sections of cells.

A cell is a small dictionary of figures under a key; it carries the seed and the number of threads
that it was measured with, and the number of its run, which says on what machine and with which
versions. A cell that is stored is not measured again, until it is dropped.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "book" / "data" / "benchmarks.json"
FORMAT = 1
PACKAGES = ("torch", "torchvision", "numpy", "scipy", "gradinv_edu")

Cell = dict[str, Any]


def load() -> dict[str, Any]:
    """Read the file, ``{"format", "runs", "sections": {section: {key: cell}}}``, or begin one."""
    if FILE.exists():
        data: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
        return data
    return {"format": FORMAT, "runs": [], "sections": {}}


def cells(section: str) -> dict[str, Cell]:
    """Cells of one section that are stored."""
    found: dict[str, Cell] = load()["sections"].get(section, {})
    return found


def put(section: str, key: str, cell: Cell) -> None:
    """Add or replace one cell; the file is written whole and exchanged in one go."""
    with _locked():
        data = load()
        run = here()
        if run not in data["runs"]:
            data["runs"].append(run)
        stamp = {"seed": 0, "threads": threads(), "run": data["runs"].index(run)}
        data["sections"].setdefault(section, {})[key] = stamp | cell
        _write(data)


def drop(section: str, keys: Iterable[str] | None = None) -> None:
    """Forget some cells, or a whole section, so that they are measured again."""
    with _locked():
        data = load()
        stored = data["sections"].get(section, {})
        for key in list(stored if keys is None else keys):
            stored.pop(key, None)
        _write(data)


def threads() -> int:
    """What this process was allowed; benchmarks are started with one where nothing is said."""
    return int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))


@cache
def here() -> dict[str, Any]:
    """This machine in general terms, and the versions; no names, no folders."""
    return {"machine": machine(), "versions": versions()}


def machine() -> dict[str, Any]:
    """Processor, cores, memory in GiB, and the GPU if there is one."""
    import torch

    found: dict[str, Any] = {
        "system": platform.system(),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "memory": _memory(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
    return found


def versions() -> dict[str, str]:
    """Of Python and of what the figures depend on, without local suffixes."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package).split("+")[0]
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError):
        return None


def _used(data: dict[str, Any]) -> dict[str, Any]:
    """Leave out runs that no cell names any more."""
    every = [cell for section in data["sections"].values() for cell in section.values()]
    kept = sorted({cell["run"] for cell in every})
    for cell in every:
        cell["run"] = kept.index(cell["run"])
    sections = {name: section for name, section in data["sections"].items() if section}
    return {**data, "runs": [data["runs"][place] for place in kept], "sections": sections}


def _write(data: dict[str, Any]) -> None:
    from gradinv_edu.engine.files import write_whole

    write_whole(FILE, json.dumps(_used(data), indent=1, ensure_ascii=False) + "\n")


@contextmanager
def _locked() -> Iterator[None]:
    """Let one process write at a time, where the system can; two would lose a cell."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    FILE.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(FILE.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
